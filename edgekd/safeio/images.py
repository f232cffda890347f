"""Images from outside: four formats, a cap on pixels before anything is decoded, and a refusal that names the file."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.errors import FileMissing, ImageRefused
from edgekd.safeio.files import resource_errors

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_MAX_PIXELS, _MAX_FILE_BYTES = 64 * 10**6, 256 * 2**20
_DEEP_MODES = ("I", "F")  # convert("RGB") would silently clip 16-bit samples to white


def decode(source: Path | bytes, name: str) -> PilImage:
    """An RGB image; alpha is dropped, EXIF orientation is not applied. Raises FileMissing and ImageRefused, which name `name`."""
    from PIL import Image, UnidentifiedImageError  # heavy

    data = source if isinstance(source, bytes) else _read(source, name)
    expected = "a whole JPEG, PNG, WEBP or BMP image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check(image.size, image.mode)
                return image.convert("RGB")
    except ImageRefused as e:
        raise ImageRefused(e.what, where=name, expected=e.expected, hint="convert or remove this image") from e
    except UnidentifiedImageError as e:  # its own text names a Python object
        raise ImageRefused("not an image of a known format", where=name, expected=expected, hint="convert or remove this image") from e
    except Exception as e:  # decoders raise anything on damaged bytes: SyntaxError, struct.error, zlib.error, ...
        reason = ascii(" ".join(str(e).split())[:200] or type(e).__name__)[1:-1]
        raise ImageRefused(f"cannot be decoded: {reason}", where=name, expected=expected, hint="repair or remove this image") from e


def _check(size: tuple[int, int], mode: str) -> None:
    if size[0] * size[1] > _MAX_PIXELS:
        raise ImageRefused(f"it has {size[0]} x {size[1]} pixels", expected=f"at most {_MAX_PIXELS} pixels")
    if mode.startswith(_DEEP_MODES):
        raise ImageRefused(f"its samples are wider than 8 bits (mode {mode})", expected="8-bit samples")


def _read(path: Path, name: str) -> bytes:
    if not path.is_file():
        raise FileMissing("no such image", where=name, hint="correct the path")
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise ImageRefused("the file is too large", where=name, expected=f"at most {_MAX_FILE_BYTES} bytes", hint="remove this image")
    with resource_errors(path):
        return path.read_bytes()
