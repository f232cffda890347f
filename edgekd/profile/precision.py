"""In which precision a graph computes or stores its weights, read from its nodes: a file from outside says it nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd.errors import OnnxRefused

if TYPE_CHECKING:
    from onnx import ModelProto

COARSEST_FIRST = ("int8", "int8_weights", "fp16", "codebook", "fp32")
_INT8_OPS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulIntegerToFloat", "MatMulNBits", "GatherBlockQuantized")
_INT8_PREFIXES = ("QLinear", "QOrdered", "QGemm", "QAttention", "QMoE", "DynamicQuantize")  # of onnxruntime's own operators, most of them
_HALF = (10, 16)  # onnx.TensorProto.FLOAT16, BFLOAT16; onnx itself is imported late
_INT8, _UINT8 = 3, 2


@dataclass(frozen=True)
class Rounded:
    """A node that computes in, or reads, fewer bits than fp32."""

    node: str
    op: str
    precision: str


def precision_of(proto: ModelProto) -> str:
    """The coarsest precision of any node; fp32 where none is rounded."""
    return min((r.precision for r in rounded_nodes(proto)), key=COARSEST_FIRST.index, default="fp32")


def assert_fp32(proto: ModelProto, where: str) -> None:
    """Raises OnnxRefused with the first node of a graph that is quantized or cast already: rounding twice loses accuracy for nothing."""
    if (first := next(rounded_nodes(proto), None)) is not None:
        raise OnnxRefused(
            f"it is quantized already: node '{first.node}' is a {first.op} in {first.precision}",
            where=where,
            expected="a graph in fp32",
            hint="start from the fp32 file that it was made of; to measure it as it is: edgekd profile MODEL.onnx",
        )


def rounded_nodes(proto: ModelProto) -> Iterator[Rounded]:
    """The nodes in order, those of branches, loops and functions too."""
    for body in (proto.graph, *proto.functions):
        yield from _in_body(body, {})


def _in_body(body: Any, outer: dict[str, str]) -> Iterator[Rounded]:
    stored = outer | {t.name: found for t in getattr(body, "initializer", ()) if (found := _stored(t))}
    for node in body.node:
        precision = _computed(node) or next((stored[name] for name in node.input if name in stored), None)
        if precision is not None:
            yield Rounded(node.name or next(iter(node.output), ""), node.op_type, precision)
        for attribute in node.attribute:
            for inside in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _in_body(inside, stored)


def _stored(tensor: Any) -> str | None:
    """What a constant says of the node that reads it; bytes count only in the forms in which edgekd packs weights."""
    if tensor.data_type in _HALF:
        return "fp16"
    if tensor.data_type == _INT8 and len(tensor.dims) == 2:
        return "int8_weights"
    return "codebook" if tensor.data_type == _UINT8 and tensor.name.endswith(".planes") else None


def _computed(node: Any) -> str | None:
    """What a node's own operator or type says."""
    if node.op_type in _INT8_OPS or node.op_type.endswith("Integer") or node.op_type.startswith(_INT8_PREFIXES):
        return "int8"
    half = any((a.name == "to" and a.i in _HALF) or (a.HasField("t") and a.t.data_type in _HALF) for a in node.attribute)
    return "fp16" if half else None
