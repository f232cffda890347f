"""Sizes and SHA-256 of many files: hashed by threads once, then taken from a book while the files' stat is the same."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from edgekd.errors import DataRefused
from edgekd.safeio.files import resource_errors, write_atomic

_SETTLED_NS = 2_000_000_000  # a file changed this recently may change again within the clock's tick: hash it anew next time


class Hashed(NamedTuple):
    """Size in bytes and SHA-256 in hex."""

    size: int
    sha256: str


def hash_files(root: Path, stats: Mapping[str, os.stat_result], *, workers: int, cache_dir: Path | None) -> dict[str, Hashed]:
    """Hashes of the files `root / name`, for each name in `stats`. Raises DataRefused for a file that cannot be read."""
    started_ns = time.time_ns()
    book = cache_dir and cache_dir / "hashes" / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]}.json"
    stamps = {name: _stamp(stat) for name, stat in stats.items()}
    known = _load(book) if book else {}
    hashes = {name: Hashed(stat.st_size, row[1]) for name, stat in stats.items() if (row := known.get(name)) and row[0] == stamps[name]}
    new = [name for name in stats if name not in hashes]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        hashes.update(zip(new, pool.map(lambda name: _hash(root / name), new), strict=True))
    if book and new:
        kept = [n for n, s in stats.items() if s.st_size == hashes[n].size and started_ns - max(s.st_mtime_ns, s.st_ctime_ns) > _SETTLED_NS]
        _save(book, {name: (stamps[name], hashes[name].sha256) for name in kept})
    return hashes


def _stamp(stat: os.stat_result) -> str:
    # ctime is there because mtime can be set back and ctime cannot.
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"


def _hash(path: Path) -> Hashed:
    try:
        with path.open("rb", buffering=0) as f:
            return Hashed(os.fstat(f.fileno()).st_size, hashlib.file_digest(f, "sha256").hexdigest())
    except OSError as e:
        raise DataRefused(
            f"the file cannot be read: {e.strerror}", where=str(path), expected="a readable image", hint="check the file"
        ) from e


def _load(book: Path) -> dict[str, tuple[str, str]]:
    try:
        return {name: (stamp, sha256) for name, (stamp, sha256) in json.loads(book.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}  # a cache: whatever is wrong with it, hashing again is right


def _save(book: Path, files: dict[str, tuple[str, str]]) -> None:
    with resource_errors(book):
        book.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(book, json.dumps(files).encode())
