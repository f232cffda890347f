"""Codes and codebooks in a graph: each weight tensor becomes bit planes of indices, a table of points and the range of each bucket.

Every node is a standard one on constants, which a runtime computes once when it loads the file: it shrinks the file, not the memory and not the
latency. Weights are exactly those that were trained; where the exporter folded a batch norm, its factor a channel is one more constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.quantize._learned import load_grid
from edgekd.quantize._match import find_weights
from edgekd.quantize._quantizer import take_out, tidied

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

_BYTE = 8


class Codebook:
    """What `qd` and `dq` share: how trained weights of a few values are baked and stored."""

    level = "model"
    precision = "codebook"
    needs = "fp32"

    def __init__(self, config: Any):
        self.config = config

    def bake(self, model: nn.Module) -> dict[str, Any]:
        from edgekd.quantize._buckets import codebooks

        return codebooks(model)

    def quantize(
        self, graph: Path, out: Path, samples: Iterator[NDArray[np.float32]], flavour: str, *, grid: Path | None = None
    ) -> dict[str, Any]:
        """Writes the graph with indices and tables instead of weights; says how many bits a weight takes."""
        import onnx

        proto, facts = packed(onnx.load_model_from_string(graph.read_bytes()), load_grid(grid) if grid is not None else {})
        out.write_bytes(proto.SerializeToString(deterministic=True))
        return facts | {"flavour": flavour}


def packed(proto: Any, arrays: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The graph with packed weights, and what that took; raises ParityBroken where the graph does not hold the trained weights."""
    import numpy as np

    layers = [n.removesuffix("/codes") for n in arrays if n.endswith("/codes")]
    books = {n: {part: arrays[f"{n}/{part}"] for part in ("codes", "points", "alpha", "beta", "shape")} for n in layers}
    places = find_weights(proto, {n: _values(b).astype(np.float64) for n, b in books.items()})
    stored, nodes = [], []
    for layer, book in books.items():
        place = places[layer]
        take_out(proto.graph, place.initializer)
        parts = _parts(book, place.factor)
        stored += [(f"{place.initializer}.{name}", value) for name, value in parts.items()]
        nodes += list(_nodes(place.initializer, parts, transposed=place.transposed))
    from onnx import numpy_helper

    proto.graph.initializer.extend(numpy_helper.from_array(np.ascontiguousarray(v), n) for n, v in stored)
    before = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes, *before])
    bits = {n: _width(b) for n, b in books.items()}
    count = sum(b["codes"].size for b in books.values())
    return tidied(proto), {
        "tensors": len(books),
        "stored_bits": sum(bits[n] * b["codes"].size for n, b in books.items()) / max(count, 1),
        "huffman_bits": sum(_huffman(b["codes"]) * b["codes"].size for b in books.values()) / max(count, 1),
    }


def _values(book: Mapping[str, Any]) -> Any:
    flat = (book["alpha"] * book["points"][book["codes"]] + book["beta"]).reshape(-1)
    return flat[: int(book["shape"].prod())].reshape(book["shape"])


def _width(book: Mapping[str, Any]) -> int:
    """Bits of an index."""
    return max(1, int(len(book["points"]) - 1).bit_length())


def _parts(book: Mapping[str, Any], factor: Any) -> dict[str, Any]:
    import numpy as np

    width, codes = _width(book), book["codes"].astype(np.uint8)
    padded = np.pad(codes.reshape(-1), (0, -codes.size % _BYTE))
    planes = np.stack([np.packbits((padded >> k) & 1, bitorder="little") for k in range(width)])
    parts = {
        "planes": planes[:, :, None],  # (width, bytes, 1)
        "powers": 1 << np.arange(_BYTE, dtype=np.int32),
        "two": np.array(2, np.int32),
        "worth": (1 << np.arange(width, dtype=np.int32))[:, None, None],
        "axis": np.array([0], np.int64),
        "row": np.array([-1], np.int64),
        "start": np.array([0], np.int64),
        "codes_end": np.array([codes.size], np.int64),
        "buckets": np.array(codes.shape, np.int64),
        "points": book["points"].astype(np.float32),
        "alpha": book["alpha"].astype(np.float32),
        "beta": book["beta"].astype(np.float32),
        "values_end": np.array([int(book["shape"].prod())], np.int64),
        "shape": book["shape"],
    }
    if not np.allclose(factor, 1, rtol=0, atol=1e-7):
        parts["factor"] = factor.astype(np.float32).reshape(-1, *[1] * (len(book["shape"]) - 1))
    return parts


def _nodes(weight: str, parts: Mapping[str, Any], *, transposed: bool) -> Iterator[Any]:
    """Planes -> bits -> indices -> points -> buckets -> the weight under its own name."""
    from onnx import TensorProto, helper

    steps = [""]  # outputs so far; the last one is what the next node takes

    def node(op: str, *inputs: str, out: str = "", **attributes: Any) -> Any:
        name = out or f"{weight}.{op.lower()}{len(steps) - 1}"
        steps.append(name)
        return helper.make_node(op, [i if i.startswith(weight) else f"{weight}.{i}" for i in inputs], [name], name, **attributes)

    # Bits by division and remainder: OpenVINO 2026.4 folds neither shifts nor bitwise operators, unpacks at every inference then, and feeds a matrix product
    # with weights that are not there yet.
    yield node("Cast", "planes", to=TensorProto.INT32)
    yield node("Div", steps[-1], "powers")
    yield node("Mod", steps[-1], "two")
    yield node("Mul", steps[-1], "worth")
    yield node("ReduceSum", steps[-1], "axis", keepdims=0)
    yield node("Reshape", steps[-1], "row")
    yield node("Slice", steps[-1], "start", "codes_end")
    yield node("Reshape", steps[-1], "buckets")
    yield node("Gather", "points", steps[-1])
    yield node("Mul", steps[-1], "alpha")
    yield node("Add", steps[-1], "beta")
    yield node("Reshape", steps[-1], "row")
    yield node("Slice", steps[-1], "start", "values_end")
    ends = [("Reshape", "shape")] + ([("Mul", "factor")] if "factor" in parts else [])
    for number, (op, constant) in enumerate(ends, 1):
        yield node(op, steps[-1], constant, out="" if transposed or number < len(ends) else weight)
    if transposed:
        yield node("Transpose", steps[-1], out=weight, perm=[1, 0])


def _huffman(codes: Any) -> float:
    """Mean length in bits of a Huffman code of the indices: how far an entropy coder could still go."""
    import heapq

    import numpy as np

    counts = [int(c) for c in np.unique(codes, return_counts=True)[1]]
    total, length = sum(counts), 0
    if len(counts) < 2:
        return 1.0
    heapq.heapify(counts)
    while len(counts) > 1:
        joined = heapq.heappop(counts) + heapq.heappop(counts)
        length += joined
        heapq.heappush(counts, joined)
    return length / total
