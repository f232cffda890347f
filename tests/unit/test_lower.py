"""What is said in other words before quantizing computes the same; whatever is only alike stays as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgekd.export.onnx import export_onnx
from edgekd.quantize._lower import lower
from edgekd.quantize._static import prepare
from edgekd.quantize.ptq import PTQ

SIZE = 9  # odd: the last column counts


class Shortcut(nn.Module):
    """Option A of He et al. 2016: every n-th row and column, and zero channels."""

    def __init__(self, step: int = 2, *, start: int = 0, mode: str = "constant", value: float = 0.0, twice: bool = False):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(9, 5)
        self.step, self.start, self.mode, self.value, self.twice = step, start, mode, value, twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        few = x[:, :, self.start :: self.step, self.start :: self.step]
        padded = F.pad(few, (0, 0, 0, 0, 2, 3), self.mode, self.value)
        pooled = padded.mean((2, 3))
        return self.linear(pooled) + (few.mean() if self.twice else 0)


def lowered(net: nn.Module, folder: Path) -> tuple[list[str], list[str], float]:
    """Operators before and after, and the largest difference of the outputs."""
    torch.manual_seed(0)
    export_onnx(net.eval(), SIZE, folder / "plain.onnx")
    prepare(folder / "plain.onnx", folder / "lowered.onnx")
    x = np.random.default_rng(0).standard_normal((2, 3, SIZE, SIZE), dtype=np.float32)
    outputs = [
        ort.InferenceSession(str(folder / f), providers=["CPUExecutionProvider"]).run(None, {"images": x})[0]
        for f in ("plain.onnx", "lowered.onnx")
    ]
    before, after = ([n.op_type for n in onnx.load(folder / f).graph.node] for f in ("plain.onnx", "lowered.onnx"))
    return before, after, float(np.abs(outputs[0] - outputs[1]).max())


@pytest.mark.parametrize("step", [2, 3])
def test_a_parameter_free_shortcut_is_a_convolution_that_copies(tmp_path: Path, step: int) -> None:
    before, after, gap = lowered(Shortcut(step), tmp_path)
    assert {"Slice", "Pad", "ReduceMean"} <= set(before)
    assert not {"Slice", "Pad", "ReduceMean"} & set(after)
    assert after.count("Conv") == 2
    assert "GlobalAveragePool" in after
    assert gap < 1e-6


@pytest.mark.parametrize("other", [{"start": 1}, {"value": 1.0}, {"twice": True}])
def test_what_only_looks_like_one_stays(tmp_path: Path, other: dict[str, object]) -> None:
    _, after, gap = lowered(Shortcut(**other), tmp_path)  # type: ignore[arg-type]
    assert {"Slice", "Pad"} <= set(after)
    assert gap < 1e-6


class Mean(nn.Module):
    def __init__(self, axes: tuple[int, ...], keepdim: bool):
        super().__init__()
        self.conv, self.axes, self.keepdim = nn.Conv2d(3, 4, 3), axes, keepdim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean(self.axes, keepdim=self.keepdim)


@pytest.mark.parametrize(("axes", "pooled"), [((2, 3), True), ((-1, -2), True), ((1, 2), False), ((3,), False)])
@pytest.mark.parametrize("keepdim", [True, False])
def test_a_mean_over_height_and_width_is_a_pool(tmp_path: Path, axes: tuple[int, ...], pooled: bool, keepdim: bool) -> None:
    _, after, gap = lowered(Mean(axes, keepdim), tmp_path)
    assert ("GlobalAveragePool" in after) == pooled
    assert ("ReduceMean" in after) != pooled
    assert gap < 1e-6


def test_the_copy_is_exact_in_int8(tmp_path: Path) -> None:
    net = nn.Sequential(Shortcut())
    torch.manual_seed(0)
    export_onnx(net.eval(), SIZE, tmp_path / "plain.onnx")
    x = np.random.default_rng(0).standard_normal((32, 3, SIZE, SIZE), dtype=np.float32)
    PTQ(PTQ.Config()).quantize(tmp_path / "plain.onnx", tmp_path / "int8.onnx", iter([x]), "u8s8")
    graph = onnx.load(tmp_path / "int8.onnx").graph
    weights = next(onnx.numpy_helper.to_array(t) for t in graph.initializer if "copies_quantized" in t.name)
    assert sorted(np.unique(weights)) == [0, 127]
    assert (weights == 127).sum() == 4


def test_a_graph_without_shapes_is_left_alone(tmp_path: Path) -> None:
    export_onnx(Shortcut().eval(), SIZE, tmp_path / "plain.onnx")
    proto = onnx.load(tmp_path / "plain.onnx")
    del proto.graph.value_info[:]
    assert "Slice" in [n.op_type for n in lower(proto).graph.node]


# ------------------------------------------------------------------------------------------------------------ graphs of other makers
def written(text: str, folder: Path) -> Path:
    """An ONNX file from its textual form."""
    path = folder / "given.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def same_outputs(graph: Path, folder: Path) -> onnx.ModelProto:
    """The prepared graph, which must compute what the given one computes."""
    prepare(graph, folder / "lowered.onnx")
    x = np.random.default_rng(0).standard_normal((2, 3, SIZE, SIZE), dtype=np.float32)
    before, after = (
        ort.InferenceSession(str(f), providers=["CPUExecutionProvider"]).run(None, {"x": x}) for f in (graph, folder / "lowered.onnx")
    )
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    return onnx.load(folder / "lowered.onnx")


@pytest.mark.parametrize(("opset", "slope", "swishes"), [(13, 1 / 6, 0), (14, 1 / 6, 1), (18, 0.2, 0)])
def test_a_hard_swish_is_one_operator_where_the_opset_has_it(opset: int, slope: float, swishes: int, tmp_path: Path) -> None:
    graph = written(
        f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g (float[2, 3, {SIZE}, {SIZE}] x) => (float[2, 3, {SIZE}, {SIZE}] y) {{
            gate = HardSigmoid<alpha = {slope!r}, beta = 0.5>(x)
            y = Mul(x, gate)
        }}""",
        tmp_path,
    )
    assert [n.op_type for n in same_outputs(graph, tmp_path).graph.node].count("HardSwish") == swishes


def test_nodes_without_a_name_are_told_apart(tmp_path: Path) -> None:
    graph = written(
        f"""<ir_version: 8, opset_import: ["" : 18]>
        g (float[2, 3, {SIZE}, {SIZE}] x) => (float[2, 3, {SIZE}, {SIZE}] y)
        <int64[2] axes = {{2, 3}}> {{
            mean = ReduceMean(x, axes)
            less = Sub(x, mean)
            y = Abs(less)
        }}""",
        tmp_path,
    )
    nodes = same_outputs(graph, tmp_path).graph.node
    assert [n.op_type for n in nodes] == ["GlobalAveragePool", "Sub", "Abs"]
    assert len({n.name for n in nodes} - {""}) == 3


def test_what_a_branch_reads_stays(tmp_path: Path) -> None:
    branch = "float[?, ?, ?, ?] {out}"
    graph = written(
        f"""<ir_version: 8, opset_import: ["" : 18]>
        g (float[2, 3, {SIZE}, {SIZE}] x) => (float[2, 5, 5, 5] y, {branch.format(out="z")})
        <int64[2] starts = {{0, 0}}, int64[2] ends = {{9223372036854775807, 9223372036854775807}}, int64[2] axes = {{2, 3}}, int64[2] steps = {{2, 2}},
         int64[8] pads = {{0, 1, 0, 0, 0, 1, 0, 0}}, float limit = {{0.0}}> {{
            few = Slice(x, starts, ends, axes, steps)
            y = Pad(few, pads)
            top = ReduceMax<keepdims = 0>(x)
            positive = Greater(top, limit)
            z = If(positive) <
                then_branch = yes () => ({branch.format(out="a")}) {{ a = Slice(few, starts, ends, axes, steps) }},
                else_branch = no () => ({branch.format(out="b")}) {{ b = Identity(few) }}
            >
        }}""",
        tmp_path,
    )
    proto = same_outputs(graph, tmp_path)
    assert {"Slice", "Pad"} <= {n.op_type for n in proto.graph.node}
