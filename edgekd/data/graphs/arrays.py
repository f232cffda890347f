"""Plain arrays, .npz or .safetensors: `x` (nodes, features), `edge_index` (2, edges), `y` (nodes,), and, where they are known, masks and times.

Other names that are understood: features, labels; train_mask, val_mask and test_mask as masks or positions; time; classes as text (.npz).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.data.nodes_config import GraphConfig
from edgekd.errors import DataRefused
from edgekd.registry import register

if TYPE_CHECKING:
    from edgekd.data.nodes import Raw

_EXPECTED = "x (nodes, features), edge_index (2, edges) and y (nodes,)"
_MAX_BYTES, _MAX_ARRAYS = 16 << 30, 16
_OTHER_NAMES = {"features": "x", "labels": "y", "edges": "edge_index", "times": "time"}


@register("graph")
class Arrays:
    """`data.root` is the file, or a folder with `NAME` or `graph`."""

    def files(self, cfg: GraphConfig) -> dict[str, Path]:
        from edgekd.data.graphs._files import one_of

        return {"graph": one_of(cfg, (cfg.name or "graph",), (".npz", ".safetensors"))}

    def read(self, cfg: GraphConfig) -> Raw:
        import numpy as np

        from edgekd.data.nodes import PARTS, UNLABELLED, Raw, masks

        path = self.files(cfg)["graph"]
        found = {_OTHER_NAMES.get(n, n): a for n, a in _read(path).items()}
        if not cfg.labelled:
            found["y"] = np.full(len(found.get("x", ())), UNLABELLED)
        if lost := [n for n in ("x", "edge_index", "y") if n not in found]:
            raise DataRefused(f"it has no {lost[0]}; it holds {', '.join(sorted(found)[:8])}", where=str(path), expected=_EXPECTED)
        x, edges, y = found["x"], found["edge_index"], found["y"]
        if x.ndim != 2 or x.dtype.kind not in "fiub" or edges.ndim != 2 or edges.shape[0] != 2 or edges.dtype.kind not in "iu":
            raise DataRefused(
                f"x is {x.dtype}{list(x.shape)}, edge_index {edges.dtype}{list(edges.shape)}", where=str(path), expected=_EXPECTED
            )
        if y.shape != (len(x),) or y.dtype.kind not in "iu":
            raise DataRefused(f"y is {y.dtype}{list(y.shape)}", where=str(path), expected=f"whole numbers ({len(x)},)")
        names = found.get("classes")
        classes = tuple(map(str, names.tolist())) if names is not None else tuple(map(str, range(int(y.max(initial=-1)) + 1)))
        parts = masks(found, len(x), str(path)) if any(n in found or f"{n}_mask" in found for n in PARTS) else None
        times = found.get("time")
        return Raw(
            x.astype(np.float32),
            edges.astype(np.int64),
            y.astype(np.int64),
            classes,
            str(path),
            parts=parts,
            times=None if times is None else times.astype(np.float64),
        )


def _read(path: Path) -> dict[str, Any]:
    from edgekd.safeio.arrays import read_arrays, read_safetensors

    if path.suffix == ".npz":
        return read_arrays(path, DataRefused, expected=_EXPECTED, max_bytes=_MAX_BYTES, max_arrays=_MAX_ARRAYS)
    return read_safetensors(path, DataRefused, expected=_EXPECTED)
