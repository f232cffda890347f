"""scikit-learn's built-in handwritten digits: 1797 grey 8x8 images. Nothing to download.

Source: UCI Optical Recognition of Handwritten Digits, Alpaydin and Kaynak, 1998.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.data.config import DataConfig
from edgekd.data.index import Index, Sample
from edgekd.errors import DataRefused, FileMissing
from edgekd.registry import register

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE = 8
_WHITE = 16  # the file's pixels are 0..16


@register("format")
class Digits:
    """Ids are row numbers of scikit-learn's file, which is read without importing scikit-learn: that takes seconds."""

    def scan(self, cfg: DataConfig, *, cache_dir: Path | None = None) -> Index:
        """Needs no root. Raises FileMissing where scikit-learn is not installed."""
        rows = enumerate(_rows())
        return Index(tuple("0123456789"), tuple(Sample(f"{i:04d}", y, None, len(x), hashlib.sha256(x).hexdigest()) for i, (x, y) in rows))

    def read(self, root: Path, sample_id: str) -> bytes:
        """64 pixels of one image, 0..255."""
        return _rows()[int(sample_id)][0]

    def image(self, data: bytes, sample_id: str) -> Image:
        import PIL.Image  # not needed to plan

        return PIL.Image.frombytes("L", (_SIDE, _SIDE), data).convert("RGB")


@cache
def _rows() -> tuple[tuple[bytes, int], ...]:
    path = _file()
    try:
        lines = gzip.decompress(path.read_bytes()).decode("ascii").split()
        rows = [[int(v) for v in line.split(",")] for line in lines]
        return tuple((bytes(round(v * 255 / _WHITE) for v in row[: _SIDE * _SIDE]), row[_SIDE * _SIDE]) for row in rows)
    except (OSError, EOFError, ValueError, IndexError) as e:
        raise DataRefused("the digits file is damaged", where=str(path), expected="1797 rows", hint="install scikit-learn again") from e


def _file() -> Path:
    spec = importlib.util.find_spec("sklearn")
    places = [Path(p) / "datasets" / "data" / "digits.csv.gz" for p in (spec.submodule_search_locations or ())] if spec else []
    found = next((p for p in places if p.is_file()), None)
    if found is None:
        raise FileMissing(
            "scikit-learn's digits are not there", where="data.format digits", expected="scikit-learn", hint="pip install scikit-learn"
        )
    return found
