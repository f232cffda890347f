"""Every backend of the folder keeps the contract of edgekd/backends: convert, open, run, refuse; one that is missing says how to get it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgekd.backends import openvino
from edgekd.backends.onnxruntime import OnnxRuntime
from edgekd.errors import BackendError
from edgekd.profile.device import device_ids, load_device
from edgekd.registry import FOLDERS, load, names

BACKENDS = names("backend")
HOST = load_device("host")
X = np.arange(-6, 6, dtype=np.float32).reshape(1, 12)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """y = relu(x @ W) with W all ones."""
    weights = [onnx.numpy_helper.from_array(np.ones((12, 3), np.float32), "w")]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"], name="product"), helper.make_node("Relu", ["m"], ["y"])]
    body = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 12))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 3))],
        weights,
    )
    path = tmp_path / "tiny.onnx"
    path.write_bytes(helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString())
    return path


def _usable(name: str) -> Any:
    backend = load("backend", name)()
    reason = backend.available()
    if reason is not None:
        pytest.skip(reason)
    if not backend.runs_on(HOST):
        pytest.skip(f"{name} cannot run for this machine's profile")
    return backend


def _engine(backend: Any, graph: Path, tmp_path: Path) -> Path:
    out = tmp_path / "engine"
    out.mkdir()
    return out / backend.convert(graph, HOST, out, {})["model_file"]


def test_the_registry_lists_every_backend_file() -> None:
    folder = Path(sys.modules["edgekd.registry"].__file__ or "").parent / FOLDERS["backend"]
    assert set(BACKENDS) == {p.stem for p in folder.glob("*.py") if p.stem[0] != "_"}
    assert "onnxruntime" in BACKENDS


@pytest.mark.parametrize("name", BACKENDS)
def test_backend_says_whether_it_is_usable_and_which_version_without_importing_its_runtime(name: str) -> None:
    code = (
        f"import sys, json; from edgekd.registry import load; b = load('backend', {name!r})();"
        "loaded = sorted({'onnxruntime', 'tensorrt', 'tensorrt_rtx_bindings', 'openvino', 'torch', 'onnx'} & set(sys.modules));"
        "sys.stdout.write(json.dumps([b.name, b.suffix, b.available(), b.version(), loaded]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    own, suffix, reason, version, imported = json.loads(done.stdout)
    assert own == name
    assert suffix.startswith(".")
    assert imported == []
    assert (reason is None and version != "none") or "install" in reason


@pytest.mark.parametrize("name", BACKENDS)
def test_converted_engine_opens_and_computes_the_graph(name: str, graph: Path, tmp_path: Path) -> None:
    backend = _usable(name)
    engine = _engine(backend, graph, tmp_path)
    session = backend.open(engine, threads=1, device=HOST)
    assert engine.suffix == (backend.suffix if backend.builds else ".onnx")
    assert (session.input_names, session.output_names) == (["x"], ["y"])
    (y,) = session.run({"x": X})
    np.testing.assert_allclose(y, np.maximum(X @ np.ones((12, 3), np.float32), 0), rtol=1e-3)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_session_takes_batches_of_any_size_in_any_order(name: str, graph: Path, tmp_path: Path) -> None:
    backend, model = _usable(name), onnx.load(graph)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(model, graph)
    session = backend.open(_engine(backend, graph, tmp_path), threads=1, device=HOST)
    rng = np.random.default_rng(0)
    for batch in (1, 3, 1, 2, 3):
        x = rng.standard_normal((batch, 12), dtype=np.float32)
        (y,) = session.run({"x": x})
        np.testing.assert_allclose(y, np.maximum(x @ np.ones((12, 3), np.float32), 0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_inputs_that_do_not_fit_and_closed_sessions_are_backend_errors(name: str, graph: Path, tmp_path: Path) -> None:
    backend = _usable(name)
    session = backend.open(_engine(backend, graph, tmp_path), threads=1, device=HOST)
    for wrong in ({}, {"z": X}, {"x": X[:, :5]}, {"x": X.astype(np.float64)}):
        with pytest.raises(BackendError):
            session.run(wrong)
    session.close()
    with pytest.raises(BackendError, match="closed"):
        session.run({"x": X})


@pytest.mark.parametrize("name", BACKENDS)
def test_a_signal_still_reaches_its_handler_after_sessions_are_gone(name: str, graph: Path, tmp_path: Path) -> None:
    """A runtime that leaves a dead signal stack behind would turn the next Ctrl-C into a crash."""
    engine = _engine(_usable(name), graph, tmp_path)
    program = f"""
import gc, os, signal, sys
import numpy as np
from pathlib import Path
from edgekd.profile.device import load_device
from edgekd.registry import load
sessions = [load("backend", {name!r})().open(Path({str(engine)!r}), threads=1, device=load_device("host")) for _ in range(2)]
while sessions:  # in the order in which they were opened
    session = sessions.pop(0)
    session.run({{"x": np.zeros((1, 12), np.float32)}})
    session.close()
    del session
    gc.collect()
signal.signal(signal.SIGINT, lambda *_: sys.stdout.write("handled"))
os.kill(os.getpid(), signal.SIGINT)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2], check=False
    )
    assert (done.returncode, done.stdout) == (0, "handled"), done.stderr


@pytest.mark.parametrize("name", BACKENDS)
def test_a_graph_that_cannot_be_built_is_a_backend_error_at_conversion(name: str, tmp_path: Path) -> None:
    backend = _usable(name)
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"\x08\x09not a graph")
    with pytest.raises(BackendError, match=r"bad\.onnx") as error:
        backend.convert(bad, HOST, tmp_path, {})
    assert error.value.exit_code == 5


@pytest.mark.parametrize("name", BACKENDS)
def test_unknown_option_is_refused(name: str, graph: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no option 'turbo'"):
        _usable(name).convert(graph, HOST, tmp_path, {"turbo": True})


@pytest.mark.parametrize("name", BACKENDS)
def test_backend_runs_for_no_device_but_this_machine(name: str) -> None:
    backend = load("backend", name)()
    assert not any(backend.runs_on(load_device(d)) for d in device_ids()[1:])


def test_onnxruntime_keeps_the_file_as_it_is(graph: Path, tmp_path: Path) -> None:
    assert _engine(OnnxRuntime(), graph, tmp_path).read_bytes() == graph.read_bytes()


# ------------------------------------------------------------------------------------------------------------ ORT format
@pytest.fixture
def convolution(tmp_path: Path) -> Path:
    """y = conv(x) in int8, symmetric in activations and weights, then a convolution in fp32: what this machine's kernels would tempt onnxruntime to."""
    rng, near = np.random.default_rng(0), onnx.numpy_helper.from_array
    held = [
        near(rng.integers(-127, 127, (16, 16, 3, 3), dtype=np.int8), "q"),
        near(rng.standard_normal((16, 16, 3, 3), dtype=np.float32), "w"),
        near(np.float32(0.02), "s"),
        near(np.int8(0), "z"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["qd"]),
        helper.make_node("Conv", ["xd", "qd"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "s", "z"], ["cd"]),
        helper.make_node("Conv", ["cd", "w"], ["y"], pads=[1, 1, 1, 1]),
    ]
    body = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 16, 8, 8))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 16, 8, 8))],
        held,
    )
    path = tmp_path / "convolution.onnx"
    path.write_bytes(helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString())
    return path


def _ort(graph: Path, device: str, out: Path) -> Path:
    out.mkdir()
    return out / OnnxRuntime().convert(graph, load_device(device), out, {"format": "ort"})["model_file"]


@pytest.mark.parametrize("device", ["host", "rpi5"])
def test_an_ort_file_computes_the_graph_beside_it_and_lists_what_a_minimal_build_needs(
    device: str, convolution: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from onnxruntime.tools.reduced_build_config_parser import parse_config

    engine = _ort(convolution, device, tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    assert sorted(p.name for p in engine.parent.iterdir()) == ["model.onnx", "model.ort", "required_operators.config"]
    assert engine.read_bytes()[4:8] == b"ORTM"
    assert (engine.parent / "model.onnx").read_bytes() == convolution.read_bytes()
    x = {"x": np.random.default_rng(1).standard_normal((1, 16, 8, 8), dtype=np.float32)}
    found, wanted = (OnnxRuntime().open(f, threads=1, device=HOST).run(x)[0] for f in (engine, convolution))
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())  # another order of sums
    assert {layer.op_type for layer in OnnxRuntime().layers(engine, x, 1, HOST)} >= {"Conv", "QLinearConv"}
    operators, _ = parse_config(str(engine.parent / "required_operators.config"))  # the reader of onnxruntime's build
    assert operators["ai.onnx"][11] == {"Conv"}
    assert str(tmp_path) not in (engine.parent / "required_operators.config").read_text()
    assert str(tmp_path).encode() not in engine.read_bytes()


@pytest.mark.parametrize("device", ["host", "rpi5", "x86-vnni"])
def test_no_ort_file_has_weights_in_the_order_of_this_machines_vectors(device: str, convolution: Path, tmp_path: Path) -> None:
    """On an x86 CPU with shorter vectors such a file gives wrong outputs without an error."""
    from edgekd.backends.onnxruntime import _save_operators, _session, _settings

    engine = _ort(convolution, device, tmp_path / "out")
    assert "nchwc" not in (engine.parent / "required_operators.config").read_text()
    if "x86-64" in HOST.arch.isa:  # left to itself, onnxruntime would write them
        settings = _settings(1)
        settings.optimized_model_filepath = str(tmp_path / "own.ort")
        settings.add_session_config_entry("session.save_model_format", "ORT")
        _session(convolution, settings, "CPUExecutionProvider")
        _save_operators(tmp_path / "own.ort", tmp_path / "own.config")
        assert "com.microsoft.nchwc" in (tmp_path / "own.config").read_text()


@pytest.mark.parametrize(("device", "type_"), [("rpi5", "int8_t"), ("x86-vnni", "uint8_t")])
def test_an_ort_file_keeps_signed_activations_for_arm_and_makes_them_unsigned_for_x86_wherever_it_is_made(
    device: str, type_: str, convolution: Path, tmp_path: Path
) -> None:
    from onnxruntime.tools.ort_format_model import create_config_from_models

    engine = _ort(convolution, device, tmp_path / "out")
    create_config_from_models([engine], tmp_path / "typed.config", True)
    assert f'QLinearConv{{"inputs": {{"0": ["{type_}"]}}}}' in (tmp_path / "typed.config").read_text()


def test_an_ort_file_for_a_gpu_is_refused(convolution: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="ORT-format files are for CPUs, rtx4090 runs CUDAExecutionProvider"):
        OnnxRuntime().convert(convolution, load_device("rtx4090"), tmp_path, {"format": "ort"})


# ------------------------------------------------------------------------------------------------------------ providers
class FellBack:
    """An onnxruntime that lists CUDA and then quietly uses the CPU."""

    class SessionOptions: ...

    class ExecutionMode:
        ORT_SEQUENTIAL = 0

    class InferenceSession:
        def __init__(self, *args: Any, **kwargs: Any): ...

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    @staticmethod
    def get_available_providers() -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    @staticmethod
    def set_default_logger_severity(level: int) -> None: ...


class CpuOnly(FellBack):
    @staticmethod
    def get_available_providers() -> list[str]:
        return ["CPUExecutionProvider"]


@pytest.mark.parametrize(("runtime", "said"), [(FellBack, "fell back to CPUExecutionProvider"), (CpuOnly, "has no CUDAExecutionProvider")])
def test_another_provider_than_the_device_asks_for_is_an_error_never_a_fallback(
    runtime: type, said: str, graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekd.backends.onnxruntime._runtime", runtime)
    with pytest.raises(BackendError, match=said) as error:
        OnnxRuntime().open(graph, threads=1, device=load_device("rtx4090"))
    assert "CUDAExecutionProvider" in str(error.value)
    assert error.value.hint == "edgekd doctor"


def test_onnxruntime_names_its_operators_with_their_shares(graph: Path) -> None:
    layers = OnnxRuntime().layers(graph, {"x": X}, threads=1, device=load_device("host"))
    assert {layer.op_type for layer in layers} >= {"Relu"}
    assert sum(layer.share for layer in layers) == pytest.approx(1.0)
    assert all(layer.calls == 1 and layer.total_us >= 0 for layer in layers)
    assert [layer.total_us for layer in layers] == sorted((layer.total_us for layer in layers), reverse=True)


def test_openvino_opens_a_graph_that_it_fuses_wrongly_with_a_plan_that_fuses_nothing(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, compiled = _usable("openvino"), openvino._compiled

    class Wrong:
        def __init__(self, plan: Any):
            self.plan = plan

        def __call__(self, feeds: Any) -> dict[int, Any]:
            return {0: 1.1 * next(iter(self.plan(feeds).values()))}

    def faulty(model: Any, settings: dict[str, Any], where: str) -> Any:
        plan = compiled(model, settings, where)
        return plan if model.is_dynamic() or "SNIPPETS_MODE" in settings else Wrong(plan)

    dynamic = onnx.load(graph)
    for value in (*dynamic.graph.input, *dynamic.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(dynamic, graph)
    out = tmp_path / "engine"
    out.mkdir()
    assert "beside" not in backend.convert(graph, HOST, out, {})
    with monkeypatch.context() as patch:
        patch.setattr(openvino, "_compiled", faulty)
        meta = backend.convert(graph, HOST, out, {})
        assert meta["beside"] == ["openvino.json"]
        assert "fuses operators of this graph wrongly" in meta["note"]
        assert "SNIPPETS_MODE" in meta["usage"]
        [found] = backend.open(out / "model.onnx", threads=1, device=HOST).run({"x": X})
        assert np.allclose(found, np.maximum(X @ np.ones((12, 3), np.float32), 0))
    backend.convert(graph, HOST, out, {})
    assert not (out / "openvino.json").exists()
