"""Index: every sample of a dataset by id, size and SHA-256; what a fingerprint covers and what readers verify against."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from edgekd import registry
from edgekd.artifact import canonical
from edgekd.data.config import DataConfig
from edgekd.errors import DataRefused, FileMissing

if TYPE_CHECKING:
    from PIL.Image import Image

PARTS = ("train", "val", "test")
UNLABELLED = -1


class Sample(NamedTuple):
    """One image. `id` is a relative posix path, or stable within its container; the format reads the sample's bytes by it."""

    id: str
    label: int  # position in the classes, or UNLABELLED
    split: str | None  # one of PARTS; None: not assigned yet
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Index:
    """All samples that a format found, in a stable order."""

    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    ignored: dict[str, int] = field(default_factory=dict)  # suffix -> files that are no supported image

    @property
    def fingerprint(self) -> str:
        """SHA-256 over classes and samples; equal for equal content wherever it lies."""
        h = hashlib.sha256(canonical(self.classes).encode())
        for s in self.samples:  # an id holds no NUL (`_check_ids`), so the text is unambiguous
            h.update(f"{s.id}\0{s.label}\0{s.split}\0{s.size}\0{s.sha256}\n".encode())
        return h.hexdigest()


class Format(Protocol):
    """A layout of datasets: finds samples, gives a sample's bytes, and makes them an image."""

    def scan(self, cfg: DataConfig, *, cache_dir: Path | None = None) -> Index: ...
    def read(self, root: Path, sample_id: str) -> bytes: ...
    def image(self, data: bytes, sample_id: str) -> Image: ...


def scan(cfg: DataConfig, *, cache_dir: Path | None = None) -> Index:
    """The index of the dataset, parts not yet split. Imports neither torch nor numpy. Raises DataRefused, FileMissing."""
    index: Index = format_of(cfg.format).scan(cfg, cache_dir=cache_dir)
    where = str(root_of(cfg))
    if not index.samples:
        seen = f"; it holds {sum(index.ignored.values())} other files ({', '.join(index.ignored)})" if index.ignored else ""
        raise DataRefused(f"the dataset is empty{seen}", where=where, expected="images in class folders or records", hint="check data.root")
    if cfg.labels == "none":
        index = _without_labels(index, cfg, where)
    if len(index.classes) < 2:
        raise DataRefused(
            f"the dataset has one class only: {index.classes[0]}", where=where, expected="two or more", hint="check data.root"
        )
    _check_ids(index.samples, where)
    return index


def judged_by_labels(index: Index) -> bool:
    """Whether all of val and test is there and labelled."""
    judged = [s for s in index.samples if s.split in ("val", "test")]
    return {s.split for s in judged} == {"val", "test"} and all(s.label != UNLABELLED for s in judged)


def _without_labels(index: Index, cfg: DataConfig, where: str) -> Index:
    """The classes of `data.classes`. Labels of val and test are kept where both have one of them on every image, all others are dropped."""
    names = cfg.class_names
    if not names:
        raise DataRefused(
            "nothing says how many classes there are", where=where, hint="-o data.classes=N, or their names: -o 'data.classes=[a, b]'"
        )
    place = {label: names.index(name) for label, name in enumerate(index.classes) if name in names}
    kept = [s._replace(label=place.get(s.label, UNLABELLED) if s.split in ("val", "test") else UNLABELLED) for s in index.samples]
    found = replace(index, classes=names, samples=tuple(kept))
    return found if judged_by_labels(found) else replace(found, samples=tuple(s._replace(label=UNLABELLED) for s in kept))


def format_of(name: str) -> Format:
    """The format of that name, ready to use."""
    made: Format = registry.load("format", name)()
    return made


def root_of(cfg: DataConfig) -> Path:
    """`data.root` as a path; formats that need none get the current folder and do not look at it."""
    return Path(cfg.root or ".").expanduser()


def folder_of(cfg: DataConfig) -> Path:
    """The dataset's folder, or its manifest file. Raises FileMissing."""
    root = root_of(cfg)
    if cfg.root is None or not root.exists():
        what = "data folder not given" if cfg.root is None else "data folder not found"
        raise FileMissing(what, where=str(root), expected=f"a dataset in the format {cfg.format}", hint="give it with -o data.root=DIR")
    return root


def _check_ids(samples: Iterable[Sample], where: str) -> None:
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise DataRefused(
                f"the sample {sample.id!a} is listed twice", where=where, expected="each image once", hint="remove one of the two"
            )
        if not _is_text(sample.id):
            raise DataRefused(f"the file name {sample.id!a} is not UTF-8", where=where, expected="UTF-8 names", hint="rename the file")
        seen.add(sample.id)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # a byte that the file system could not decode
        return False
    return "\0" not in name
