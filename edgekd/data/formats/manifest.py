"""A list of image files: CSV (header path,label[,split]) or JSONL (the same fields), paths relative to the list and inside its folder.

With `labels: none` the label may be left out or empty.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from edgekd.data.config import DataConfig
from edgekd.data.formats._files import PART_NAMES, SUFFIXES, ImageFiles, index_of
from edgekd.data.index import Index, folder_of
from edgekd.errors import DataRefused, FileMissing, InputRefused, suggest
from edgekd.registry import register
from edgekd.safeio.files import contained

_NAMES = ("manifest.csv", "manifest.jsonl")
_MAX_BYTES = 512 * 2**20
_HINT = "correct the manifest"


@register("format")
class Manifest(ImageFiles):
    """`data.root` is the list itself, or a folder with one manifest.csv or manifest.jsonl."""

    def scan(self, cfg: DataConfig, *, cache_dir: Path | None = None) -> Index:
        """Raises FileMissing for the list or an image, DataRefused with file:line for a bad row."""
        listing = _listing(folder_of(cfg))
        rows: list[tuple[str, str, str | None]] = []
        stats: dict[str, os.stat_result] = {}
        checked: set[Path] = set()
        for line, row in _rows(listing):
            where = f"{listing}:{line}"
            sample_id, name, part = _fields(row, where, labelled=cfg.labels == "given")
            stats[sample_id] = _stat(listing.parent, sample_id, where, checked)
            rows.append((sample_id, name, part))
        return index_of(rows, stats, listing.parent, cfg, cache_dir)


def _listing(root: Path) -> Path:
    if root.is_file():
        return root
    found = [root / name for name in _NAMES if (root / name).is_file()]
    if len(found) == 1:
        return found[0]
    what = "the folder has two manifests" if found else "the folder has no manifest"
    raise FileMissing(what, where=str(root), expected=" or ".join(_NAMES), hint="name the file: -o data.root=FILE")


def _rows(listing: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = _text(listing)
    if listing.suffix.lower() == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        yield from ((number, _json_row(line, f"{listing}:{number}")) for number, line in lines if line.strip())
        return
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        yield from ((reader.line_num, row) for row in reader)
    except csv.Error as e:
        raise DataRefused(
            f"the row is not CSV: {e}", where=f"{listing}:{reader.line_num}", expected="path,label[,split]", hint=_HINT
        ) from e


def _text(listing: Path) -> str:
    try:
        if listing.stat().st_size > _MAX_BYTES:
            raise DataRefused(
                "the manifest is too large", where=str(listing), expected=f"at most {_MAX_BYTES} bytes", hint="split the dataset"
            )
        return listing.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise DataRefused(f"the manifest cannot be read: {e}", where=str(listing), expected="UTF-8 text", hint=_HINT) from e


def _json_row(row: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(row)
    except (ValueError, RecursionError) as e:
        raise DataRefused("the line is not JSON", where=where, expected='{"path": ..., "label": ...}', hint=_HINT) from e
    if not isinstance(value, dict):
        raise DataRefused("the line is not a JSON object", where=where, expected='{"path": ..., "label": ...}', hint=_HINT)
    return value


def _fields(row: dict[str, Any], where: str, *, labelled: bool) -> tuple[str, str, str | None]:
    path, label, split = row.get("path"), row.get("label"), row.get("split")
    name = str(label) if type(label) in (str, int) else ""  # type(): True is an int and no label
    if not isinstance(path, str) or not path or (labelled and not name) or not set(row) <= {"path", "label", "split"}:
        raise DataRefused("a field is missing, empty or unknown", where=where, expected="path, label and optionally split", hint=_HINT)
    if split not in (None, "") and (not isinstance(split, str) or split not in PART_NAMES):
        raise DataRefused(f"unknown split {split!r}{suggest(split, PART_NAMES)}", where=where, expected="train, val or test", hint=_HINT)
    return path, name, PART_NAMES[split] if split else None


def _stat(folder: Path, sample_id: str, where: str, checked: set[Path]) -> os.stat_result:
    path, plain = folder / sample_id, PurePosixPath(sample_id)
    if str(plain) != sample_id or {"..", "/"} & set(plain.parts) or {"\0", "\\"} & set(sample_id):
        what = f"the path {sample_id!a} is not a plain relative path"
        raise DataRefused(what, where=where, expected="a path inside the folder", hint=_HINT)
    if path.suffix.lower() not in SUFFIXES:
        raise DataRefused(f"{sample_id} is not a supported image", where=where, expected=", ".join(sorted(SUFFIXES)), hint=_HINT)
    try:
        _check_inside(path, folder, where, checked)
        stat = path.stat()
    except (OSError, ValueError) as e:  # ValueError: a name that no file can have
        raise FileMissing(f"the image {sample_id!a} is not there", where=where, expected=f"a file in {folder}", hint=_HINT) from e
    if not path.is_file():  # a pipe would block its reader
        raise DataRefused(f"{sample_id} is not a file", where=where, expected="an image file", hint=_HINT)
    return stat


def _check_inside(path: Path, folder: Path, where: str, checked: set[Path]) -> None:
    """Symlinks may not lead outside; a folder is resolved once, as resolving each of many thousand files takes seconds."""
    place = path if path.is_symlink() else path.parent
    if place in checked:
        return
    try:
        contained(place, [folder])
    except InputRefused as e:
        raise DataRefused(f"{path.name} leads outside the manifest's folder", where=where, expected=e.expected, hint=_HINT) from e
    checked.add(place)
