"""Image files in class folders: train/<class>/*, with val/ and test/ where they exist; or <class>/*, all to be split by seed.

With `labels: none` images may lie at any depth below the root or train/; val/<class>/* and test/<class>/* still say the class.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from edgekd.data.config import DataConfig
from edgekd.data.formats._files import PART_NAMES, SUFFIXES, ImageFiles, index_of
from edgekd.data.index import Index, folder_of
from edgekd.errors import DataRefused
from edgekd.registry import register


@register("format")
class ImageFolder(ImageFiles):
    """One folder per class; the folder's name is the class's name."""

    def scan(self, cfg: DataConfig, *, cache_dir: Path | None = None) -> Index:
        """Raises FileMissing for the root, DataRefused for an unclear layout."""
        root = folder_of(cfg)
        if not root.is_dir():
            raise DataRefused(
                "the dataset is a file", where=str(root), expected="a folder of class folders", hint="for a list use format: manifest"
            )
        rows: list[tuple[str, str, str | None]] = []
        stats: dict[str, os.stat_result] = {}
        ignored: Counter[str] = Counter()
        for part, folder in _parts(root):
            for place in _below(folder) if cfg.labels == "none" else [(name,) for name in _folders(folder)]:
                for entry in _files(folder.joinpath(*place), ignored, deep=cfg.labels == "none"):
                    sample_id = "/".join([*([folder.name] if part else []), *place, entry.name])
                    rows.append((sample_id, place[0] if len(place) == 1 else "", part))
                    stats[sample_id] = entry.stat()
        return replace(index_of(rows, stats, root, cfg, cache_dir), ignored=dict(sorted(ignored.items())))


def _parts(root: Path) -> list[tuple[str | None, Path]]:
    found = [(PART_NAMES[name], root / name) for name in _folders(root) if name in PART_NAMES]
    names = [part for part, _ in found]
    if not found:
        return [(None, root)]
    if "train" not in names:
        what = f"the dataset has {' and '.join(f'{p.name}/' for _, p in found)} but no train/"
        raise DataRefused(what, where=str(root), expected="train/<class>/*, or <class>/* alone", hint="add train/ or check data.root")
    if len(names) != len(set(names)):
        raise DataRefused(
            "the dataset has more than one folder for val", where=str(root), expected="one of val, valid, validation", hint="keep one"
        )
    return sorted(found, key=lambda item: ("train", "val", "test").index(str(item[0])))


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _below(folder: Path, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The folder and all folders below it, each as its path; links are not followed, for they may lead in circles."""
    yield place
    for name in _folders(folder.joinpath(*place)):
        if not folder.joinpath(*place, name).is_symlink():
            yield from _below(folder, (*place, name))


def _files(folder: Path, ignored: Counter[str], *, deep: bool = False) -> list[os.DirEntry[str]]:
    kept = []
    with os.scandir(folder) as entries:
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if suffix in SUFFIXES and not entry.name.startswith(".") and entry.is_file():  # is_file: a pipe would block its reader
                kept.append(entry)
            elif not (deep and entry.is_dir()):
                ignored[suffix or entry.name] += 1
    return sorted(kept, key=lambda e: e.name)
