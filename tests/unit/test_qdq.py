"""The rules of quantized graphs: what edgekd writes keeps them in every flavour, and each rule is seen when it is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from edgekd.errors import BackendError, OnnxRefused
from edgekd.export.onnx import export_onnx
from edgekd.export.qdq import assert_rules, problems
from edgekd.quantize.ptq import PTQ

SIZE = 16
FLAVOURS = ("s8s8", "x8s8", "u8s8", "u8s8_reduced")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Hardswish(), nn.Flatten())
    net = nn.Sequential(body, nn.Linear(288, 12), nn.Tanh(), nn.Linear(12, 5)).eval()
    folder = tmp_path_factory.mktemp("graph")
    export_onnx(net, SIZE, folder / "fp32.onnx")
    found = {"fp32": (folder / "fp32.onnx").read_bytes()}
    for flavour in FLAVOURS:
        PTQ(PTQ.Config()).quantize(folder / "fp32.onnx", folder / "int8.onnx", images(), flavour)
        found[flavour] = (folder / "int8.onnx").read_bytes()
    return found


def images() -> Iterator[np.ndarray]:
    yield np.random.default_rng(0).standard_normal((4, 3, SIZE, SIZE), dtype=np.float32)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_what_is_written_keeps_every_rule_of_its_flavour(graphs: dict[str, bytes], flavour: str) -> None:
    assert list(problems(onnx.load_model_from_string(graphs[flavour]), flavour)) == []


class Branches(nn.Module):
    """Two convolutions of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both: torch.Tensor = self.left(x) + self.right(x)
        return both


class Residual(nn.Module):
    """x + Wx."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both: torch.Tensor = x + self.inner(x)
        return both


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_an_operator_kept_in_fp32_may_read_what_another_one_rounded(tmp_path: Path, flavour: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Branches(), nn.Flatten(), nn.Linear(1152, 4))
    export_onnx(net.eval(), SIZE, tmp_path / "fp32.onnx")
    second = [n.name for n in onnx.load(tmp_path / "fp32.onnx").graph.node if n.op_type == "Conv"][1]
    PTQ(PTQ.Config(keep_nodes=(second,))).quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", images(), flavour)
    proto = onnx.load(tmp_path / "int8.onnx")
    assert any("its input is rounded and its weights are not" in p for p in problems(proto, flavour))
    assert list(problems(proto, flavour, keep=[second])) == []


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_convolution_and_its_relu_are_rounded_once_and_matrix_products_give_fp32(graphs: dict[str, bytes], flavour: str) -> None:
    body = onnx.load_model_from_string(graphs[flavour]).graph
    makers = {name: node for node in body.node for name in node.output}
    readers = [(node, makers[name].op_type) for node in body.node for name in node.input if name in makers]
    assert {made for node, made in readers if node.op_type == "Relu"} == {"Conv"}
    assert not [node.name for node, made in readers if node.op_type == "QuantizeLinear" and made in ("Gemm", "MatMul")]
    assert makers[body.output[0].name].op_type == "Gemm"  # what leaves the graph is not rounded


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_sum_is_rounded_where_both_of_its_parts_are(tmp_path: Path, flavour: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Branches(), nn.Flatten(), nn.Linear(1152, 16), Residual(16))
    export_onnx(net.eval(), SIZE, tmp_path / "fp32.onnx")
    PTQ(PTQ.Config()).quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", images(), flavour)
    body = onnx.load(tmp_path / "int8.onnx").graph
    makers = {name: node.op_type for node in body.node for name in node.output}
    sums = [{makers.get(name, "weight") for name in node.input} for node in body.node if node.op_type == "Add"]
    assert sums[0] == {"DequantizeLinear"}  # of two convolutions
    assert all("DequantizeLinear" not in s for s in sums[1:])  # of a linear layer and what went into it


def test_without_zero_points_a_tensor_is_signed_where_it_is_negative_somewhere(graphs: dict[str, bytes]) -> None:
    proto = onnx.load_model_from_string(graphs["x8s8"])
    held = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    makers = {name: node.op_type for node in proto.graph.node for name in node.output}
    kinds = {(makers.get(n.input[0], "input"), str(held[n.input[2]].dtype)) for n in proto.graph.node if n.op_type == "QuantizeLinear"}
    assert ("input", "int8") in kinds
    assert ("Relu", "uint8") in kinds
    assert not any(held[n.input[2]].any() for n in proto.graph.node if n.op_type == "QuantizeLinear")


@pytest.mark.parametrize(("made", "wanted"), [("u8s8", "s8s8"), ("s8s8", "u8s8"), ("u8s8", "u8s8_reduced")])
def test_another_flavours_graph_is_found(graphs: dict[str, bytes], made: str, wanted: str) -> None:
    assert list(problems(onnx.load_model_from_string(graphs[made]), wanted))


def tensor(proto: Any, node: Any, place: int) -> Any:
    return next(t for t in proto.graph.initializer if t.name == node.input[place])


def first(proto: Any, op: str, *, weight: bool) -> Any:
    known = {t.name for t in proto.graph.initializer}
    return next(n for n in proto.graph.node if n.op_type == op and (n.input[0] in known) is weight)


def changed(proto: Any, node: Any, place: int, change: Callable[[np.ndarray], np.ndarray]) -> None:
    held = tensor(proto, node, place)
    held.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(numpy_helper.to_array(held).copy())), held.name))


def zero_point(proto: Any) -> None:
    changed(proto, first(proto, "QuantizeLinear", weight=False), 2, lambda z: z + np.int8(3))


def scale(proto: Any) -> None:
    changed(proto, first(proto, "QuantizeLinear", weight=False), 1, lambda s: -s)


def largest(proto: Any) -> None:
    changed(proto, first(proto, "DequantizeLinear", weight=True), 0, lambda w: np.where(w == w.max(), np.int8(-128), w))


def bias(proto: Any) -> None:
    changed(proto, first(proto, "DequantizeLinear", weight=True), 0, lambda w: w.astype(np.int32))


def axis(proto: Any) -> None:
    node = next(n for n in proto.graph.node if n.op_type == "DequantizeLinear" and any(a.name == "axis" for a in n.attribute))
    next(a for a in node.attribute if a.name == "axis").i ^= 1


def opset(proto: Any) -> None:
    proto.opset_import[0].version = 11


def untyped(proto: Any) -> None:
    del first(proto, "QuantizeLinear", weight=False).input[2]


def unpaired(proto: Any) -> None:
    proto.graph.node.append(helper.make_node("Identity", [first(proto, "QuantizeLinear", weight=False).output[0]], ["seen"]))


def fp32_weight(proto: Any) -> None:
    node = first(proto, "DequantizeLinear", weight=True)
    proto.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(tensor(proto, node, 0)).astype(np.float32), "plain"))
    for reader in proto.graph.node:
        for place, name in enumerate(reader.input):
            if name == node.output[0]:
                reader.input[place] = "plain"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (zero_point, "zero point is not zero"),
        (scale, "scale is not a positive constant"),
        (largest, "a weight is 128"),
        (bias, "int32 bias"),
        (axis, "scales along axis"),
        (opset, "opset 11"),
        (untyped, "no constant zero point"),
        (unpaired, "read by something other"),
        (fp32_weight, "its weights are not"),
    ],
)
def test_a_broken_rule_is_named(graphs: dict[str, bytes], damage: Callable[[Any], None], words: str) -> None:
    proto = onnx.load_model_from_string(graphs["s8s8"])
    damage(proto)
    with pytest.raises(BackendError, match=words):
        assert_rules(proto, "s8s8", "model.onnx")


def test_a_graph_that_is_quantized_already_is_refused(graphs: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "int8.onnx").write_bytes(graphs["u8s8"])
    with pytest.raises(OnnxRefused, match="quantized already"):
        PTQ(PTQ.Config()).quantize(tmp_path / "int8.onnx", tmp_path / "again.onnx", images(), "u8s8")


class Gated(nn.Module):
    """A convolution with an activation, squeeze and excitation, and a residual sum of which one part is scaled."""

    def __init__(self, activation: nn.Module, gate: nn.Module):
        super().__init__()
        self.stem, self.squeeze, self.excite, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1)
        self.activation, self.gate, self.scale = activation, gate, nn.Parameter(torch.full((8, 1, 1), 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.stem(x))
        gated = self.last(x * self.gate(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True))))))
        both: torch.Tensor = x * self.scale + gated
        return both


def makers_of_rounded(proto: onnx.ModelProto) -> list[str]:
    """The operator that makes each tensor that is rounded."""
    made = {name: n.op_type for n in proto.graph.node for name in n.output}
    return sorted(made.get(n.input[0], "input") for n in proto.graph.node if n.op_type == "QuantizeLinear")


@pytest.mark.parametrize(
    ("activation", "gate", "rounded"),
    [
        (nn.Hardswish(), nn.Hardsigmoid(), ["Conv", "GlobalAveragePool", "HardSigmoid", "HardSwish", "Mul", "Relu", "input"]),
        (nn.SiLU(), nn.Sigmoid(), ["Conv", "GlobalAveragePool", "Mul", "Mul", "Relu", "Sigmoid", "input"]),
    ],
)
def test_for_openvino_values_are_rounded_behind_activations_and_gates_multiply_in_int8(
    tmp_path: Path, activation: nn.Module, gate: nn.Module, rounded: list[str]
) -> None:
    torch.manual_seed(0)
    export_onnx(Gated(activation, gate).eval(), SIZE, tmp_path / "fp32.onnx")
    PTQ(PTQ.Config()).quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", images(), "x8s8")
    proto = onnx.load(tmp_path / "int8.onnx")
    assert makers_of_rounded(proto) == rounded  # of the convolutions only the last one, which no activation follows
    made = {o for n in proto.graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    [product] = [n for n in proto.graph.node if n.op_type == "Mul" and set(n.input) <= made]
    [scaled] = [n for n in proto.graph.node if n.op_type == "Mul" and "scale" in "".join(n.input)]
    assert product.name != scaled.name
    assert not any("scale" in n.input[0] for n in proto.graph.node if n.op_type == "DequantizeLinear")


def test_onnxruntime_has_no_such_kernels_and_gets_pairs_around_its_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    export_onnx(Gated(nn.Hardswish(), nn.Hardsigmoid()).eval(), SIZE, tmp_path / "fp32.onnx")
    PTQ(PTQ.Config()).quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", images(), "u8s8")
    proto = onnx.load(tmp_path / "int8.onnx")
    assert makers_of_rounded(proto).count("Conv") > 1
    assert "HardSwish" in [n.op_type for n in proto.graph.node]
