"""Engines as they run and are refused on a GPU, with a fake of the bindings whose names are the real ones (test_tensorrt_api.py); progress of real builds."""

from __future__ import annotations

import ast
import itertools
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from edgekd.backends import watched
from edgekd.backends._trt_callbacks import Progress, log_of
from edgekd.backends._trt_session import layer_table
from edgekd.backends.tensorrt import TensorRT
from edgekd.backends.tensorrt_rtx import TensorRTForRTX
from edgekd.console import Console
from edgekd.errors import BackendError
from edgekd.export.onnx import export_onnx
from edgekd.profile.device import load_device
from tests.fake_tensorrt import INPUT, LAYERS, OUTPUT, REFUSALS, on_the_cpu

PACKAGE = Path(sys.modules["edgekd"].__file__ or "").parent
JETSON, RTX = load_device("jetson-orin-nano"), load_device("rtx4090")
X = np.full((2, 3, 16, 16), 7, np.float32)
needs_rtx = pytest.mark.skipif(TensorRTForRTX().available() is not None, reason=str(TensorRTForRTX().available()))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_the_cpu(monkeypatch)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "model.engine"
    path.write_bytes(b"fake engine")
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny") / "model.onnx"
    export_onnx(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 14 * 14, 4)).eval(), 16, path)
    return path


# ------------------------------------------------------------------------------------------------------------ running
def test_an_engine_runs_refuses_wrong_inputs_and_closes(gpu: None, engine: Path) -> None:
    session = TensorRT().open(engine, threads=1, device=JETSON)
    assert (session.input_names, session.output_names) == ([INPUT], [OUTPUT])
    np.testing.assert_array_equal(session.run({INPUT: X})[0], [[0, 7, 14, 21], [0, 7, 14, 21]])
    for wrong in ({}, {"z": X}, {INPUT: X[0]}, {INPUT: X.astype(np.float64)}):
        with pytest.raises(BackendError):
            session.run(wrong)
    session.close()
    with pytest.raises(BackendError, match="closed"):
        session.run({INPUT: X})


def test_only_a_version_compatible_engine_may_bring_its_own_runtime(gpu: None, engine: Path) -> None:
    engine.write_bytes(b"fake engine and a lean runtime")
    lasting = {"version_compatible": True}
    assert TensorRT().open(engine, threads=1, device=JETSON, options=lasting).output_names == [OUTPUT]
    for options in (None, {}, {"version_compatible": False}):
        with pytest.raises(BackendError, match="the engine cannot be opened"):
            TensorRT().open(engine, threads=1, device=JETSON, options=options)


class Logger:
    """Of a script's own."""

    ERROR = 0

    def __init__(self, level: int): ...


def test_build_py_allows_host_code_to_a_version_compatible_engine_alone() -> None:
    script = runpy.run_path(str(PACKAGE / "templates" / "build.py"))
    for lasting in (True, False):
        runtime = SimpleNamespace(deserialize_cuda_engine=lambda _: None)
        trt = SimpleNamespace(Logger=Logger, Runtime=lambda _, it=runtime: it)
        with pytest.raises(SystemExit, match="does not load on this GPU"):
            script["run"](trt, b"plan", {"build": {"options": {"version_compatible": lasting}}}, None)
        assert runtime.engine_host_code_allowed is lasting


def opened_without_options(source: str) -> list[int]:
    """Lines that open what a backend converted and do not say how it was built; onnxruntime's graphs are not built."""
    calls = [
        n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == "open"
    ]
    names = {call: {k.arg for k in call.keywords} for call in calls}
    return [c.lineno for c in calls if "device" in names[c] and "options" not in names[c] and "onnxruntime" not in ast.unparse(c.func)]


@pytest.mark.parametrize("file", sorted((PACKAGE / "stages").glob("*.py")), ids=lambda p: p.stem)
def test_every_stage_says_how_the_engine_that_it_opens_was_built(file: Path) -> None:
    """Else a target with version_compatible stops there: its engines may bring no host code."""
    assert opened_without_options(file.read_text(encoding="utf-8")) == []
    assert opened_without_options("s = backend.open(file, threads=1, device=device)") == [1]  # the check can fail


def test_layers_have_their_times_types_precisions_and_formats(gpu: None, engine: Path) -> None:
    conv, head = TensorRT().layers(engine, {INPUT: X}, 1, JETSON)
    assert (conv.name, conv.op_type, conv.precision) == ("conv + relu", "CaskConvolution", "fp32 -> int8")
    assert conv.format == "Thirty-two wide channel vectorized row major Int8 format."
    assert (conv.total_us, conv.share, conv.calls) == (pytest.approx(300), pytest.approx(0.75), 1)
    assert (head.precision, head.format) == ("fp16", "Row major linear FP16 format (kLINEAR)")  # the fields of TensorRT 11


@pytest.mark.parametrize(
    "told", ["", "no JSON", "[]", "{}", '{"Layers": 3}', '{"Layers": ["a", 3, {}]}', json.dumps({"Layers": [{"Name": "a"}]})]
)
def test_whatever_the_inspector_says_the_times_stay(told: str) -> None:
    rows = {layer.name: layer for layer in layer_table({"a": [1.0, 3.0]}, told, 2)}
    assert (rows["a"].total_us, rows["a"].share, rows["a"].calls) == (2000, 1, 1)


def test_layers_that_were_not_timed_are_listed_with_no_share() -> None:
    rows = layer_table({}, json.dumps({"Layers": [*LAYERS, "only a name"]}), 20)
    assert [(r.name, r.total_us, r.share) for r in rows] == [("conv + relu", 0, 0), ("head", 0, 0), ("only a name", 0, 0)]


# ------------------------------------------------------------------------------------------------------------ refusals
MEANT = {b"vold": "built with another version", b"agpu": "built for another GPU", b"driv": "CUDA driver is missing, or older"}


@pytest.mark.parametrize("kind", REFUSALS)
def test_an_engine_that_does_not_fit_says_why_and_how_to_build_it_again(gpu: None, engine: Path, kind: bytes) -> None:
    engine.write_bytes(kind)
    with pytest.raises(BackendError, match=MEANT[kind]) as error:
        TensorRT().open(engine, threads=1, device=JETSON)
    assert error.value.exit_code == 5
    assert error.value.hint == "edgekd doctor" if kind == b"driv" else "verify FOLDER --build" in str(error.value.hint)


def test_an_engine_that_is_not_there_is_a_backend_error(gpu: None, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="cannot be read"):
        TensorRT().open(tmp_path / "model.engine", threads=1, device=JETSON)


@needs_rtx
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda plan: plan[: len(plan) // 2], "cut short, or longer"),
        (lambda plan: plan[:64], "cut short, or longer"),
        (lambda plan: plan + b"more", "cut short, or longer"),
        (lambda plan: plan[:40], "no engine of this runtime"),
        (lambda plan: b"", "no engine of this runtime"),
        (lambda plan: b"garbage" * 1000, "no engine of this runtime"),
        (lambda plan: bytes(5000), "no engine of this runtime"),
        (lambda plan: plan, "CUDA driver is missing, or older"),  # nothing is wrong with it: this machine has no GPU
    ],
)
def test_the_real_runtime_refuses_damaged_engines_in_a_persons_words(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, said: str
) -> None:
    backend, engine = TensorRTForRTX(), tmp_path / "model.engine"
    backend.convert(tiny, RTX, tmp_path, {})
    engine.write_bytes(damage(engine.read_bytes()))
    monkeypatch.setattr(TensorRTForRTX, "runs_on", lambda *_: True)
    with pytest.raises(BackendError, match=said) as error:
        backend.open(engine, threads=1, device=RTX)
    assert error.value.where == "model.engine"


@needs_rtx
def test_the_reason_of_a_failed_build_is_told_while_other_builders_live(tiny: Path, tmp_path: Path) -> None:
    backend = TensorRTForRTX()
    trt = backend.runtime()
    held = trt.Builder(log_of(trt)), trt.Runtime(log_of(trt))
    turing = RTX.model_copy(update={"arch": RTX.arch.model_copy(update={"sm": "7.5"})})
    with pytest.raises(BackendError, match="FP32 GEMM is not supported"):
        backend.convert(tiny, turing, tmp_path, {})
    assert held


# ------------------------------------------------------------------------------------------------------------ progress
def test_a_phase_fills_one_step_of_its_parent_and_progress_never_goes_back() -> None:
    seen = Progress()
    seen.start("build", None, 4)
    seen.start("time", "build", 2)
    assert seen.step("time", 0) == 1 / 8
    assert seen.step("build", 0) == 1 / 4
    seen.start("again", "build", 2)
    assert seen.step("again", 0) == 3 / 8
    assert seen.step("time", 0) == 3 / 8  # a late word of an earlier phase
    assert seen.step("unknown", 5) == 3 / 8
    assert seen.step("build", 3) == 1


@needs_rtx
def test_a_build_tells_how_far_it_is_and_a_failing_listener_does_not_end_it(tiny: Path, tmp_path: Path) -> None:
    backend, told = TensorRTForRTX(), list[tuple[float, str]]()

    def listen(share: float, phase: str) -> None:
        told.append((share, phase))
        raise RuntimeError("the terminal is gone")

    backend.watch(listen)
    backend.convert(tiny, RTX, tmp_path, {})
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.2
    assert shares[-1] > 0.8
    assert len({phase for _, phase in told}) > 3
    count = len(told)
    backend.watch(None)
    backend.convert(tiny, RTX, tmp_path, {})
    assert len(told) == count


@needs_rtx
def test_in_a_log_a_build_is_a_line_now_and_then(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("edgekd.console.time.monotonic", lambda: 0.5 * next(ticks))  # half a second a step
    backend = TensorRTForRTX()
    with watched(backend, Console(), "tensorrt_rtx"):
        backend.convert(tiny, RTX, tmp_path, {})
    seen = capsys.readouterr()
    lines = [line for line in seen.err.splitlines() if "tensorrt_rtx: " in line]
    assert seen.out == ""
    assert 1 <= len(lines) <= 1 + next(ticks) / 20
    assert "% phase " in lines[0]
    assert "ETA" in lines[0]


def test_a_backend_that_tells_nothing_is_built_all_the_same() -> None:
    from edgekd.backends.onnxruntime import OnnxRuntime

    with watched(OnnxRuntime(), Console(quiet=True), "onnxruntime"):
        pass
