"""Samples as a deployed model takes them: numpy only, the same steps as predict.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def normalised(pixels: NDArray[Any], facts: Mapping[str, Any]) -> NDArray[np.float32]:
    """(batch, h, w, 3) uint8 -> (batch, 3, h, w) float32: pixel / 255, minus mean, over std; brought to the model's own size, where it has one.

    Rows of features (batch, features) are taken as they are kept.
    """
    import numpy as np

    if "features" in facts:
        return np.ascontiguousarray(pixels, np.float32)
    size = facts.get("image_size", pixels.shape[1])
    if pixels.shape[1] != size:
        from PIL import Image

        from edgekd.data.preprocess import preprocess

        pixels = np.stack([preprocess(Image.fromarray(p), size, "squash", "bilinear") for p in pixels])
    mean, std = np.asarray(facts["mean"], np.float32), np.asarray(facts["std"], np.float32)
    x = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def raw_name(facts: Mapping[str, Any]) -> str:
    """What a bundle calls its sample inputs."""
    return "rows" if "features" in facts else "pixels"


def stored_inputs(stored: Mapping[str, Any], facts: Mapping[str, Any]) -> NDArray[np.float32]:
    """The sample inputs of a bundle, by its preprocessing."""
    return normalised(stored[raw_name(facts)], facts)
