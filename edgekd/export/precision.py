"""The precision of an ONNX graph, as it stands in the graph: what limits and tolerances go by."""

from __future__ import annotations

from typing import Any


def precision_of(proto: Any) -> str:
    """fp32, fp16, int8, int8_weights or codebook."""
    if any(n.op_type == "DequantizeLinear" for n in proto.graph.node):
        return "int8"
    if any(t.data_type == t.INT8 and len(t.dims) == 2 for t in proto.graph.initializer):
        return "int8_weights"
    if any(t.name.endswith(".planes") and t.data_type == t.UINT8 for t in proto.graph.initializer):
        return "codebook"
    return "fp16" if any(t.data_type == t.FLOAT16 for t in proto.graph.initializer) else "fp32"
