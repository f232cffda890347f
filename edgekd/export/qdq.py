"""Rules that a quantized graph has to keep so that its runtime takes it, checked on the file alone.

Each rule is one that a runtime refuses or answers wrongly otherwise: TensorRT asserts that zero points are zero and takes no int32 bias
(TensorRT#2774, onnxruntime#14229); x86 without VNNI adds pairs of products in 16 bits, which 8-bit weights overflow. Sources: NVIDIA's guide to explicit
quantization, onnxruntime's quantization documentation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from edgekd.errors import BackendError
from edgekd.export.opset import NEWEST, QUANTIZES, opset_of

_NEWEST = {"s8s8": 25, "x8s8": NEWEST, "u8s8": NEWEST, "u8s8_reduced": NEWEST}  # what TensorRT 11 reads ends at 25
_WEIGHT_INPUT = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}
_LARGEST = {"s8s8": 127, "x8s8": 127, "u8s8": 127, "u8s8_reduced": 64}
_ACTIVATIONS = {"s8s8": ("int8",), "x8s8": ("int8", "uint8"), "u8s8": ("uint8",), "u8s8_reduced": ("uint8",)}
_CENTRED = ("s8s8", "x8s8")  # flavours whose zero points are all zero


def assert_rules(proto: Any, flavour: str, where: str, keep: Collection[str] = ()) -> None:
    """Raises BackendError with the first rule that is broken, and its node; those named in `keep` were left in fp32 on purpose."""
    for problem in problems(proto, flavour, keep):
        raise BackendError(
            f"the quantized graph is not one that the runtime takes: {problem}", where=where, hint="report it with the model's name"
        )


def problems(proto: Any, flavour: str, keep: Collection[str] = ()) -> Iterator[str]:
    """Every broken rule in words, with the node."""
    graph = _Values(proto)
    if not QUANTIZES <= (opset := opset_of(proto)) <= _NEWEST[flavour]:
        yield f"opset {opset} is outside {QUANTIZES} to {_NEWEST[flavour]}"
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            yield from (f"{node.op_type} '{node.name}': {what}" for what in _of_pair(graph, node, flavour))
        elif node.op_type in _WEIGHT_INPUT and node.name not in keep:  # a kept one may read what another one rounded
            yield from (f"{node.op_type} '{node.name}': {what}" for what in _of_weight(graph, node))


class _Values:
    """Constants by name, and who makes and reads a tensor."""

    def __init__(self, proto: Any):
        from onnx import numpy_helper

        self.constants = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
        self.makers = {name: node for node in proto.graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in proto.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def multiplies(self, name: str) -> bool:
        """Whether a tensor is the weight of an operator, itself or transposed."""
        return any(
            name in list(reader.input)[_WEIGHT_INPUT[reader.op_type] :]
            if reader.op_type in _WEIGHT_INPUT
            else self.multiplies(reader.output[0])
            for reader in self.readers.get(name, [])
            if reader.op_type in (*_WEIGHT_INPUT, "Transpose", "Reshape")
        )


def _of_pair(graph: _Values, node: Any, flavour: str) -> Iterator[str]:
    import numpy as np

    scale = graph.constants.get(node.input[1])
    zero = graph.constants.get(node.input[2]) if len(node.input) > 2 else None
    if scale is None or not (np.isfinite(scale) & (scale > 0)).all():
        yield "its scale is not a positive constant"
    if zero is None:
        yield "it has no constant zero point, so its type is left open"
        return
    weight = graph.constants.get(node.input[0])
    if weight is not None and weight.dtype == np.int32:
        if flavour == "s8s8":
            yield "an int32 bias is dequantized"
        return
    multiplied = weight is not None and graph.multiplies(node.output[0])  # other constants are rounded as what they are added to
    expected = ("int8",) if multiplied else _ACTIVATIONS[flavour]
    if str(zero.dtype) not in expected:
        yield f"its values are {zero.dtype}, expected {' or '.join(expected)}"
    if (flavour in _CENTRED or multiplied) and np.any(zero != 0):
        yield "its zero point is not zero"
    if weight is not None and multiplied and weight.dtype == np.int8:
        most = int(np.abs(weight.astype(np.int32)).max(initial=0))
        if most > _LARGEST[flavour]:
            yield f"a weight is {most}, the largest allowed is {_LARGEST[flavour]}"
    if node.op_type == "QuantizeLinear" and any(r.op_type != "DequantizeLinear" for r in graph.readers.get(node.output[0], [])):
        yield "its output is read by something other than DequantizeLinear"


def _of_weight(graph: _Values, node: Any) -> Iterator[str]:
    """A rounded input needs rounded weights, with one scale for all or one an output channel."""
    pair = graph.makers.get(node.input[_WEIGHT_INPUT[node.op_type]])
    data = graph.makers.get(node.input[0])
    if pair is None or pair.op_type != "DequantizeLinear" or pair.input[0] not in graph.constants:
        if data is not None and data.op_type == "DequantizeLinear" and node.input[1] in graph.constants:
            yield "its input is rounded and its weights are not"
        return
    scale = graph.constants.get(pair.input[1])
    if scale is None or scale.size == 1:
        return
    attributes = {a.name: a for a in node.attribute}
    axis = next((a.i for a in pair.attribute if a.name == "axis"), 1)
    rank = graph.constants[pair.input[0]].ndim
    transposed = node.op_type == "Gemm" and "transB" in attributes and attributes["transB"].i == 1
    wanted = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0 if transposed else 1, "MatMul": rank - 1}[node.op_type]
    if axis % rank != wanted:
        yield f"its weights have scales along axis {axis}, output channels lie along {wanted}"
