"""The binary version of CIFAR-10 (data_batch_*.bin, test_batch.bin) and CIFAR-100 (train.bin, test.bin).

Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009; cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.data.config import DataConfig
from edgekd.data.index import Index, Sample, folder_of
from edgekd.errors import DataRefused, FileMissing
from edgekd.registry import register

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


@dataclass(frozen=True)
class _Layout:
    folder: str  # inside the archive
    train: str  # glob
    test: str
    names: str  # file of class names
    classes: int
    label_bytes: int  # before the pixels; the last one is the label

    @property
    def record(self) -> int:
        return self.label_bytes + _PIXELS


_LAYOUTS = (
    _Layout("cifar-10-batches-bin", "data_batch_*.bin", "test_batch.bin", "batches.meta.txt", 10, 1),
    _Layout("cifar-100-binary", "train.bin", "test.bin", "fine_label_names.txt", 100, 2),
)


@register("format")
class Cifar:
    """`data.root` is the unpacked folder or the one above it. Ids are `<file>/<record>`."""

    def scan(self, cfg: DataConfig, *, cache_dir: Path | None = None) -> Index:
        """Raises FileMissing, DataRefused for a file cut short or a label out of range."""
        folder, layout = _find(folder_of(cfg))
        files = [("train", path) for path in sorted(folder.glob(layout.train))] + [("test", folder / layout.test)]
        samples = tuple(s for part, path in files if path.is_file() for s in _samples(path, part, layout))
        return Index(_names(folder, layout), samples)

    def read(self, root: Path, sample_id: str) -> bytes:
        """One record: labels, then three planes. Raises DataRefused."""
        folder, layout = _find(root)
        name, _, number = sample_id.partition("/")
        try:
            with (folder / name).open("rb") as f:
                f.seek(int(number) * layout.record)
                return f.read(layout.record)
        except OSError as e:
            what = f"the file cannot be read: {e.strerror}"
            raise DataRefused(what, where=str(folder / name), expected="the file that was indexed", hint="restore it and run again") from e

    def image(self, data: bytes, sample_id: str) -> Image:
        import PIL.Image  # not needed to plan

        planes = data[-_PIXELS:]
        size = _SIDE * _SIDE
        return PIL.Image.merge("RGB", [PIL.Image.frombytes("L", (_SIDE, _SIDE), planes[k * size : (k + 1) * size]) for k in range(3)])


def _find(root: Path) -> tuple[Path, _Layout]:
    for layout in _LAYOUTS:
        for folder in (root, root / layout.folder):
            if next(folder.glob(layout.train), None):
                return folder, layout
    expected = " or ".join(f"{x.train} with {x.test}" for x in _LAYOUTS)
    raise FileMissing(
        "the folder holds no binary CIFAR files", where=str(root), expected=expected, hint="give the unpacked folder: -o data.root=DIR"
    )


def _samples(path: Path, part: str, layout: _Layout) -> Iterator[Sample]:
    data = memoryview(path.read_bytes())
    if len(data) % layout.record:
        what = f"the file has {len(data)} bytes and is cut short or no CIFAR file"
        raise DataRefused(what, where=str(path), expected=f"a multiple of {layout.record}", hint="unpack the archive again")
    for number in range(len(data) // layout.record):
        record = data[number * layout.record : (number + 1) * layout.record]
        label = record[layout.label_bytes - 1]
        if label >= layout.classes:
            what = f"record {number} has label {label}"
            raise DataRefused(what, where=str(path), expected=f"0 to {layout.classes - 1}", hint="unpack the archive again")
        yield Sample(f"{path.name}/{number:05d}", label, part, layout.record, hashlib.sha256(record).hexdigest())


def _names(folder: Path, layout: _Layout) -> tuple[str, ...]:
    path = folder / layout.names
    if not path.is_file():
        return tuple(map(str, range(layout.classes)))
    names = tuple(path.read_text(encoding="utf-8", errors="replace").split())
    if len(set(names)) != layout.classes or len(names) != layout.classes:
        raise DataRefused(
            f"the file names {len(names)} classes", where=str(path), expected=f"{layout.classes}", hint="unpack the archive again"
        )
    return names
