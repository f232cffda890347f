"""The DATA artifact: `build` writes index.json and, where they fit, decoded pixels; `Dataset` reads them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from edgekd.data.config import DataConfig
from edgekd.data.decode import Decoder
from edgekd.data.index import PARTS, UNLABELLED, Index, Sample, format_of, root_of, scan
from edgekd.data.splits import assign, check, shared_contents
from edgekd.errors import DataRefused, ImageRefused
from edgekd.safeio.files import resource_errors

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

INDEX, IMAGES = "index.json", "images.npy"
CACHE_LIMIT_BYTES = 4 * 2**30
VERSION = 1


def build(cfg: DataConfig, seed: int, out: Path, *, cache_dir: Path | None = None, limit_bytes: int = CACHE_LIMIT_BYTES) -> dict[str, Any]:
    """Writes the artifact into the folder `out` and returns its meta. Every image is decoded once, kept or not: a bad one stops here.

    Raises DataRefused (unusable, or changed since it was indexed), FileMissing, ImageRefused (on_bad_image: fail), ResourceError.
    """
    index = scan(cfg, cache_dir=cache_dir)
    samples = assign(index, cfg, seed)
    keep = cfg.cache == "on" or (cfg.cache == "auto" and len(samples) * 3 * cfg.image_size**2 <= limit_bytes)
    kept, skipped = _decode(cfg, samples, out / IMAGES if keep else None)
    if skipped:
        check(kept, index.classes, str(root_of(cfg)))
    with resource_errors(out / INDEX):
        (out / INDEX).write_text(json.dumps(_columns(cfg, index, kept, skipped)), encoding="utf-8")
    return _meta(index, kept, skipped, pixels_kept=keep)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples of a DATA artifact by position 0..n-1. Pixels come from images.npy, or are decoded and verified on each read."""

    classes: tuple[str, ...]
    ids: tuple[str, ...]
    labels: npt.NDArray[np.int64]  # (n,)
    image_size: int
    cached: bool
    _parts: npt.NDArray[np.int8]  # (n,), position in PARTS
    _source: npt.NDArray[np.uint8] | _Source
    labelled: bool = True  # False: labels mean nothing, for the images are generated, or no teacher has decided on them yet

    @classmethod
    def open(cls, path: Path, root: Path | None = None, *, workers: int = 0) -> Dataset:
        """path: the artifact's folder; root: `data.root`, read only where pixels are not kept. Raises DataRefused."""
        import numpy as np  # plan reads data configs without numpy

        raw = json.loads((path / INDEX).read_text(encoding="utf-8"))
        if raw["version"] != VERSION:
            raise DataRefused(f"the dataset has version {raw['version']}", where=str(path), expected=str(VERSION), hint="build it again")
        parts = np.asarray([PARTS.index(p) for p in raw["splits"]], dtype=np.int8)
        source = _pixels(path / IMAGES, raw) if (path / IMAGES).exists() else _Source.of(raw, root, workers)
        labels = np.asarray(raw["labels"], dtype=np.int64).clip(0)  # without a label: of the first class, and `labelled` is False
        cached = not isinstance(source, _Source)
        return cls(
            tuple(raw["classes"]), tuple(raw["ids"]), labels, int(raw["image_size"]), cached, parts, source, bool(raw.get("labelled", True))
        )

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, name: str) -> npt.NDArray[np.int64]:
        """Positions of the samples of train, val or test, ascending."""
        import numpy as np

        return np.flatnonzero(self._parts == PARTS.index(name)).astype(np.int64)

    def samples(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """What `normalised` makes inputs of."""
        return self.images(positions)

    def images(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """(len(positions), size, size, 3) in the order asked for; a copy. Raises DataRefused where a file changed."""
        import numpy as np

        if isinstance(self._source, _Source):
            pixels = list(self._source.decoder.many([self._source.sample(int(p)) for p in positions]))
            return np.stack(pixels) if pixels else np.empty((0, self.image_size, self.image_size, 3), np.uint8)
        return np.asarray(self._source[positions])


@dataclass(frozen=True)
class _Source:
    """Where pixels come from when they are not kept."""

    decoder: Decoder
    rows: dict[str, list[Any]]

    @classmethod
    def of(cls, raw: dict[str, Any], root: Path | None, workers: int) -> _Source:
        how = (int(raw["image_size"]), str(raw["resize"]), str(raw["interpolation"]))
        decoder = Decoder(format_of(raw["format"]), (root or Path()).expanduser(), how, workers=workers)
        return cls(decoder, {name: raw[name] for name in ("ids", "sizes", "sha256")})

    def sample(self, position: int) -> Sample:
        return Sample(self.rows["ids"][position], 0, None, self.rows["sizes"][position], self.rows["sha256"][position])


def _decode(cfg: DataConfig, samples: Sequence[Sample], images: Path | None) -> tuple[tuple[Sample, ...], dict[str, str]]:
    """The samples that decode, and id -> reason of those skipped; their pixels are streamed to `images`."""
    decoder = Decoder(format_of(cfg.format), root_of(cfg), (cfg.image_size, cfg.resize, cfg.interpolation), workers=cfg.workers)
    if images is None:
        return _take(cfg, samples, decoder, None)
    with resource_errors(images, len(samples) * 3 * cfg.image_size**2), images.open("xb") as f:
        _write_header(f, len(samples), cfg.image_size)
        kept, skipped = _take(cfg, samples, decoder, f)
        f.seek(0)
        _write_header(f, len(kept), cfg.image_size)  # the same length: numpy pads it for a first axis of any size
    return kept, skipped


def _take(cfg: DataConfig, samples: Sequence[Sample], decoder: Decoder, sink: BinaryIO | None) -> tuple[tuple[Sample, ...], dict[str, str]]:
    kept: list[Sample] = []
    skipped: dict[str, str] = {}
    for sample, pixels in zip(samples, decoder.attempts(samples), strict=True):
        if isinstance(pixels, ImageRefused):
            skipped[sample.id] = pixels.what
            _judge(cfg, pixels, skipped, len(samples))
            continue
        kept.append(sample)
        if sink:
            sink.write(pixels.data)
    return tuple(kept), skipped


def _judge(cfg: DataConfig, refusal: ImageRefused, skipped: dict[str, str], total: int) -> None:
    """Lets a bad image pass if the recipe allows it."""
    *_, last = skipped
    if cfg.on_bad_image == "fail":
        where = str(root_of(cfg) / last)
        hint = "replace or remove it, or leave it out: -o data.on_bad_image=skip"
        raise ImageRefused(refusal.what, where=where, expected=refusal.expected, hint=hint) from refusal
    if len(skipped) > cfg.max_bad * total:
        what = f"{len(skipped)} of {total} images do not decode, the latest {last}: {refusal.what}"
        expected = f"at most {cfg.max_bad:.2%} bad images"
        raise DataRefused(
            what, where=str(root_of(cfg)), expected=expected, hint="check the dataset, or raise -o data.max_bad=FRACTION"
        ) from refusal


def _write_header(f: BinaryIO, count: int, size: int) -> None:
    import numpy as np

    np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)})


def _pixels(path: Path, raw: dict[str, Any]) -> npt.NDArray[np.uint8]:
    import numpy as np

    pixels: npt.NDArray[np.uint8] = np.load(path, mmap_mode="r")
    expected = (len(raw["ids"]), raw["image_size"], raw["image_size"], 3)
    if pixels.shape != expected or pixels.dtype != np.uint8:
        what = f"the pixels are {pixels.dtype} {pixels.shape}"
        raise DataRefused(what, where=str(path), expected=f"uint8 {expected}", hint="edgekd store verify")
    return pixels


def _columns(cfg: DataConfig, index: Index, samples: Iterable[Sample], skipped: dict[str, str]) -> dict[str, Any]:
    ids, labels, splits, sizes, sha256 = zip(*samples, strict=True)
    settings = {"format": cfg.format, "image_size": cfg.image_size, "resize": cfg.resize, "interpolation": cfg.interpolation}
    columns = {"ids": ids, "labels": labels, "splits": splits, "sizes": sizes, "sha256": sha256}
    labelled = {"labelled": False} if UNLABELLED in labels else {}
    return {"version": VERSION, **settings, "classes": index.classes, **columns, "skipped": skipped} | labelled


def _meta(index: Index, samples: Sequence[Sample], skipped: dict[str, str], *, pixels_kept: bool) -> dict[str, Any]:
    parts = Counter(s.split for s in samples)
    return {
        "classes": list(index.classes),
        "samples": {part: parts[part] for part in PARTS},
        "fingerprint": index.fingerprint,
        "skipped": skipped,
        "ignored": index.ignored,
        "shared_images": shared_contents(samples),
        "pixels_kept": pixels_kept,
    }
