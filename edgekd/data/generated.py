"""A DATA artifact without data: seeded images that a model computes something different for, from flat colours to noise."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from edgekd.data.config import SamplesConfig
from edgekd.data.dataset import IMAGES, INDEX, VERSION
from edgekd.data.rng import seed_of
from edgekd.safeio.files import resource_errors

_GRIDS = (2, 4, 8, 16, 32)  # cells of random colour along a side: photographs are smooth, noise alone gives every net one answer


def build(cfg: SamplesConfig, seed: int, out: Path) -> dict[str, Any]:
    """Writes the artifact into the folder `out` and returns its meta; all images are in val. Raises ResourceError."""
    import numpy as np

    images = np.stack([_image(cfg.image_size, _GRIDS[i % len(_GRIDS)], seed_of(seed, "samples", i)) for i in range(cfg.count)])
    with resource_errors(out / IMAGES, images.nbytes):
        np.save(out / IMAGES, images)
    columns = {
        "version": VERSION,
        "format": None,
        "labelled": False,
        **{n: getattr(cfg, n) for n in ("image_size", "resize", "interpolation")},
        "classes": [str(n) for n in range(cfg.classes)],
        "ids": [f"generated-{i}" for i in range(cfg.count)],
        "labels": [0] * cfg.count,
        "splits": ["val"] * cfg.count,
        "sizes": [0] * cfg.count,
        "sha256": [hashlib.sha256(image.tobytes()).hexdigest() for image in images],
        "skipped": {},
    }
    with resource_errors(out / INDEX):
        (out / INDEX).write_text(json.dumps(columns), encoding="utf-8")
    return {"fingerprint": f"{cfg.count} generated images, seed {seed}", "skipped": {}}


def _image(side: int, cells: int, seed: int) -> Any:
    """(side, side, 3) uint8: random colours on a grid, blurred into each other."""
    import numpy as np
    from PIL import Image

    small = np.random.default_rng(seed).integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((side, side), Image.Resampling.BILINEAR))
