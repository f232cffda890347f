"""One .npz with the adjacency and the features by rows: `adj_indptr`, `adj_indices`, `x_indptr`, `x_indices`[, `x_data`], `y`.

Also under the names of Shchur's gnn-benchmark (Pitfalls of Graph Neural Network Evaluation, 2018): `attr_*`, `labels`. Published tables take the features raw.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.data.nodes_config import GraphConfig
from edgekd.errors import DataRefused
from edgekd.registry import register

if TYPE_CHECKING:
    from edgekd.data.nodes import Raw

_EXPECTED = "adj_indptr, adj_indices, x_indptr, x_indices and y"
_MAX_BYTES, _MAX_ARRAYS = 8 << 30, 32


@register("graph")
class CsrNpz:
    """`data.root` is the file, or a folder with `NAME.npz`, or with one .npz only."""

    def files(self, cfg: GraphConfig) -> dict[str, Path]:
        from edgekd.data.graphs._files import one_of, root_of

        root = root_of(cfg)
        stems = (cfg.name,) if cfg.name else tuple(sorted(p.stem for p in root.glob("*.npz"))) if root.is_dir() else ("graph",)
        return {"graph": one_of(cfg, stems or ("graph",), (".npz",))}

    def read(self, cfg: GraphConfig) -> Raw:
        import numpy as np

        from edgekd.data.nodes import Raw
        from edgekd.safeio.arrays import Csr, read_arrays

        path = self.files(cfg)["graph"]
        found = read_arrays(path, DataRefused, expected=_EXPECTED, max_bytes=_MAX_BYTES, max_arrays=_MAX_ARRAYS)
        found = {n.replace("attr_", "x_"): a for n, a in found.items()}
        labels = found.get("y", found.get("labels"))
        if lost := [n for n in ("adj_indptr", "adj_indices", "x_indptr", "x_indices") if n not in found]:
            raise DataRefused(f"it has no {lost[0]}; it holds {', '.join(sorted(found)[:8])}", where=str(path), expected=_EXPECTED)
        if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise DataRefused("it has no labels that are whole numbers", where=str(path), expected="y (nodes,)")
        try:
            nodes, width = len(labels), _width(found)
            values = found.get("x_data", np.ones(len(found["x_indices"]), np.float32))
            features = Csr.checked((nodes, width), found["x_indptr"], found["x_indices"], values)
            adjacency = Csr.checked((nodes, nodes), found["adj_indptr"], found["adj_indices"], np.ones(len(found["adj_indices"])))
        except ValueError as error:
            raise DataRefused(f"it holds {error}", where=str(path), expected=_EXPECTED) from error
        start = np.repeat(np.arange(nodes), np.diff(adjacency.indptr))
        classes = tuple(map(str, range(int(labels.max(initial=-1)) + 1)))
        return Raw(features, np.stack([start, adjacency.indices]), labels.astype(np.int64), classes, str(path))


def _width(found: Mapping[str, object]) -> int:
    """How many features there are: as the file says, else up to the last that is not 0."""
    import numpy as np

    nodes = len(np.asarray(found["x_indptr"])) - 1
    for name in ("x_shape", "shape"):
        shape = np.asarray(found.get(name, ()))
        if shape.shape == (2,) and (name == "x_shape" or shape[1] != nodes):  # a square one is the adjacency's
            return int(shape[1])
    indices = np.asarray(found["x_indices"])
    return int(indices.max(initial=-1)) + 1
