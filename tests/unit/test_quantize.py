"""Quantizers beside ptq (test_export.py): fp16 casts and block-wise weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from edgekd.errors import BackendError
from edgekd.export.onnx import INPUT, export_onnx
from edgekd.export.parity import LIMITS, coarser, compare
from edgekd.quantize.fp16 import FP16
from edgekd.quantize.weight_only import WeightOnly, pack, unpack
from edgekd.safeio.onnxfile import check_onnx
from edgekd.tasks.classification import Classification, calibration_error

SIZE = 16


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 40, 3, 2, 1), nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 17, 3), nn.Flatten())
    net = nn.Sequential(body, nn.LayerNorm(17 * 36), nn.Linear(17 * 36, 5)).eval()
    path = tmp_path_factory.mktemp("graph") / "m.onnx"
    export_onnx(net, SIZE, path)
    return path


def run(path: Path, images: np.ndarray, level: ort.GraphOptimizationLevel = ort.GraphOptimizationLevel.ORT_ENABLE_ALL) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, {INPUT: images})[0]


IMAGES = np.random.default_rng(0).standard_normal((4, 3, SIZE, SIZE), dtype=np.float32)


# ------------------------------------------------------------------------------------------------------------ weight_only
@pytest.mark.parametrize("block", [8, 64, 1000])
@pytest.mark.parametrize("shape", [(5, 7, 3, 3), (640,), (33, 9)])
def test_a_weight_is_off_by_at_most_half_a_step_of_its_own_block(block: int, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(1).standard_normal(shape, dtype=np.float32) * np.float32(3)
    codes, scales = pack(values, block)
    oracle = np.abs(np.pad(values.astype(np.float64).ravel(), (0, -values.size % block)).reshape(-1, block)).max(1) / 127
    np.testing.assert_allclose(scales[:, 0], oracle, rtol=1e-6)
    off = np.abs(unpack(codes, scales, shape).astype(np.float64) - values).ravel()
    assert (off <= np.repeat(oracle, block)[: values.size] / 2 * (1 + 1e-5)).all()
    assert codes.min() >= -127


def test_a_block_of_zeros_stays_zero() -> None:
    codes, scales = pack(np.zeros((2, 64), np.float32), 64)
    assert not unpack(codes, scales, (2, 64)).any()
    assert np.isfinite(scales).all()


@pytest.mark.parametrize("block", [64, 7 * 11])
def test_the_packed_graph_computes_with_the_unpacked_weights(graph: Path, tmp_path: Path, block: int) -> None:
    out, oracle = tmp_path / "packed.onnx", tmp_path / "oracle.onnx"
    done = WeightOnly(WeightOnly.Config(block=block)).quantize(graph, out, iter([]), "u8s8")
    proto = onnx.load(graph)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1 and np.prod(tensor.dims) >= 512:
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(unpack(*pack(values, block), values.shape), tensor.name))
    onnx.save(proto, oracle)
    check_onnx(out)
    assert done["tensors"] == 3
    assert 0 < done["max_relative_error"] <= 0.5 / 127 * (1 + 1e-5)
    np.testing.assert_allclose(run(out, IMAGES), run(oracle, IMAGES), rtol=1e-4, atol=1e-5)
    assert not np.array_equal(run(out, IMAGES), run(graph, IMAGES))
    assert out.stat().st_size < 0.42 * graph.stat().st_size  # a tiny net: the graph itself is a third of the rest


def test_the_runtime_folds_the_unpacking_when_it_loads_the_file(graph: Path, tmp_path: Path) -> None:
    out, folded = tmp_path / "packed.onnx", tmp_path / "folded.onnx"
    WeightOnly(WeightOnly.Config()).quantize(graph, out, iter([]), "u8s8")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folded)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    ort.InferenceSession(str(out), options, providers=["CPUExecutionProvider"])
    assert not [n.name for n in onnx.load(folded).graph.node if n.op_type == "Cast"]


def test_the_same_graph_gives_the_same_bytes(graph: Path, tmp_path: Path) -> None:
    for cls in (WeightOnly, FP16):
        for name in ("a", "b"):
            cls(cls.Config()).quantize(graph, tmp_path / name, iter([]), "s8s8")
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# ------------------------------------------------------------------------------------------------------------ fp16
def test_an_fp16_graph_is_half_the_size_and_decides_alike(graph: Path, tmp_path: Path) -> None:
    out = tmp_path / "half.onnx"
    FP16(FP16.Config()).quantize(graph, out, iter([]), "s8s8")
    proto = check_onnx(out)
    assert {t.data_type for t in proto.graph.initializer if len(t.dims) > 1} == {onnx.TensorProto.FLOAT16}
    assert [i.type.tensor_type.elem_type for i in (*proto.graph.input, *proto.graph.output)] == [onnx.TensorProto.FLOAT] * 2
    assert out.stat().st_size < 0.6 * graph.stat().st_size
    a, b = run(graph, IMAGES), run(out, IMAGES)
    np.testing.assert_allclose(a, b, atol=2e-2 * np.abs(a).max())
    assert not np.array_equal(a, b)


def test_what_is_on_the_keep_list_stays_in_fp32(graph: Path, tmp_path: Path) -> None:
    convolution = next(n for n in onnx.load(graph).graph.node if n.op_type == "Conv")
    out = tmp_path / "half.onnx"
    FP16(FP16.Config(keep_nodes=(convolution.name,), keep_ops=("Gemm", "LayerNormalization"))).quantize(graph, out, iter([]), "s8s8")
    held = {t.name: t.data_type for t in onnx.load(out).graph.initializer}
    kept = next(n for n in onnx.load(out).graph.node if n.name == convolution.name)
    assert held[kept.input[1]] == onnx.TensorProto.FLOAT


def test_a_node_of_the_keep_list_that_is_not_there_is_named(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no node 'conv99'"):
        FP16(FP16.Config(keep_nodes=("conv99",))).quantize(graph, tmp_path / "m.onnx", iter([]), "s8s8")


# ------------------------------------------------------------------------------------------------------------ parity
@pytest.mark.parametrize("limits", list(LIMITS))
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_not_finite_never_pass(limits: str, bad: float) -> None:
    reference = np.random.default_rng(0).standard_normal((256, 5)).astype(np.float32)
    found = reference.copy()
    assert compare("rung", limits, reference, found, reference.argmax(1), Classification())["ok"]
    found[7, 2] = bad
    row = compare("rung", limits, reference, found, reference.argmax(1), Classification())
    assert (row["ok"], row["failed"]) == (False, ["finite"])
    assert all(np.isfinite(v) for v in row.values() if isinstance(v, float))  # run.json holds no NaN


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_answer_that_is_not_finite_has_no_confidence_and_numpy_says_nothing(bad: float) -> None:
    logits = np.array([[9.0, 0.0], [bad, 0.0]])
    sure = calibration_error(logits[:1], np.array([0]))
    assert calibration_error(logits, np.array([0, 1])) == pytest.approx(sure / 2)  # wrong, and not sure of it


def test_agreement_is_judged_on_answers_that_rounding_cannot_change() -> None:
    reference = np.zeros((100, 4), np.float32)
    reference[:, 0], reference[:50, 1] = 10, 9.5  # fifty answers are as good as tied
    tied, lost = reference.copy(), reference.copy()
    tied[:50, 1] = 10.5
    lost[50:60, 1] = 10.5
    labels = np.arange(100) % 2  # what turns is lost as often as it is won
    row = compare("rung", "int8", reference, tied, labels, Classification())
    assert (row["agreement"], row["clear"], row["clear_agreement"], row["ok"]) == (0.5, 0.5, 1.0, True)
    row = compare("rung", "int8", reference, lost, labels, Classification())
    assert (row["agreement"], row["clear_agreement"], row["failed"]) == (0.9, 0.8, ["clear_agreement"])


def test_a_dead_graph_fails_though_no_answer_is_clear() -> None:
    rng = np.random.default_rng(0)
    common = np.array([4.0] * 5 + [-4.0] * 5)  # what all images share makes any two outputs alike
    reference = (common + 0.15 * rng.standard_normal((256, 10))).astype(np.float32)
    dead = np.broadcast_to(common, reference.shape).astype(np.float32)
    row = compare("rung", "int8", reference, dead, None, Classification())
    assert (row["cosine"] > 0.99, row["clear"], row["failed"]) == (True, 0.0, ["covariation"])
    assert "metric_delta" not in row
    row = compare("rung", "int8", reference, dead, reference.argmax(1), Classification())
    assert row["failed"] == ["covariation", "metric_lost"]
    near = (reference + 0.06 * rng.standard_normal(reference.shape)).astype(np.float32)  # rounding turns near ties and is no fault
    assert compare("rung", "int8", reference, near, None, Classification())["ok"]


def test_one_image_with_large_outputs_does_not_hide_the_others() -> None:
    rng = np.random.default_rng(0)
    reference = (1.5 * rng.standard_normal((256, 10))).astype(np.float32)
    reference[0] *= 15
    broken = reference.copy()
    broken[1:] = np.roll(reference[1:], 1, axis=1) * 0.05 + reference[1:] * 0.9 + 0.7 * rng.standard_normal((255, 10))
    row = compare("rung", "int8", reference, broken, None, Classification())
    assert row["clear"] > 0.5
    assert "clear_agreement" in row["failed"]


def test_an_answer_is_clear_where_no_error_of_the_room_on_both_classes_turns_it() -> None:
    outputs = np.array([[3.0, 1.0, 0.0], [3.0, 2.0, 0.0], [0.0, 1.0, 3.0]], np.float32)
    assert Classification().clear(outputs, 0.5).tolist() == [True, False, True]
    assert Classification().clear(outputs[:, :1], 0.5).tolist() == [True] * 3  # one class only: nothing to take it for


def test_the_coarser_of_two_precisions_sets_the_limits() -> None:
    assert coarser("int8", "fp16") == coarser("int8_weights", "int8") == "int8"
    assert coarser("fp32", "fp16") == "fp16"
