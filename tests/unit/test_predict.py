"""The roofline against hand-computed tiny graphs: operations, bytes, fusion, precision, threads, null fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgekd.errors import DeviceError, OnnxRefused, UsageError
from edgekd.profile.device import device_ids, load_device
from edgekd.profile.predict import predict
from edgekd.profile.schema import DeviceProfile
from edgekd.profile.workload import works

Dims = tuple[int | str, ...]


def _model(
    nodes: list[Any], inputs: dict[str, Dims], outputs: list[str], weights: dict[str, np.ndarray], opset: int = 17
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, d) for n, d in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [onnx.numpy_helper.from_array(w, n) for n, w in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def _f32(*dims: int) -> np.ndarray:
    return np.ones(dims, np.float32)


def _conv(
    batch: int | str = 1, wide: int = 16, out: int = 32, size: int = 8, kernel: int = 3, groups: int = 1, relu: bool = False
) -> onnx.ModelProto:
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[kernel // 2] * 4, group=groups)]
    nodes += [helper.make_node("Relu", ["c"], ["y"])] if relu else []
    weights = {"w": _f32(out, wide // groups, kernel, kernel), "b": _f32(out)}
    return _model(nodes, {"x": (batch, wide, size, size)}, ["y" if relu else "c"], weights)


def _device(kind: str = "dgpu", cores: int | None = None, **sections: dict[str, Any]) -> DeviceProfile:
    """1 TFLOPS fp32, 2 fp16, 4 TOPS int8, 100 GB/s, every efficiency 0.5, no launch cost: numbers to compute with in the head."""
    raw: dict[str, Any] = {
        "schema": "edgekd.device/1", "id": "toy", "variant": "v", "name": "toy", "vendor": "none", "kind": kind, "confidence": "medium",
        "arch": {"cores": cores} if cores else {}, "runtimes": [{"name": "onnxruntime"}], "memory": {"bandwidth_gbs": 100.0},
        "compute": {"fp32_tflops": 1.0, "fp16_tflops": 2.0, "int8_tops": 4.0}, "overheads_us": {"launch": 0.0},
        "efficiency": dict.fromkeys(("gemm", "conv3x3", "conv1x1", "depthwise", "attention", "eltwise_bw"), 0.5),
    }  # fmt: skip
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    numbers = {
        f"{s}.{f}": v for s in ("arch", "compute", "memory", "overheads_us", "efficiency") for f, v in raw[s].items() if v is not None
    }
    raw["provenance"] = [
        {"field": f, "value": v, "source": "a test", "kind": "derived", "checked": "2026-11-22"} for f, v in numbers.items()
    ]
    return DeviceProfile.model_validate(raw)


# ------------------------------------------------------------------------------------------------ what a graph asks for
def test_convolution_counts_two_operations_per_multiply_add_and_every_byte_once() -> None:
    (work,) = works(_conv())
    assert work.flops == 2 * (32 * 8 * 8) * 16 * 9
    assert work.weight_bytes == 4 * (32 * 16 * 9 + 32)
    assert work.activation_bytes == 4 * (16 * 8 * 8 + 32 * 8 * 8)
    assert (work.op_class, work.precision, work.out_width, work.group_width) == ("conv3x3", "fp32", 32, 0)


@pytest.mark.parametrize(
    ("options", "op_class", "flops"),
    [
        ({"kernel": 1}, "conv1x1", 2 * 32 * 64 * 16),
        ({"out": 16, "groups": 16}, "depthwise", 2 * 16 * 64 * 9),
        ({"out": 16, "groups": 4}, "conv3x3", 2 * 16 * 64 * 4 * 9),
        ({"kernel": 5}, "conv3x3", 2 * 32 * 64 * 16 * 25),
    ],
)
def test_convolutions_are_classified_by_kernel_and_groups(options: dict[str, int], op_class: str, flops: float) -> None:
    (work,) = works(_conv(**options))  # type: ignore[arg-type]
    assert (work.op_class, work.flops) == (op_class, flops)


def test_an_activation_joins_the_convolution_and_moves_no_bytes() -> None:
    (plain,), (fused,) = works(_conv()), works(_conv(relu=True))
    assert fused.op_types == ("Conv", "Relu")
    assert fused.activation_bytes == plain.activation_bytes


def test_a_residual_is_read_and_its_addition_fused() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        helper.make_node("Add", ["c", "x"], ["s"]),
        helper.make_node("Relu", ["s"], ["y"]),
    ]
    (work,) = works(_model(nodes, {"x": (1, 8, 4, 4)}, ["y"], {"w": _f32(8, 8, 3, 3)}))
    assert work.op_types == ("Conv", "Add", "Relu")
    assert work.activation_bytes == 4 * 2 * 8 * 16  # x is read once, y written


def test_a_tensor_that_others_read_is_written_although_its_activation_is_fused() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["c"], ["y"]),
    ]
    conv, pool = works(_model(nodes, {"x": (1, 8, 4, 4)}, ["r", "y"], {"w": _f32(8, 8, 3, 3)}))
    assert conv.activation_bytes == 4 * 3 * 8 * 16
    assert pool.activation_bytes == 4 * (8 * 16 + 8)


def test_a_broadcast_gate_is_a_kernel_of_its_own() -> None:
    """Squeeze-and-excitation: the product with a 1x1 gate needs the gate first."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Conv", ["p", "v"], ["g"]),
        helper.make_node("Sigmoid", ["g"], ["s"]),
        helper.make_node("Mul", ["c", "s"], ["y"]),
    ]
    found = works(_model(nodes, {"x": (1, 8, 4, 4)}, ["y"], {"w": _f32(8, 8, 3, 3), "v": _f32(8, 8, 1, 1)}))
    assert [w.op_types for w in found] == [("Conv",), ("GlobalAveragePool",), ("Conv", "Sigmoid"), ("Mul",)]
    assert found[2].costly == 8


@pytest.mark.parametrize(("right", "op_class"), [("w", "gemm"), ("z", "attention")])
def test_matrix_products_are_gemm_with_a_weight_and_attention_without(right: str, op_class: str) -> None:
    node = helper.make_node("MatMul", ["x", right], ["y"])
    (work,) = works(_model([node], {"x": (1, 7, 32), "z": (1, 32, 5)}, ["y"], {"w": _f32(32, 5)}))
    assert (work.op_class, work.flops) == (op_class, 2 * 7 * 5 * 32)


def test_gemm_with_transposed_inputs_counts_the_shared_dimension() -> None:
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transA=1, transB=1)
    (work,) = works(_model([node], {"x": (32, 7)}, ["y"], {"w": _f32(5, 32), "b": _f32(5)}))
    assert work.flops == 2 * 7 * 5 * 32


def test_transposed_convolution_counts_each_input_element_against_every_tap() -> None:
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])
    (work,) = works(_model([node], {"x": (1, 16, 4, 4)}, ["y"], {"w": _f32(16, 8, 2, 2)}))
    assert (work.flops, work.out_width) == (2 * (16 * 16) * 8 * 4, 8)


def test_reshapes_cost_nothing_and_hide_nothing() -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["m"]),
        helper.make_node("Flatten", ["m"], ["f"]),
        helper.make_node("Relu", ["f"], ["y"]),
    ]
    (work,) = works(_model(nodes, {"x": (2, 3, 4)}, ["y"], {"w": _f32(4, 5), "shape": np.array([6, 4])}))
    assert work.op_types == ("MatMul", "Relu")
    assert work.activation_bytes == 4 * (6 * 4 + 6 * 5)


def _int8_conv() -> onnx.ModelProto:
    """x -> Q -> DQ -> Conv(DQ(w)) -> Relu -> Q -> DQ -> y."""
    scale, zero = np.float32(0.1), np.uint8(0)
    quantize = lambda i, o: helper.make_node("QuantizeLinear", [i, "s", "z"], [o])  # noqa: E731
    widen = lambda i, o, z="z": helper.make_node("DequantizeLinear", [i, "s", z], [o])  # noqa: E731
    nodes = [
        quantize("x", "xq"), widen("xq", "xd"), widen("wq", "wd", "zw"), helper.make_node("Conv", ["xd", "wd"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]), quantize("r", "rq"), widen("rq", "y"),
    ]  # fmt: skip
    weights = {"wq": np.ones((32, 16, 3, 3), np.int8), "s": scale, "z": zero, "zw": np.int8(0)}
    return _model(nodes, {"x": (1, 16, 8, 8)}, ["y"], {k: np.asarray(v) for k, v in weights.items()})


def test_quantized_convolution_runs_at_int8_and_moves_bytes_not_floats() -> None:
    first, conv = works(_int8_conv())
    assert first.op_types == ("QuantizeLinear",)
    assert first.activation_bytes == 16 * 64 * (4 + 1)
    assert (conv.op_types, conv.precision) == (("Conv", "Relu", "QuantizeLinear"), "int8")
    assert conv.activation_bytes == 16 * 64 + 32 * 64
    assert conv.weight_bytes == pytest.approx(32 * 16 * 9, abs=16)  # and the scales


def test_only_weights_in_int8_is_not_an_int8_kernel() -> None:
    nodes = [helper.make_node("DequantizeLinear", ["wq", "s"], ["w"]), helper.make_node("MatMul", ["x", "w"], ["y"])]
    (work,) = works(_model(nodes, {"x": (4, 16)}, ["y"], {"wq": np.ones((16, 8), np.int8), "s": np.asarray(np.float32(1))}))
    assert (work.precision, work.weight_bytes, work.op_class) == ("fp32", 16 * 8, "gemm")


def test_half_precision_graph_is_seen_as_fp16() -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = _model([node], {"x": (4, 16)}, ["y"], {"w": _f32(16, 8).astype(np.float16)})
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    (work,) = works(model)
    assert (work.precision, work.activation_bytes) == ("fp16", 2 * (64 + 32))


def test_a_free_batch_is_filled_and_a_fixed_one_is_not_changed() -> None:
    (one,), (eight,) = works(_conv(batch="n")), works(_conv(batch="n"), batch=8)
    assert eight.flops == 8 * one.flops
    assert eight.weight_bytes == one.weight_bytes
    with pytest.raises(UsageError, match="batch is fixed to 2, not 8"):
        works(_conv(batch=2), batch=8)


def test_shapes_written_by_the_exporter_for_another_batch_are_not_believed() -> None:
    model = _conv(batch="n", relu=True)
    model.graph.value_info.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, (1, 32, 8, 8)))
    assert works(model, batch=4)[0].flops == 4 * works(model)[0].flops


def test_unknown_shapes_are_refused_not_guessed() -> None:
    strange = helper.make_node("Mystery", ["x"], ["y"], domain="com.microsoft")
    model = _model([strange], {"x": (1, 8)}, ["y"], {})
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(OnnxRefused, match="shape of 'y' cannot be inferred"):
        works(model)
    with pytest.raises(OnnxRefused, match="free dimension besides the batch"):
        works(_model([helper.make_node("Relu", ["x"], ["y"])], {"x": (1, 3, "h", "w")}, ["y"], {}))


# ------------------------------------------------------------------------------------------------ what a device makes of it
def test_compute_bound_layer_takes_operations_over_reached_peak() -> None:
    found = predict(_conv(wide=64, out=64, size=32), _device())
    assert found.p50_ms == pytest.approx(2 * 64 * 32 * 32 * 64 * 9 / (1e12 * 0.5) * 1e3)
    assert found.layers[0].bound == "compute"


def test_memory_bound_layer_takes_bytes_over_reached_bandwidth() -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    found = predict(_model([node], {"x": (1, 2048)}, ["y"], {"w": _f32(2048, 1000)}), _device())
    assert found.p50_ms == pytest.approx(4 * (2048 * 1000 + 2048 + 1000) / (100e9 * 0.5) * 1e3)
    assert found.layers[0].bound == "memory"


def test_launches_and_the_session_are_added() -> None:
    still = predict(_conv(size=2), _device())
    slow = predict(_conv(size=2), _device(overheads_us={"launch": 7.0, "session_run": 30.0}))
    assert slow.p50_ms - still.p50_ms == pytest.approx(0.037)
    assert slow.layers[0].bound == "launch"


def test_int8_runs_at_the_int8_peak() -> None:
    quick = predict(_int8_conv(), _device(memory={"bandwidth_gbs": 1e6})).layers[1].us
    plain = predict(_conv(), _device(memory={"bandwidth_gbs": 1e6})).layers[0].us
    assert plain / quick == pytest.approx(4 * 0.7)  # four times the peak, of which int8 kernels reach 0.7 on GPUs


def test_widths_are_filled_up_to_the_device_quantum() -> None:
    device = _device(preferred={"channel_multiple": {"fp32": 16}}, memory={"bandwidth_gbs": 1e6})
    ragged, full = predict(_conv(out=33), device), predict(_conv(out=48), device)
    assert ragged.p50_ms == pytest.approx(full.p50_ms)


def test_depthwise_width_that_is_no_multiple_of_four_is_several_times_slower_on_cpus() -> None:
    cpu = _device("cpu", cores=1, compute={"fp32_tflops": 0.01})
    odd, even = (predict(_conv(wide=n, out=n, groups=n, size=14), cpu).p50_ms for n in (97, 96))
    assert 5 < odd / even < 8


def test_threads_scale_a_cpu_up_to_its_cores_and_leave_a_gpu_alone() -> None:
    model, cpu, gpu = _conv(wide=64, out=64, size=32), _device("cpu", cores=4), _device()
    one, two, four, many = (predict(model, cpu, threads=t) for t in (1, 2, 4, 64))
    assert one.p50_ms == pytest.approx(2 * two.p50_ms)
    assert four.p50_ms == many.p50_ms
    assert many.threads == 4
    assert predict(model, gpu, threads=1).p50_ms == predict(model, gpu, threads=8).p50_ms


def test_weights_that_stay_in_the_cache_are_read_faster_than_from_memory() -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = _model([node], {"x": (1, 1024)}, ["y"], {"w": _f32(1024, 1024)})
    roomy, tight = (predict(model, _device("cpu", cores=1, memory={"llc_kib": kib})).p50_ms for kib in (65536.0, 512.0))
    assert roomy < tight / 2


@pytest.mark.parametrize(
    ("section", "field", "model"),
    [("compute", "fp32_tflops", _conv()), ("compute", "int8_tops", _int8_conv()), ("memory", "bandwidth_gbs", _conv())],
)
def test_a_null_field_that_is_needed_is_named(section: str, field: str, model: onnx.ModelProto) -> None:
    with pytest.raises(DeviceError, match=rf"{section}\.{field} of device 'toy' is null") as error:
        predict(model, _device(**{section: {field: None}}))
    assert error.value.exit_code == 5


def test_a_null_field_that_is_not_needed_does_not_matter() -> None:
    assert predict(_conv(), _device(compute={"fp16_tflops": None, "int8_tops": None})).p50_ms > 0


def test_figure_is_labelled_and_its_interval_wide_unless_measured() -> None:
    found = predict(_conv(), _device())
    assert found.label == "predicted"
    assert (found.low_ms, found.high_ms) == (pytest.approx(found.p50_ms / 3), pytest.approx(found.p50_ms * 3))
    assert "assumed" in found.basis
    assert found.as_dict()["label"] == "predicted"


def test_prediction_is_finite_for_every_shipped_device() -> None:
    for name in device_ids():
        found = predict(_conv(), load_device(name))
        assert 0 < found.low_ms < found.p50_ms < found.high_ms


def test_a_file_is_checked_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(_conv().SerializeToString())
    assert predict(path, _device(), trusted=True).p50_ms == predict(_conv(), _device()).p50_ms
    path.write_bytes(b"not a model")
    with pytest.raises(OnnxRefused, match=r"m\.onnx"):
        predict(path, _device(), trusted=True)
