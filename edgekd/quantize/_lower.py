"""Says a few operations in words that runtimes have int8 kernels for; the graph computes the same.

A mean over height and width is a GlobalAveragePool. HardSwish is one operator again: preparing a graph takes it apart, and then no runtime fuses it.
A strided Slice of height and width with zero channels put around it (the parameter-free shortcut of CIFAR ResNets) is a 1x1 convolution that copies:
one kernel instead of a Slice for each axis, a Pad, and the change of layout before and after them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from edgekd.quantize._quantizer import inner_nodes

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_SPATIAL = {2, 3}
_MOST_CHANNELS = 512  # a copying convolution costs their square
_HARD_SWISH = 14  # the opset that it came with
_END = 2**31 - 1  # exporters write any larger number for "to the end"


def lower(proto: ModelProto) -> ModelProto:
    """The same graph with those operations replaced; shapes must have been inferred, and every node have a name of its own."""
    graph = _Graph(proto)
    for node in list(proto.graph.node):
        if node.op_type == "ReduceMean":
            _pool(graph, node)
        elif node.op_type == "Slice":
            _copying_conv(graph, node)
        elif node.op_type == "HardSigmoid":
            _hard_swish(graph, node)
    graph.write()
    return proto


class _Graph:
    """Constants, channels, readers, and what is put in place of a node."""

    def __init__(self, proto: ModelProto):
        from onnx import numpy_helper

        self.body = proto.graph
        self.constants = {t.name: numpy_helper.to_array(t) for t in self.body.initializer}
        self.constants |= {
            n.output[0]: numpy_helper.to_array(n.attribute[0].t)
            for n in self.body.node
            if n.op_type == "Constant" and n.attribute[0].HasField("t")
        }
        self.dims = {
            v.name: [d.dim_value or None for d in v.type.tensor_type.shape.dim]
            for v in (*self.body.value_info, *self.body.input, *self.body.output)
        }
        self.given = {v.name for v in self.body.output} | {name for n in inner_nodes(self.body) for name in n.input}
        self.opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.body.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.replaced: dict[str, list[NodeProto]] = {}  # name of a node -> what stands in its place

    def numbers(self, node: NodeProto, place: int) -> list[int] | None:
        """A constant input as a list; None where it is absent or computed."""
        name = node.input[place] if place < len(node.input) else ""
        return [int(v) for v in self.constants[name].reshape(-1)] if name in self.constants else None

    def channels(self, tensor: str) -> int | None:
        """Of a tensor (batch, channels, height, width); None for another one."""
        dims = self.dims.get(tensor, [])
        return dims[1] if len(dims) == 4 else None

    def next(self, node: NodeProto) -> NodeProto | None:
        """The only reader of a node's output."""
        readers = self.readers.get(node.output[0], [])
        return readers[0] if len(readers) == 1 and node.output[0] not in self.given else None

    def write(self) -> None:
        nodes = [new for node in self.body.node for new in self.replaced.get(node.name, [node])]
        del self.body.node[:]
        self.body.node.extend(nodes)
        used = {name for node in nodes for name in node.input} | self.given
        for tensor in [t for t in self.body.initializer if t.name in self.readers and t.name not in used]:
            self.body.initializer.remove(tensor)


def _pool(graph: _Graph, node: NodeProto) -> None:
    """ReduceMean over height and width -> GlobalAveragePool, and a Squeeze where the axes go."""
    import numpy as np
    from onnx import helper, numpy_helper

    told = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    axes = told.get("axes") or graph.numbers(node, 1)
    if graph.channels(node.input[0]) is None or axes is None or {a % 4 for a in axes} != _SPATIAL:
        return
    if told.get("keepdims", 1):
        graph.replaced[node.name] = [helper.make_node("GlobalAveragePool", [node.input[0]], [node.output[0]], node.name)]
        return
    pooled, where = f"{node.output[0]}_pooled", f"{node.output[0]}_axes"
    graph.body.initializer.append(numpy_helper.from_array(np.array(sorted(_SPATIAL), np.int64), where))
    graph.replaced[node.name] = [
        helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], node.name),
        helper.make_node("Squeeze", [pooled, where], [node.output[0]], f"{node.name}_squeeze"),
    ]


def _hard_swish(graph: _Graph, gate: NodeProto) -> None:
    """x * HardSigmoid(x) of slope 1/6 -> HardSwish(x)."""
    from onnx import helper

    told, product = {"alpha": 0.2, "beta": 0.5} | {a.name: a.f for a in gate.attribute}, graph.next(gate)
    if product is None or product.op_type != "Mul" or set(product.input) != {gate.input[0], gate.output[0]}:
        return
    if graph.opset >= _HARD_SWISH and abs(told["alpha"] - 1 / 6) < 1e-6 and told["beta"] == 0.5:
        graph.replaced |= {gate.name: [], product.name: [helper.make_node("HardSwish", [gate.input[0]], [product.output[0]], product.name)]}


def _copying_conv(graph: _Graph, first: NodeProto) -> None:
    """Slices that take every n-th row and column, and the Pad that follows with zero channels -> a 1x1 convolution with ones."""
    import numpy as np
    from onnx import helper, numpy_helper

    chain, strides = list(_strided(graph, first)), {2: 1, 3: 1}
    for node in chain:
        strides |= _strides(graph, node) or {}
    channels = graph.channels(first.input[0])
    if not chain or first.name in graph.replaced or channels is None:
        return
    pad = graph.next(chain[-1])
    around = _zero_channels(graph, pad) if pad is not None and pad.op_type == "Pad" else None
    if pad is None or around is None or sum(around) + channels > _MOST_CHANNELS:
        return  # a Slice alone is as cheap
    weight = np.zeros((sum(around) + channels, channels, 1, 1), np.float32)
    weight[around[0] + np.arange(channels), np.arange(channels)] = 1
    name = f"{pad.output[0]}_copies"
    graph.body.initializer.append(numpy_helper.from_array(weight, name))
    graph.replaced |= {node.name: [] for node in chain}
    graph.replaced[pad.name] = [
        helper.make_node("Conv", [first.input[0], name], [pad.output[0]], pad.name, kernel_shape=[1, 1], strides=[strides[2], strides[3]])
    ]


def _strided(graph: _Graph, first: NodeProto) -> Iterator[NodeProto]:
    """The Slice and those that follow it alone, as long as each takes every n-th row or column."""
    node: Any = first
    while node is not None and node.op_type == "Slice" and _strides(graph, node) is not None:
        yield node
        node = graph.next(node)


def _strides(graph: _Graph, node: NodeProto) -> dict[int, int] | None:
    """axis -> step of a Slice that starts at 0, ends at the end and leaves batch and channels alone."""
    starts, ends, axes, steps = (graph.numbers(node, place) for place in range(1, 5))
    if not (starts and ends and axes and steps) or any(starts) or min(ends) < _END or min(steps) < 1:
        return None
    found = {axis % 4: step for axis, step in zip(axes, steps, strict=True)}
    return found if set(found) <= _SPATIAL else None


def _zero_channels(graph: _Graph, pad: NodeProto) -> Sequence[int] | None:
    """How many zero channels a Pad puts before and after; None for any other Pad."""
    told = {a.name: a.s for a in pad.attribute if a.name == "mode"}
    pads, value = graph.numbers(pad, 1), graph.constants.get(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else 0
    plain = (
        told.get("mode", b"constant") == b"constant"
        and value is not None
        and float(value) == 0
        and not (len(pad.input) > 3 and pad.input[3])
    )
    if not plain or pads is None or len(pads) != 8 or min(pads) < 0 or any(pads[i] for i in (0, 2, 3, 4, 6, 7)):
        return None
    return pads[1], pads[5]
