"""What an ONNX graph asks of hardware: fused operators with their operations and bytes.

Fusion is what every runtime here does: pointwise operators and quantizers join the kernel that made their input, reshapes and dequantizers
cost nothing, and a dequantized tensor counts with the bytes it is stored in. So an int8 graph is seen as int8 kernels.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from edgekd.errors import OnnxRefused, UsageError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

OpClass = Literal["gemm", "conv3x3", "conv1x1", "depthwise", "attention", "eltwise"]
Precision = Literal["fp32", "fp16", "int8"]

_FREE = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Dropout", "DequantizeLinear", "Constant", "Shape"}
_CONVS = {"Conv", "ConvInteger", "QLinearConv", "ConvTranspose"}
_PRODUCTS = {"Gemm", "MatMul", "MatMulInteger", "QLinearMatMul"}
_CHEAP = {
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Neg",
    "Abs",
    "Min",
    "Max",
    "Relu",
    "Clip",
    "LeakyRelu",
    "PRelu",
    "HardSwish",
    "HardSigmoid",
    "Where",
    "Cast",
    "Sqrt",
    "Reciprocal",
    "BatchNormalization",
    "QuantizeLinear",
    "Greater",
    "Less",
    "Equal",
    "And",
    "Or",
    "Not",
    "Floor",
    "Round",
    "Ceil",
}
_COSTLY = {"Gelu", "Erf", "Exp", "Log", "Sigmoid", "Tanh", "Softplus", "Swish", "Mish", "Elu", "Selu", "Pow"}
_COSTLY_REDUCING = {"Softmax", "LogSoftmax", "LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization"}
_HALVES = {"FLOAT16", "BFLOAT16"}
_WEIGHT_INPUT = {"QLinearConv": 3, "QLinearMatMul": 3}


@dataclass(frozen=True)
class Work:
    """One fused operator: `flops` count a multiply-add as two; `costly` counts elements of transcendental functions and norms.

    Of convolutions, `out_width` is the output channels and `group_width` the input channels of one group, 0 where there is one group only.
    """

    name: str
    op_types: tuple[str, ...]
    op_class: OpClass
    precision: Precision
    flops: float
    costly: float
    weight_bytes: float
    activation_bytes: float
    out_width: int = 0
    group_width: int = 0


def works(model: ModelProto, *, batch: int = 1) -> list[Work]:
    """The fused operators in order of execution, a free leading dimension set to `batch`.

    Raises OnnxRefused where a shape stays unknown, UsageError where the graph's batch is fixed to another number.
    """
    graph = _Graph(_shaped(model, batch))
    groups = _fuse(graph)
    return [_work(graph, group) for group in groups]


@dataclass
class _Group:
    """Nodes that run as one kernel; the first one names and classifies it."""

    index: int
    nodes: list[NodeProto] = field(default_factory=list)


class _Graph:
    """Sizes, constants and storage of a graph's tensors."""

    def __init__(self, model: ModelProto):
        import onnx

        g = model.graph
        self.nodes: list[NodeProto] = list(g.node)
        self.shape: dict[str, tuple[int, ...]] = {}
        self.itemsize: dict[str, float] = {}
        self.half: set[str] = set()
        self.constants = {t.name for t in g.initializer}
        for t in g.initializer:
            self._add(t.name, tuple(t.dims), onnx.TensorProto.DataType.Name(t.data_type))
        for v in (*g.input, *g.value_info, *g.output):
            dims = v.type.tensor_type.shape.dim
            if v.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
                self._add(v.name, tuple(d.dim_value for d in dims), onnx.TensorProto.DataType.Name(v.type.tensor_type.elem_type))
        self.base: dict[str, str] = {}  # name of the stored tensor behind a reshaped or dequantized one
        for node in self.nodes:
            if node.op_type == "Constant" or (node.input and all(self.is_constant(i) for i in node.input if i)):
                self.constants.update(node.output)
            if node.op_type in _FREE and node.input:
                self.base[node.output[0]] = self.stored(node.input[0])
        self.outputs = {self.stored(o.name) for o in g.output}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)  # of stored tensors
        for node in self.nodes:
            for name in node.input if node.op_type not in _FREE else ():
                self.readers[self.stored(name)].append(node)

    def stored(self, name: str) -> str:
        return self.base.get(name, name)

    def is_constant(self, name: str) -> bool:
        return name in self.constants

    def elements(self, name: str) -> int:
        return math.prod(self.dims(name))

    def dims(self, name: str) -> tuple[int, ...]:
        if name not in self.shape:
            raise OnnxRefused(
                f"the shape of '{name}' cannot be inferred", expected="operators of the standard ONNX domain with known input shapes"
            )
        return self.shape[name]

    def bytes(self, name: str) -> float:
        """Of a tensor as it is stored; a dequantized one counts as its integers."""
        return self.elements(name) * self.itemsize.get(self.stored(name), self.itemsize[name])

    def _add(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        self.shape[name], self.itemsize[name] = shape, _itemsize(dtype)
        if dtype in _HALVES:
            self.half.add(name)


def _shaped(model: ModelProto, batch: int) -> ModelProto:
    """A copy with every shape that ONNX can infer."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weights = {t.name for t in copy.graph.initializer}
    for value in copy.graph.input:
        if value.name not in weights:
            _set_batch(value, batch)
    del copy.graph.value_info[:]  # written for the batch of the export
    for output in copy.graph.output:
        output.type.tensor_type.ClearField("shape")
    try:
        return onnx.shape_inference.infer_shapes(copy, data_prop=True)
    except Exception as err:  # onnx raises several unrelated classes here
        raise OnnxRefused(f"shape inference failed: {str(err).splitlines()[0][:200]}") from err


def _set_batch(value: Any, batch: int) -> None:
    dims = value.type.tensor_type.shape.dim
    for place, dim in enumerate(dims):
        if not dim.HasField("dim_value"):
            if place:
                raise OnnxRefused(
                    f"input '{value.name}' has a free dimension besides the batch",
                    expected="fixed sizes",
                    hint="export it with fixed sizes",
                )
            dim.dim_value = batch
        elif place == 0 and batch not in (1, dim.dim_value):
            raise UsageError(
                f"the graph's batch is fixed to {dim.dim_value}, not {batch}", hint="leave --batch out, or export with a free batch"
            )


def _fuse(graph: _Graph) -> list[_Group]:
    """Groups in order of execution; nodes on constants alone and free nodes are in none."""
    groups: list[_Group] = []
    maker: dict[str, _Group] = {}  # stored tensor -> the group that makes it
    for node in graph.nodes:
        if node.op_type in _FREE or all(graph.is_constant(o) for o in node.output):
            continue
        group = _host_of(node, graph, maker)
        if group is None:
            group = _Group(len(groups))
            groups.append(group)
        group.nodes.append(node)
        for name in node.output:
            maker[name] = group
    return groups


def _host_of(node: NodeProto, graph: _Graph, maker: dict[str, _Group]) -> _Group | None:
    """The latest group that made an input of a pointwise node, if that input has the node's own size."""
    if node.op_type not in _CHEAP | _COSTLY:
        return None
    made = [(maker[graph.stored(i)], i) for i in node.input if graph.stored(i) in maker]
    if not made:
        return None
    latest, name = max(made, key=lambda pair: (pair[0].index, graph.elements(pair[1])))  # earlier ones are there by then
    return latest if graph.elements(name) == graph.elements(node.output[0]) else None


def _work(graph: _Graph, group: _Group) -> Work:
    head = group.nodes[0]
    made = {o for n in group.nodes for o in n.output if o}
    read = {graph.stored(i): i for n in group.nodes for i in n.input if i and graph.stored(i) not in made}
    op_class, flops, out_width, group_width = _arithmetic(graph, head)
    weights = sum(graph.bytes(name) for stored, name in read.items() if graph.is_constant(stored))
    moved = sum(graph.bytes(name) for stored, name in read.items() if not graph.is_constant(stored))
    moved += sum(graph.bytes(name) for name in _escaping(graph, group, made))
    costly = sum(graph.elements(n.output[0]) for n in group.nodes if n.op_type in _COSTLY | _COSTLY_REDUCING)
    types = tuple(n.op_type for n in group.nodes)
    precision = _precision(graph, head)
    return Work(head.name or head.output[0], types, op_class, precision, flops, costly, weights, moved, out_width, group_width)


def _escaping(graph: _Graph, group: _Group, made: set[str]) -> Iterator[str]:
    """Tensors of the group that something else reads, or that are outputs of the graph."""
    inside = {id(n) for n in group.nodes}
    for name in made:
        if name in graph.outputs or any(id(n) not in inside for n in graph.readers[name]):
            yield name


def _arithmetic(graph: _Graph, node: NodeProto) -> tuple[OpClass, float, int, int]:
    """(class, operations, output channels, input channels of each of several groups)."""
    if node.op_type in _CONVS:
        return _convolution(graph, node)
    if node.op_type in _PRODUCTS:
        at = _WEIGHT_INPUT.get(node.op_type, 1)
        left, right, out = graph.dims(node.input[0]), graph.dims(node.input[at]), graph.dims(node.output[0])
        inner = left[0] if _attribute(node, "transA", 0) else left[-1]
        fixed = graph.is_constant(node.input[at]) or graph.is_constant(node.input[0])
        width = out[-1] if len(right) > 1 else 1
        return ("gemm" if fixed else "attention"), 2.0 * math.prod(out) * inner, width, 0
    return "eltwise", float(sum(graph.elements(o) for o in node.output if o)), 0, 0


def _convolution(graph: _Graph, node: NodeProto) -> tuple[OpClass, float, int, int]:
    weight = graph.dims(node.input[_WEIGHT_INPUT.get(node.op_type, 1)])
    groups, taps = int(_attribute(node, "group", 1)), math.prod(weight[2:])
    spread = node.op_type == "ConvTranspose"  # each *input* element meets every tap, and weights lie (in, out / groups)
    elements = graph.elements(node.input[0] if spread else node.output[0])
    out_width, group_width = (weight[1] * groups, weight[0] // groups) if spread else (weight[0], weight[1])
    op_class: OpClass = "depthwise" if groups > 1 and group_width == 1 else "conv1x1" if taps == 1 else "conv3x3"
    return op_class, 2.0 * elements * weight[1] * taps, out_width, group_width if groups > 1 else 0


def _precision(graph: _Graph, node: NodeProto) -> Precision:
    """int8 if all tensors that are multiplied are stored as bytes; else what the first input is."""
    if node.op_type in _CONVS | _PRODUCTS:
        at = _WEIGHT_INPUT.get(node.op_type, 1)
        if all(graph.itemsize.get(graph.stored(node.input[i]), 4) <= 1 for i in (0, at)):
            return "int8"
    return "fp16" if any(i in graph.half for i in node.input) else "fp32"


def _attribute(node: NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _itemsize(dtype: str) -> float:
    """Bytes per element of an ONNX element type."""
    sizes = {"FLOAT16": 2, "BFLOAT16": 2, "INT16": 2, "UINT16": 2, "DOUBLE": 8, "INT64": 8, "UINT64": 8, "INT4": 0.5, "UINT4": 0.5}
    return sizes.get(dtype, 1 if dtype in ("INT8", "UINT8", "BOOL") or dtype.startswith("FLOAT8") else 4)


def total_weights(parts: Iterable[Work]) -> float:
    """Bytes of all weights."""
    return sum(w.weight_bytes for w in parts)
