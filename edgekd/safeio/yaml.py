"""A strict YAML reader: plain data with the place of every key, or RecipeError; nothing in a file can name code or blow up."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from edgekd.errors import RecipeError

KeyPath = tuple[str | int, ...]

_MAX_BYTES, _MAX_NODES, _MAX_DEPTH, _MAX_PROBLEMS = 256_000, 20_000, 20, 20
_INT_LIMIT = 2**63
_SCALARS: dict[str, bool | None] = {"": None, "~": None, "null": None, "true": True, "false": False}
_INT = re.compile(r"[-+]?(0|[1-9]\d*)", re.ASCII)
_FLOAT = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?", re.ASCII)
_NOT_FINITE = re.compile(r"[-+]?\.?(inf|infinity|nan)", re.IGNORECASE)
# C0 and C1 controls, surrogates, invisible line breaks, byte-order marks and direction overrides: what a reader of the file cannot see
_HIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # about ten times faster where libyaml is there


@dataclass(frozen=True)
class Document:
    """What a file says, and where: path in the value -> `file:line:col` (1-based) of the key, the list item or the document."""

    value: Any
    marks: dict[KeyPath, str]


def read(text: str | bytes, where: str) -> Document:
    """Parses one YAML document. Raises only RecipeError, with all problems that can be told apart, each `where:line:col: sentence`."""
    return _read(text, where, block=True)


def read_value(text: str, where: str) -> Any:
    """Parses one value as written after `NAME=`: a scalar or a flow collection such as `[1, 2]` or `{a: 1}`. Raises RecipeError."""
    return _read(text, where, block=False).value


def read_file(path: Path) -> Document:
    """Parses a file without reading more than the size limit. Raises RecipeError, also for a file that cannot be read."""
    try:
        with path.open("rb") as f:
            return read(f.read(_MAX_BYTES + 1), str(path))
    except (OSError, ValueError) as e:
        reason = (getattr(e, "strerror", None) or str(e)).lower()
        raise RecipeError([f"{path}:1:1: cannot read this file: {reason}"], hint="list the shipped recipes: edgekd recipes list") from e


def _read(text: str | bytes, where: str, *, block: bool) -> Document:
    clean = _clean(text, where)
    reader = _Reader(where, yaml.parse(clean, Loader=_LOADER), block)
    try:
        value = reader.document()
    except (yaml.YAMLError, ValueError, OverflowError) as e:  # the last two: numbers in escapes and directives of the pure Python parser
        reader.problems.append(_syntax_problem(e, where))
    if reader.problems:
        raise RecipeError(reader.problems)
    return Document(value, reader.marks)


def _clean(text: str | bytes, where: str) -> str:
    if len(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")) > _MAX_BYTES:
        raise RecipeError([f"{where}:1:1: the text is larger than {_MAX_BYTES} bytes"])
    text = _decoded(text, where) if isinstance(text, bytes) else text
    text = text.removeprefix("\ufeff")  # the byte-order mark that some editors write
    if hidden := _HIDDEN.search(text):
        raise RecipeError([f"{_place(text[: hidden.start()], where)}: control character U+{ord(hidden[0]):04X} is not allowed"])
    return text


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise RecipeError([f"{_place(data[: e.start].decode('utf-8', 'replace'), where)}: not UTF-8 text"]) from e


def _place(before: str, where: str) -> str:
    lines = re.split("\r\n|\r|\n", before)
    return f"{where}:{len(lines)}:{len(lines[-1]) + 1}"


def _syntax_problem(e: Exception, where: str) -> str:
    mark = getattr(e, "problem_mark", None) or getattr(e, "context_mark", None)
    place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else f"{where}:1:1"
    sentence = "; ".join(str(part) for part in (getattr(e, "context", None), getattr(e, "problem", None)) if part) or str(e)
    return f"{place}: not valid YAML: {_HIDDEN.sub('?', ' '.join(sentence.split()))}"


@dataclass
class _Reader:
    """Builds the value from parser events, so that every cap is checked before anything is built."""

    where: str
    events: Iterator[Any]
    block: bool
    marks: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    nodes: int = 0

    def document(self) -> Any:
        next(self.events)  # stream start
        value, seen = None, 0
        while not isinstance(event := next(self.events), yaml.StreamEndEvent):
            if isinstance(event, yaml.DocumentStartEvent):
                seen += 1
                self._header(event, seen)
                value = self._node(next(self.events), (), 0)
        self.marks.setdefault((), f"{self.where}:1:1")
        return value

    def _header(self, event: Any, seen: int) -> None:
        if seen > 1:
            self._stop(event, "only one document is allowed")
        if event.version or event.tags:
            self._note(event, "directives (%YAML, %TAG) are not allowed")

    def _node(self, event: Any, path: KeyPath, depth: int) -> Any:
        self.nodes += 1
        if self.nodes > _MAX_NODES:
            self._stop(event, f"more than {_MAX_NODES} values")
        if depth > _MAX_DEPTH:
            self._stop(event, f"nested deeper than {_MAX_DEPTH} levels")
        self.marks.setdefault(path, self._at(event))
        self._refuse_extras(event)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(path, depth)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path, depth)
        return self._scalar(event) if isinstance(event, yaml.ScalarEvent) else None

    def _refuse_extras(self, event: Any) -> None:
        if isinstance(event, yaml.AliasEvent):
            return self._note(event, "aliases (*name) are not allowed; write the value again")
        if event.anchor:
            self._note(event, "anchors (&name) are not allowed")
        if event.tag is not None:
            self._note(event, f"tags are not allowed (found '{event.tag}')")
        if not self.block and isinstance(event, yaml.CollectionStartEvent) and not event.flow_style:
            self._note(event, "write a list as [a, b], a mapping as {a: b}, and quote text with ': ' in it")
        return None

    def _sequence(self, path: KeyPath, depth: int) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self._node(event, (*path, len(items)), depth + 1))
        return items

    def _mapping(self, path: KeyPath, depth: int) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self._key(event, (*path, f"<key {len(entries)}>"), depth)
            if key in lines:
                self._note(event, f"key '{key}' appears twice (first on line {lines[key]})")
            lines.setdefault(key, event.start_mark.line + 1)
            self.marks[*path, key] = self._at(event)
            entries[key] = self._node(next(self.events), (*path, key), depth + 1)
        return entries

    def _key(self, event: Any, path: KeyPath, depth: int) -> str:
        noted = len(self.problems)
        key = self._node(event, path, depth + 1)
        self.marks.pop(path, None)
        if key == "<<" and event.implicit[0]:
            self._note(event, "merge keys (<<) are not allowed; use extends")
        if isinstance(key, str):
            return key
        if noted == len(self.problems):
            shown = f"'{event.value[:40]}'" if isinstance(event, yaml.ScalarEvent) else "a collection"
            self._note(event, f"a key must be text, not {shown}; quote it")
        return f"<key {self.nodes}>"  # unique, so that it is not reported a second time as a duplicate

    def _scalar(self, event: Any) -> Any:
        text: str = event.value
        if hidden := _HIDDEN.search(text):  # from an escape such as "\e" in double quotes
            self._note(event, f"control character U+{ord(hidden[0]):04X} is not allowed")
        if not event.implicit[0]:
            return text
        if text in _SCALARS:
            return _SCALARS[text]
        if _NOT_FINITE.fullmatch(text):
            self._note(event, f"{text} is not a number that can be used; quote it if it is text")
        return self._number(event, text) if _FLOAT.fullmatch(text) else text

    def _number(self, event: Any, text: str) -> int | float | str:
        if _INT.fullmatch(text):
            if len(text) < 25 and abs(int(text)) < _INT_LIMIT:  # the length first: int() of a long text is slow, then an error
                return int(text)
        elif text.lstrip("+-").isdigit() and text.isascii():  # 007: an octal number to some readers, decimal to others, so neither
            return text
        elif math.isfinite(number := float(text)):
            return number
        self._note(event, f"the number {text[:40]} is out of range; quote it if it is text")
        return text

    def _at(self, event: Any) -> str:
        return f"{self.where}:{event.start_mark.line + 1}:{event.start_mark.column + 1}"

    def _note(self, event: Any, sentence: str) -> None:
        self.problems.append(f"{self._at(event)}: {_HIDDEN.sub('?', sentence)}")
        if len(self.problems) >= _MAX_PROBLEMS:
            raise RecipeError(self.problems)

    def _stop(self, event: Any, sentence: str) -> None:
        self._note(event, sentence)
        raise RecipeError(self.problems)
