"""What formats of image files share: supported suffixes, reading and decoding one file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.data.config import DataConfig
from edgekd.data.hashes import hash_files
from edgekd.data.index import UNLABELLED, Index, Sample
from edgekd.errors import DataRefused

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
PART_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class ImageFiles:
    """Samples that are files under the root; the id is the relative posix path."""

    def read(self, root: Path, sample_id: str) -> bytes:
        """The bytes of one file. Raises DataRefused."""
        path = (root.parent if root.is_file() else root) / sample_id
        try:
            return path.read_bytes()
        except OSError as e:
            what = f"the file cannot be read: {e.strerror}"
            raise DataRefused(what, where=str(path), expected="the file that was indexed", hint="restore it and run again") from e

    def image(self, data: bytes, sample_id: str) -> Image:
        """Decodes one file within the limits of safeio. Raises ImageRefused."""
        from edgekd.safeio.images import decode  # Pillow: not needed to plan

        return decode(data, sample_id)


def index_of(
    rows: list[tuple[str, str, str | None]], stats: dict[str, os.stat_result], root: Path, cfg: DataConfig, cache_dir: Path | None
) -> Index:
    """Index from (id, class name, part) rows. Classes are those of the trainable rows, or, without labels, all names but the empty one.

    Raises DataRefused for a label outside them.
    """
    named = {name for _, name, part in rows if (name if cfg.labels == "none" else part in ("train", None))}
    classes = tuple(sorted(named, key=_number_or_text))
    label_of = {name: label for label, name in enumerate(classes)} | ({"": UNLABELLED} if cfg.labels == "none" else {})
    for sample_id, name, part in rows:
        if name not in label_of:
            what = f"the label {name} of {sample_id} ({part}) is not among the classes of train"
            raise DataRefused(
                what, where=str(root), expected="the same classes in every part", hint="add training images of it, or remove it"
            )
    hashes = hash_files(root, stats, workers=max(1, cfg.workers), cache_dir=cache_dir)
    return Index(classes, tuple(Sample(sample_id, label_of[name], part, *hashes[sample_id]) for sample_id, name, part in rows))


def _number_or_text(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.isascii() and name.isdigit() and len(name) < 10 else (1, 0, name)
