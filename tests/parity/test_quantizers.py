"""Quantizers against golden values of the published references and float64 oracles written another way."""

from __future__ import annotations

import copy

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from edgekd.quantize._attach import Bits, attach, bake, sites
from edgekd.quantize._buckets import Points, Uniform, codebooks, percentile_points, scaled, uniform_quant
from edgekd.quantize._codebook import packed
from edgekd.quantize._match import find_weights
from edgekd.quantize._steps import Quantizer, initial_step, lsq
from edgekd.quantize.dq import shared_out
from tests.parity.test_distillers import seq

W = seq(300, a=0.013, b=0.2) + 0.3 * seq(300, a=1.7)


@pytest.mark.parametrize(
    ("bits", "bucket", "golden"),
    [
        (2, None, 15.1817756635),
        (2, 256, 8.708132159457),
        (2, 64, 3.388596791306),
        (4, None, 0.6048436901478),
        (4, 256, 0.371912259813),
        (4, 64, 0.1225047203846),
        (8, None, 0.001942489598271),
        (8, 256, 0.001223039153549),
        (8, 64, 0.0004429332017762),
    ],
)
def test_bucketed_rounding_gives_the_references_error(bits: int, bucket: int | None, golden: float) -> None:
    assert float((uniform_quant(W, bits, bucket) - W).square().sum()) == pytest.approx(golden, rel=1e-9)


def test_lsq_gives_the_references_values_and_gradients() -> None:
    w = seq(8, 5, a=0.77, b=0.1).requires_grad_()
    step = initial_step(w.detach().abs().mean(), 3).requires_grad_()
    assert float(step.detach()) == pytest.approx(0.7353584375283, rel=1e-9)
    q = lsq(w, step, -4, 3)
    (q * seq(8, 5, a=0.33)).sum().backward()  # type: ignore[no-untyped-call]
    assert float(q.detach().sum()) == pytest.approx(0.7353584375283, rel=1e-9)
    assert step.grad is not None
    assert float(step.grad) == pytest.approx(0.01739857863261, rel=1e-9)
    assert w.grad is not None
    assert float(w.grad.sum()) == pytest.approx(0.2868457688668, rel=1e-9)


@pytest.mark.parametrize(("low", "high"), [(-2, 1), (0, 3), (-128, 127)])
def test_lsq_gradients_of_a_step_a_channel_equal_a_loop_over_values(low: int, high: int) -> None:
    torch.manual_seed(0)
    x, step = torch.randn(3, 7, dtype=torch.float64) * 3, torch.rand(3, 1, dtype=torch.float64) + 0.1
    grad = torch.randn_like(x)
    a, s = x.clone().requires_grad_(), step.clone().requires_grad_()
    lsq(a, s, low, high).backward(grad)  # type: ignore[no-untyped-call]
    of_step, of_x = np.zeros((3, 1)), np.zeros((3, 7))
    for i in range(3):
        for j in range(7):
            v = float(x[i, j] / step[i, 0])
            inside = low <= v <= high
            of_x[i, j] = float(grad[i, j]) * inside
            slope = round(v) - v if inside else (low if v < low else high)  # Python rounds halves to even, too
            of_step[i, 0] += float(grad[i, j]) * slope / (21 * high) ** 0.5
    assert a.grad is not None
    assert s.grad is not None
    np.testing.assert_allclose(a.grad.numpy(), of_x, rtol=1e-12)
    np.testing.assert_allclose(s.grad.numpy(), of_step, rtol=1e-9)


def test_points_get_the_sum_of_the_gradients_of_their_weights() -> None:
    torch.manual_seed(1)
    weight = torch.randn(10, 7, dtype=torch.float64)
    quantizer = Points(weight, 5, 16)
    grad = torch.randn_like(weight)
    out = quantizer(weight)
    out.backward(grad)
    v, alpha, _ = scaled(weight, 16)
    points = quantizer.points.detach()
    oracle = np.zeros(5)
    padded = np.concatenate([grad.numpy().ravel(), np.zeros(v.numel() - weight.numel())]).reshape(v.shape)
    for row in range(len(v)):
        for column in range(v.shape[1]):
            nearest = int(np.argmin(np.abs(points.numpy() - float(v[row, column]))))
            oracle[nearest] += float(alpha[row]) * padded[row, column]
    assert quantizer.points.grad is not None
    np.testing.assert_allclose(quantizer.points.grad.numpy(), oracle, rtol=1e-10)


def test_points_start_at_percentiles() -> None:
    rows = torch.rand(4, 25, dtype=torch.float64)
    np.testing.assert_allclose(percentile_points(rows, 6).numpy(), np.percentile(rows.numpy(), np.linspace(0, 100, 6)), rtol=1e-12)


def test_points_are_shared_out_by_gradient_and_their_number_stays() -> None:
    counts = shared_out({"a": 1.0, "b": 3.0, "c": 0.0}, 16)
    assert sum(counts.values()) == 48
    assert counts["c"] < counts["a"] < counts["b"]
    assert counts["c"] == 8
    assert shared_out({"a": 0.0}, 256) == {"a": 256}


@pytest.mark.parametrize("truncated", [False, True])
def test_the_straight_through_gradient(truncated: bool) -> None:
    weight = torch.tensor([[-3.0, 0.2, 0.7, 2.0]], requires_grad=True)
    Uniform(2, None, truncated)(weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[0, 1, 1, 0] if truncated else [1, 1, 1, 1]]


class Net(nn.Module):
    """Two convolutions that read the same tensor, a batch norm, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3)
        self.norm, self.fc = nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc((self.norm(self.a(x)) + self.b(x)).relu().mean((2, 3)))
        return out


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("width", [2, 4, 8])
def test_baked_weights_are_codes_times_steps_and_copies_have_quantizers_of_their_own(learned: bool, width: int) -> None:
    torch.manual_seed(0)
    net, images = Net(), torch.randn(5, 3, 8, 8)
    found = sites(net, [images])
    assert [s.name for s in found] == ["a", "b", "fc"]
    assert [s.source for s in found] == ["a", "a", "fc"]  # one tensor, one quantizer
    attach(net, found, dict.fromkeys("ab", Bits(width, 8)) | {"fc": Bits(8, 8)}, learned=learned, unsigned_high=255)
    twin = copy.deepcopy(net)
    before = net.eval()(images)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    assert torch.equal(net(images), before)
    grid = bake(net)
    assert {n: (int(c.min()) >= -(2 ** (width - 1)), c.shape) for n, c in grid.codes.items() if n != "fc"} == dict.fromkeys(
        "ab", (True, (6, 3, 3, 3))
    )
    assert grid.inputs["fc"][1:] == (0, 255)  # after a ReLU
    assert grid.inputs["a"] == grid.inputs["b"]
    steps = torch.from_numpy(grid.steps["a"]).view(-1, 1, 1, 1)
    assert torch.equal(net.a.weight, torch.from_numpy(grid.codes["a"]).float() * steps)
    assert set(net.state_dict()) == set(Net().state_dict())
    x = images
    for name, module in (("a", net.a), ("b", net.b), ("fc", net.fc)):
        step, low, high = grid.inputs[name]
        module.register_forward_pre_hook(
            lambda _m, args, s=step, lo=low, hi=high: ((args[0] / s).round().clamp(lo, hi) * s,)  # type: ignore[misc]
        )
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-6)


def test_rounding_and_folding_a_batch_norm_commute() -> None:
    torch.manual_seed(0)
    weight, gamma = torch.randn(6, 3, 3, 3), torch.randn(6).view(-1, 1, 1, 1)
    folded = Quantizer(torch.ones(6), -127, 127, learned=False, follows=False)(gamma * weight)
    ours = gamma * Quantizer(torch.ones(6), -127, 127, learned=False, follows=False)(weight)
    torch.testing.assert_close(folded, ours, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------ codebooks in a graph
def weight_of(proto: object, name: str) -> np.ndarray:
    """What onnxruntime makes of the packed weight `name`."""
    del proto.graph.output[:]  # type: ignore[attr-defined]
    proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))  # type: ignore[attr-defined]
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])  # type: ignore[attr-defined]
    return np.asarray(session.run([name], {"x": np.zeros((1, 3), np.float32)})[0])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(("count", "bucket"), [(2, 16), (5, None), (16, 64), (200, 7)])
def test_a_runtime_restores_packed_weights_exactly(count: int, bucket: int | None, folded: bool, transposed: bool) -> None:
    torch.manual_seed(count)
    layer = nn.Linear(13, 11)
    holder = nn.Sequential(layer)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Points(layer.weight, count, bucket))
    arrays = codebooks(holder)
    factor = np.linspace(-1, 2, 11, dtype=np.float32)[:, None] if folded else np.ones((11, 1), np.float32)
    stored = layer.weight.detach().numpy() * factor
    stored = stored.T.copy() if transposed else stored
    body = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Identity", ["0.weight"], ["z"])],
        "model",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, list(stored.shape))],
        [numpy_helper.from_array(stored, "0.weight")],
    )
    proto, facts = packed(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), arrays)
    np.testing.assert_allclose(weight_of(proto, "0.weight"), stored, rtol=2e-6, atol=1e-7)
    assert facts["huffman_bits"] <= facts["stored_bits"] == (count - 1).bit_length()


@pytest.mark.parametrize("bucket", [64, 256])
def test_openvino_unpacks_weights_once_and_multiplies_with_them(bucket: int) -> None:
    """It once multiplied with what was not unpacked yet, and unpacked again for every image."""
    openvino = pytest.importorskip("openvino")
    torch.manual_seed(bucket)
    layer = nn.Linear(64, 10)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Points(layer.weight, 16, bucket))
    arrays = codebooks(nn.Sequential(layer))
    weight, x = layer.weight.detach().numpy(), np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    body = helper.make_graph(
        [helper.make_node("Gemm", ["x", "0.weight"], ["y"], transB=1)],
        "model",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(weight, "0.weight")],
    )
    proto, _ = packed(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), arrays)
    plan = openvino.Core().compile_model(openvino.Core().read_model(proto.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(plan(x)[0], x @ weight.T, rtol=1e-5, atol=1e-5)
    assert not [op for op in plan.get_runtime_model().get_ordered_ops() if "gather" in op.get_friendly_name()]


def test_a_weight_that_is_not_in_the_graph_is_an_error() -> None:
    from edgekd.errors import ParityBroken

    values = np.ones((4, 3))
    body = helper.make_graph([], "model", [], [], [numpy_helper.from_array(np.eye(4, 3, dtype=np.float32), "fc.weight")])
    with pytest.raises(ParityBroken, match="fc"):
        find_weights(helper.make_model(body), {"fc": values})
