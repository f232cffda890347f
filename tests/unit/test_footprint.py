"""Load time and memory come from a fresh child; a late, dead, flooding or lying child is an error and never a number."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgekd.errors import BackendError, DeviceError, FileMissing
from edgekd.profile.device import load_device
from edgekd.profile.footprint import load_facts
from edgekd.profile.transports import local
from edgekd.registry import load

HOST = load_device("host")
FEEDS = {"x": np.zeros((1, 1024), np.float32)}
MIB = 2**20


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A matrix product with 32 MiB of weights."""
    weights = np.ones((1024, 8192), np.float32)
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 1024))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 8192))],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    path = tmp_path / "wide.onnx"
    path.write_bytes(helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString())
    return path


def _child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> local.Local:
    """A transport whose child runs `code` instead of the probe."""
    probe = tmp_path / "probe.py"
    probe.write_text(code)
    monkeypatch.setattr(local, "_PROBE", probe)
    return local.Local()


def test_facts_of_a_real_engine_hold_its_size_and_at_least_its_weights_in_memory(engine: Path) -> None:
    facts = load_facts(engine, "onnxruntime", device=HOST, feeds=FEEDS)
    assert set(facts) == {"file_bytes", "load_ms", "peak_mib"}
    assert facts["file_bytes"] == engine.stat().st_size
    assert 30 < facts["peak_mib"] < 300  # the weights are 32 MiB; torch alone, if it were counted, would be more
    assert facts["load_ms"] > 0


def test_an_engine_that_the_child_cannot_run_is_a_backend_error_with_its_reason(engine: Path) -> None:
    with pytest.raises(BackendError, match="cannot run this input"):
        load_facts(engine, "onnxruntime", device=HOST, feeds={"z": FEEDS["x"]})


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("images", [1, 3])
def test_loading_ends_when_the_engine_is_ready_for_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, images: int
) -> None:
    import importlib

    if (reason := load("backend", backend)().available()) is not None:
        pytest.skip(reason)
    from edgekd.profile import probe

    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", 4))],
    )
    path = tmp_path / "any.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString())
    module, what = importlib.import_module(f"edgekd.backends.{backend}"), {"onnxruntime": "_session", "openvino": "_compiled"}[backend]
    seen, build, clock = [], getattr(module, what), probe.time.perf_counter_ns
    monkeypatch.setattr(module, what, lambda *a, **k: [seen.append("built"), build(*a, **k)][1])
    monkeypatch.setattr(probe.time, "perf_counter_ns", lambda: [seen.append("clock"), clock()][1])
    probe.load_and_run(backend, str(path), "host", 1, {}, {"x": ("float32", [images, 4])})
    assert seen == ["clock", "built", "clock"]


def test_a_missing_engine_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileMissing, match=r"gone\.onnx"):
        load_facts(tmp_path / "gone.onnx", "onnxruntime", device=HOST, feeds=FEEDS)


def test_the_registry_knows_the_transport() -> None:
    assert load("transport", "local") is local.Local


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("", "not JSON"),
        ("print('[1, 2]')", "not a flat object"),
        ("print('{\"load_ms\": NaN}')", "not a flat object"),
        ("print('{\"load_ms\": Infinity}')", "not a flat object"),
        ('print(\'{"load_ms": {"deep": 1}}\')', "not a flat object"),
        ("print('[' * 100000)", "not JSON"),
        ("print('x' * 2_000_000)", "too long"),
        ("import os; os._exit(3)", "ended with status 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended with status -9"),
        ("import time; time.sleep(60)", "said nothing for 0.5 s"),
    ],
)
def test_a_child_that_is_late_dead_or_lying_is_a_device_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    with pytest.raises(DeviceError, match=said):
        _child(tmp_path, monkeypatch, code).ask({}, timeout_s=0.5 if "sleep" in code else 20)


@pytest.mark.parametrize("reply", [{"load_ms": 1.0}, {"load_ms": "1", "peak_mib": 2.0}])
def test_a_reply_without_its_numbers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Path, reply: dict[str, object]
) -> None:
    transport = _child(tmp_path, monkeypatch, f"print({json.dumps(json.dumps(reply))})")
    with pytest.raises(DeviceError, match="left out a number"):
        load_facts(engine, "onnxruntime", device=HOST, feeds=FEEDS, transport=transport)


def test_the_child_sees_no_secrets_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKD_TEST_SECRET", "s3cret")
    transport = _child(tmp_path, monkeypatch, "import os, json; print(json.dumps({'env': ' '.join(os.environ)}))")
    assert "EDGEKD_TEST_SECRET" not in transport.ask({}, timeout_s=20)["env"]
