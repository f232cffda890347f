"""One image to the uint8 square that a model sees. Pillow and numpy only: bundles carry this same code to the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image

# What a bundle says about the steps between a file and the model's input, beside the four settings of `describe`.
PREPROCESS: dict[str, Any] = {
    "version": 1,
    "decoder": "Pillow",
    "formats": ["JPEG", "PNG", "WEBP", "BMP"],
    "mode": "RGB",
    "exif_orientation": "ignored",
    "dtype": "uint8",
    "layout": "HWC",
    "scale": 255,  # the model's input is pixel / scale, then (x - mean) / std
}


def preprocess(image: Image, size: int, resize: str, interpolation: str) -> npt.NDArray[np.uint8]:
    """RGB image -> (size, size, 3) uint8. `crop` takes the centre square of the source, `squash` all of it; both antialias."""
    import numpy as np  # here, as the CLI reads PREPROCESS without numpy
    import PIL.Image

    width, height = image.size
    side = min(width, height)
    left, top = ((width - side) / 2, (height - side) / 2) if resize == "crop" else (0, 0)
    box = (left, top, left + side, top + side) if resize == "crop" else (0, 0, width, height)
    method = {"bilinear": PIL.Image.Resampling.BILINEAR, "bicubic": PIL.Image.Resampling.BICUBIC}[interpolation]
    return np.asarray(image.resize((size, size), method, box=box), dtype=np.uint8)


def describe(size: int, resize: str, interpolation: str) -> dict[str, Any]:
    """PREPROCESS with the settings of one dataset; JSON."""
    return {**PREPROCESS, "image_size": size, "resize": resize, "interpolation": interpolation}
