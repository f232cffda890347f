"""Where the weights of a layer went in an exported graph: their initializer, its orientation, and what a folded batch norm multiplied each channel by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgekd.errors import ParityBroken

_EXACT = 1e-5  # of the largest weight: folding rounds once


@dataclass(frozen=True)
class Place:
    """One layer's weights in a graph."""

    initializer: str
    transposed: bool  # (in, out) instead of (out, in, ...)
    factor: Any  # float64 (out,): the initializer is factor * weights

    @property
    def axis(self) -> int:
        return 1 if self.transposed else 0


def find_weights(proto: Any, weights: Mapping[str, Any]) -> dict[str, Place]:
    """The place of each layer's weights (out, in, ...); raises ParityBroken for a layer that the graph does not hold."""
    from onnx import TensorProto, numpy_helper

    floats = {t.name: t for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) >= 2}
    places = {}
    for layer, values in weights.items():
        named = [n for n in (f"{layer}.weight",) if n in floats]
        found = None
        for name in (*named, *floats):  # its own name first; a linear layer's may be lost when it is transposed
            for transposed in (False, True):
                shape = values.T.shape if transposed else values.shape
                if tuple(floats[name].dims) != shape or (transposed and values.ndim != 2):
                    continue
                stored = numpy_helper.to_array(floats[name])
                factor = _factor(values, stored.T if transposed else stored)
                if factor is not None:
                    found = Place(name, transposed, factor)
                    break
            if found:
                break
        if found is None:
            raise ParityBroken(
                f"the exported graph does not hold the quantized weights of '{layer}'", expected="an initializer on their grid"
            )
        del floats[found.initializer]  # two layers may hold equal weights
        places[layer] = found
    return places


def _factor(values: Any, stored: Any) -> Any:
    """What each channel of `values` was multiplied by to give `stored`, or None where nothing does."""
    import numpy as np

    a, b = values.reshape(len(values), -1).astype(np.float64), stored.reshape(len(values), -1).astype(np.float64)
    own = (a * a).sum(1)
    factor = np.divide((a * b).sum(1), own, out=np.ones(len(a)), where=own > 0)
    largest = max(float(np.abs(b).max()), 1e-30)
    return factor if float(np.abs(factor[:, None] * a - b).max()) <= _EXACT * largest else None
