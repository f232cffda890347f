"""Codes and codebooks in a graph: each weight tensor becomes bit planes of indices, a table of points and the range of each bucket.

Every node is a standard one on constants, which a runtime computes once when it loads the file: it shrinks the file, not the memory and not the
latency. Weights are exactly those that were trained; where the exporter folded a batch norm, its factor a channel is one more constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edgekd.quantize._match import find_weights
from edgekd.quantize._quantizer import tidied

_BYTE = 8


def packed(proto: Any, arrays: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The graph with packed weights, and what that took; raises ParityBroken where the graph does not hold the trained weights."""
    import numpy as np

    layers = [n.removesuffix("/codes") for n in arrays if n.endswith("/codes")]
    books = {n: {part: arrays[f"{n}/{part}"] for part in ("codes", "points", "alpha", "beta", "shape")} for n in layers}
    places = find_weights(proto, {n: _values(b).astype(np.float64) for n, b in books.items()})
    stored, nodes = [], []
    for layer, book in books.items():
        place = places[layer]
        for tensor in [t for t in proto.graph.initializer if t.name == place.initializer]:
            proto.graph.initializer.remove(tensor)
        for value in [v for v in proto.graph.input if v.name == place.initializer]:  # some files list their weights among the inputs
            proto.graph.input.remove(value)
        parts = _parts(book, place.factor, place.transposed)
        stored += [(f"{place.initializer}.{name}", value) for name, value in parts.items()]
        nodes += list(_nodes(place.initializer, parts))
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


def _parts(book: Mapping[str, Any], factor: Any, transposed: bool) -> dict[str, Any]:
    import numpy as np

    width, codes = _width(book), book["codes"].astype(np.uint8)
    padded = np.pad(codes.reshape(-1), (0, -codes.size % _BYTE))
    planes = np.stack([np.packbits((padded >> k) & 1, bitorder="little") for k in range(width)])
    parts = {
        "planes": planes[:, :, None],  # (width, bytes, 1)
        "shifts": np.arange(_BYTE, dtype=np.uint8),
        "one": np.array(1, np.uint8),
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
    if transposed:
        parts["transposed"] = np.array(1)  # a flag for `_nodes`
    return parts


def _nodes(weight: str, parts: dict[str, Any]) -> Iterator[Any]:
    """Planes -> bits -> indices -> points -> buckets -> the weight under its own name."""
    from onnx import TensorProto, helper

    transposed = parts.pop("transposed", None) is not None
    last = [""]

    def node(op: str, *inputs: str, out: str = "", **attributes: Any) -> Any:
        name = out or f"{weight}.{op.lower()}{len(steps)}"
        steps.append(name)
        last[0] = name
        return helper.make_node(op, [i if i.startswith(weight) else f"{weight}.{i}" for i in inputs], [name], name, **attributes)

    steps: list[str] = []
    yield node("BitShift", "planes", "shifts", direction="RIGHT")
    yield node("BitwiseAnd", last[0], "one")
    yield node("Cast", last[0], to=TensorProto.INT32)
    yield node("Mul", last[0], "worth")
    yield node("ReduceSum", last[0], "axis", keepdims=0)
    yield node("Reshape", last[0], "row")
    yield node("Slice", last[0], "start", "codes_end")
    yield node("Reshape", last[0], "buckets")
    indices = last[0]
    yield node("Gather", "points", indices)
    yield node("Mul", last[0], "alpha")
    yield node("Add", last[0], "beta")
    yield node("Reshape", last[0], "row")
    yield node("Slice", last[0], "start", "values_end")
    ends = [("Reshape", "shape")] + ([("Mul", "factor")] if "factor" in parts else [])
    for number, (op, constant) in enumerate(ends, 1):
        yield node(op, last[0], constant, out="" if transposed or number < len(ends) else weight)
    if transposed:
        yield node("Transpose", last[0], out=weight, perm=[1, 0])


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
