"""kind -> names (a folder listing) -> class. A method's name is its file's name; adding one adds one file.

A user's own classes come only from the file named by `--code`, through the same decorator (`edgekd.register`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from edgekd.errors import UnknownName, UsageError, suggest

_ROOT = Path(__file__).parent
FOLDERS = {  # kind -> folder whose files are its members; files that start with an underscore are helpers
    "distill": "distill",
    "criterion": "prune",
    "quantize": "quantize",
    "backend": "backends",
    "task": "tasks",
    "format": "data/formats",
    "graph": "data/graphs",
    "graph_distill": "graph",
    "architecture": "models/architectures",
    "stage": "stages",
    "transport": "profile/transports",
}
_user: dict[tuple[str, str], type] = {}
_builtin: dict[tuple[str, str], type] = {}
_T = TypeVar("_T", bound=type)


def register(kind: str, name: str | None = None) -> Callable[[_T], _T]:
    """Class decorator: makes the class the member of `kind` named after its file, or `name` in a user's `--code` file."""
    if kind not in FOLDERS:
        raise UsageError(f"unknown kind '{kind}'{suggest(kind, FOLDERS)}", where="edgekd.register")

    def mark(cls: _T) -> _T:
        builtin = cls.__module__.startswith("edgekd.")
        own = cls.__module__.rpartition(".")[2] if builtin else (name or cls.__name__.lower())
        if not builtin and (own in _folder(kind) or (kind, own) in _user):
            raise UsageError(
                f"{kind} '{own}' exists already", where=cls.__module__, hint="give yours another name: @edgekd.register(kind, 'name')"
            )
        (_builtin if builtin else _user)[kind, own] = cls
        return cls

    return mark


def names(kind: str) -> tuple[str, ...]:
    """All member names of a kind, sorted, without importing them."""
    return tuple(sorted({*_folder(kind), *(n for k, n in _user if k == kind)}))


def load(kind: str, name: str) -> Any:
    """The class of a member; raises UnknownName with the nearest name."""
    if (kind, name) in _user:
        return _user[kind, name]
    if name not in _folder(kind):
        raise UnknownName(f"unknown {kind} '{name}'{suggest(name, names(kind))}", hint="list them: edgekd methods list")
    importlib.import_module(module_of(kind, name))
    return _builtin[kind, name]


def module_of(kind: str, name: str) -> str:
    return f"edgekd.{FOLDERS[kind].replace('/', '.')}.{name}"


def is_users(kind: str, name: str) -> bool:
    """Whether it comes from a file given by --code."""
    return (kind, name) in _user


def source_of(kind: str, name: str) -> bytes:
    """The source text of a member's file: part of every cache key that uses it."""
    if (kind, name) in _user:
        import inspect  # only for user code

        return inspect.getsource(inspect.getmodule(_user[kind, name]) or _user[kind, name]).encode()
    return _builtin_source(kind, name)


@cache
def _builtin_source(kind: str, name: str) -> bytes:
    return (_ROOT / FOLDERS[kind] / f"{name}.py").read_bytes()


@cache
def _folder(kind: str) -> frozenset[str]:
    return frozenset(p.stem for p in (_ROOT / FOLDERS[kind]).glob("[a-z]*.py"))
