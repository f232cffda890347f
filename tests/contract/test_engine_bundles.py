"""Bundles with an engine: measured, checked, refused and built again. Where a GPU is needed, a fake stands for it; RTX's builder is the real one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from edgekd.artifact import Artifact, Kind
from edgekd.backends.tensorrt_rtx import TensorRTForRTX
from edgekd.bundle import verify_files, write_facts, write_manifest
from edgekd.errors import BackendError, BundleRefused, DeviceError, ResourceError
from edgekd.export.onnx import INPUT, OUTPUT, export_onnx
from edgekd.stages._stage import Settings
from edgekd.stages.profile import TRACE, Profile
from edgekd.verify import rebuild
from tests.fake_tensorrt import on_the_cpu
from tests.support import run_here, write_keys

SIZE, DEVICE = 16, "jetson-orin-nano"
needs_rtx = pytest.mark.skipif(TensorRTForRTX().available() is not None, reason=str(TensorRTForRTX().available()))


class Net(torch.nn.Module):
    """What the fake engine computes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3 * SIZE * SIZE, 4)
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.bias.zero_()
            self.head.weight[:, 0] = torch.arange(4.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.head(x.flatten(1))
        return answer


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    export_onnx(Net().eval(), SIZE, path)
    return path


@pytest.fixture
def make(graph: Path, tmp_path: Path) -> Callable[..., Path]:
    """A bundle for a device with an engine of `tensorrt` 10.3.0, as far as edgekd reads it; `said` changes what its manifest says of the engine."""

    def made(plan: bytes = b"fake engine", target: str = DEVICE, **said: Any) -> Path:
        folder = tmp_path / "bundle"
        folder.mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
        first = (pixels[:, 0, 0, 0].astype(np.float32) / 255 - 0.5) / 0.5
        np.savez(folder / "samples.npz", pixels=pixels, outputs=first[:, None] * np.arange(4, dtype=np.float32))
        (folder / "model.onnx").write_bytes(graph.read_bytes())
        (folder / "model.engine").write_bytes(plan)
        engine = {"file": "model.engine", "runtime": "tensorrt", "version": "10.3.0", "max_batch": 2, "options": {}} | said
        facts = {
            "model_file": "model.onnx",
            "input": INPUT,
            "output": OUTPUT,
            "fixed_batch": None,
            "threads": 1,
            "tolerance": 1e-4,
            "preprocess": {"image_size": SIZE, "mean": [0.5] * 3, "std": [0.5] * 3},
            "build": {"backend": engine["runtime"], "compute_capability": "8.9", "batch": 1, "options": {}},
        }
        write_facts(folder, facts)
        write_manifest(folder, {"recipe": "r", "target": target, "backend": engine["runtime"], "engine": engine, "made_on": {}})
        return folder

    return made


class Transport:
    """The process that opens an engine first; `end` is how it ends."""

    end: DeviceError | None = None

    def ask(self, request: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        if self.end is not None:
            raise self.end
        return {"load_ms": 1.0, "peak_mib": 2.0}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[Transport]:
    on_the_cpu(monkeypatch)
    monkeypatch.setattr(Transport, "end", None)
    monkeypatch.setattr("edgekd.profile.footprint._local", Transport)
    return Transport


def profiled(model: Path, *more: str) -> Any:
    return run_here("profile", model, "--device", DEVICE, "--seconds", "0.4", *more)


def verified(folder: Path, *more: str) -> Any:
    return run_here("verify", folder, "--run-engine", *more)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# ------------------------------------------------------------------------------------------------------------ measured and checked
def test_the_engine_of_a_bundle_is_what_profile_measures_with_its_layers(gpu: type[Transport], make: Callable[..., Path]) -> None:
    folder = make()
    result = profiled(folder, "--layers", "--json", "--batch", "2")
    assert result.code == 0, result.err
    found = result.json()
    assert (found["backend"], found["size_bytes"], found["version"]) == ("tensorrt", len(b"fake engine"), "10.3.0")
    assert [(o["name"], o["precision"]) for o in found["operators"]] == [("conv + relu", "fp32 -> int8"), ("head", "fp16")]
    table = profiled(folder, "--layers").out
    assert "precision" in table
    assert "Thirty-two wide channel vectorized row major Int8 format." in table


def test_verify_runs_the_sample_images_through_the_engine(gpu: type[Transport], make: Callable[..., Path]) -> None:
    result = verified(make(), "--json")
    assert result.code == 0, result.err
    assert result.json()["engine"].startswith("5 of 5 sample images give the stored label")


def test_an_engine_that_answers_otherwise_breaks_parity(
    gpu: type[Transport], make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fake_tensorrt.IExecutionContext.execute_async_v3", lambda *_: True)
    result = verified(make())
    assert result.code == 4
    assert "the engine's outputs differ" in result.err


def test_where_the_device_is_elsewhere_the_engine_is_not_opened_and_that_is_said(make: Callable[..., Path]) -> None:
    result = run_here("verify", make())
    assert result.code == 0, result.err
    assert "engine: the engine was not opened: " in result.out


def test_an_engine_that_nobody_vouches_for_is_not_run(
    gpu: type[Transport], make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened: list[str] = []
    real = Transport.ask
    monkeypatch.setattr(Transport, "ask", lambda self, request, **more: opened.append(request["engine"]) or real(self, request, **more))
    folder = make()
    result = run_here("verify", folder)
    assert (result.code, opened) == (0, [])
    assert "the engine was not run: it is code" in result.out
    pytest.importorskip("cryptography", reason="pip install 'edgekd[sign]'")
    key, public = write_keys(tmp_path / "keys")
    assert run_here("sign", folder, "--key", key).code == 0
    assert "the engine was not run" in run_here("verify", folder).out
    result = run_here("verify", folder, "--signed-by", public)
    assert (result.code, len(opened)) == (0, 1), result.err
    assert "5 of 5 sample images" in result.out


@pytest.mark.parametrize("consent", [(), ("--run-engine",)])
def test_a_graph_is_never_handed_to_a_runtime_of_engines(
    gpu: type[Transport], make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, consent: tuple[str, ...]
) -> None:
    """The manifest of a stranger may say that the graph is the engine, and a file may be both."""
    monkeypatch.setattr(Transport, "ask", lambda *_, **__: pytest.fail("opened in a child"))
    monkeypatch.setattr("edgekd.backends.tensorrt.TrtSession", lambda *_, **__: pytest.fail("opened"))
    result = run_here("verify", make(file="model.onnx"), *consent, "--json")
    assert (result.code, result.json()["engine"]) == (0, None), result.text


# ------------------------------------------------------------------------------------------------------------ refused
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "10.16.1"}, "its engine was built with tensorrt 10.16.1 (expected 10.3.0, which is here)"),
        ({"target": "rtx4090"}, "its engine was built for rtx4090 (expected one for jetson-orin-nano)"),
        ({"runtime": "onnxruntime"}, "the bundle holds no engine of tensorrt"),
        ({"plan": b"garbage under the right name"}, "the engine cannot be opened"),
        ({"plan": b"vold"}, "it was built with another version"),
        ({"plan": b"agpu"}, "it was built for another GPU"),
        ({"plan": b""}, "the engine cannot be opened"),
    ],
)
def test_an_engine_that_does_not_fit_is_5_with_the_way_out_and_nothing_is_lost(
    gpu: type[Transport], make: Callable[..., Path], change: dict[str, Any], said: str
) -> None:
    folder = make(**change)
    before = bytes_of(folder)
    commands = [profiled(folder, "--backend", "tensorrt")]
    if "runtime" not in change:  # of another runtime: verify asks that one
        commands += [verified(folder)] * ("target" not in change)
    for result in commands:
        assert result.code == 5, result.text
        assert said in result.err
        assert ("--build" in result.err) == ("target" not in change)
    assert bytes_of(folder) == before
    assert run_here("predict", folder, "--device", DEVICE).code == 0  # the graph beside it is whole


def test_an_engine_of_a_later_version_opens_where_it_was_built_to(gpu: type[Transport], make: Callable[..., Path]) -> None:
    result = profiled(make(version="10.0.1", options={"version_compatible": True}), "--json")
    assert result.code == 0, result.err


def test_an_engine_that_ends_the_process_that_opens_it_ends_another_one(
    gpu: type[Transport], make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Transport, "end", DeviceError("the measuring process ended with status -11"))
    monkeypatch.setattr("edgekd.backends.tensorrt.TrtSession", lambda *_: pytest.fail("opened in this process"))
    folder = make()
    for result in (profiled(folder), verified(folder)):
        assert result.code == 5
        assert "ended with status -11" in result.err


@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_a_damaged_engine_is_3_in_every_command_and_names_the_way_to_build_it_again(make: Callable[..., Path], damage: str) -> None:
    folder = make(b"fake engine" * 10)
    engine = folder / "model.engine"
    engine.unlink() if damage == "missing" else engine.write_bytes(engine.read_bytes()[:-9] + b"x" * (9 if damage == "changed" else 0))
    for result in (profiled(folder), run_here("verify", folder), run_here("predict", folder, "--device", DEVICE)):
        assert result.code == 3
        assert "model.engine" in result.err
        assert f"edgekd verify {folder} --build" in result.err


def test_an_engine_file_alone_is_never_opened(gpu: type[Transport], make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekd.backends.tensorrt.TrtSession", lambda *_: pytest.fail("opened"))
    folder = make()
    alone = profiled(folder / "model.engine")
    assert alone.code == 3
    assert "an engine alone is not opened" in alone.err
    result = profiled(folder / "model.onnx")
    assert result.code == 5
    assert "runs engines, and this is a graph" in result.err


# ------------------------------------------------------------------------------------------------------------ built again
@needs_rtx
@pytest.mark.parametrize("damage", ["none", "cut", "missing", "stray cache"])
def test_build_makes_a_damaged_engine_again(make: Callable[..., Path], damage: str) -> None:
    folder = make(b"fake engine", "rtx4090", runtime="tensorrt_rtx")
    if damage == "stray cache":  # build.py was killed before it wrote the manifest
        (folder / "model.cache").write_bytes(b"x")
    elif damage != "none":
        (folder / "model.engine").unlink()
        (folder / "model.engine").write_bytes(b"fake") if damage == "cut" else None
    result = run_here("verify", folder, "--build")
    assert result.code == 0, result.err
    manifest = verify_files(folder)
    assert manifest["files"]["model.engine"]["size"] > 1000
    assert (manifest["engine"]["version"], manifest["engine"]["flags"]) == (TensorRTForRTX().version(), ["STRONGLY_TYPED"])
    assert sorted(p.name for p in folder.parent.iterdir()) == ["bundle"]


@needs_rtx
def test_a_bundle_is_built_from_inside_and_through_a_link(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, link = make(b"fake engine", "rtx4090", runtime="tensorrt_rtx"), tmp_path / "link"
    link.symlink_to(folder)
    monkeypatch.chdir(folder)
    for path in (".", link):
        result = run_here("verify", path, "--build")
        assert result.code == 0, result.err
        assert Path.cwd() == folder
        assert link.is_symlink()
        assert verify_files(folder)["engine"]["file"] == "model.engine"
        (folder / "model.engine").write_bytes(b"damaged")


@needs_rtx
@pytest.mark.parametrize("name", ["other.engine", "sub/model.engine", "sub/model.cache"])
def test_only_what_a_build_writes_is_replaced_and_nothing_else_is_sealed(make: Callable[..., Path], name: str) -> None:
    folder = make(target="rtx4090", runtime="tensorrt_rtx")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"from elsewhere")
    result = run_here("verify", folder, "--build")
    assert (result.code, f"not in the manifest: {name}" in result.err) == (3, True), result.text


def test_what_a_killed_build_leaves_is_named_with_the_way_to_complete_it(make: Callable[..., Path]) -> None:
    folder = make()
    (folder / "manifest.json.part").write_bytes(b"{")
    with pytest.raises(BundleRefused, match=r"not in the manifest: manifest\.json\.part") as refused:
        verify_files(folder)
    assert f"edgekd verify {folder} --build" in refused.value.hint
    verify_files(folder, rebuilding=True)


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A builder that needs no library, and the files that it was given."""
    given: list[str] = []

    def convert(self: TensorRTForRTX, graph: Path, device: object, out: Path, *_: object, **__: object) -> dict[str, Any]:
        given.append(graph.name)
        (out / "model.engine").write_bytes(b"fresh")
        return {"model_file": "model.engine", "runtime": self.name, "version": self.version(), "options": {}}

    monkeypatch.setattr(TensorRTForRTX, "builds_for", lambda *_: None)
    monkeypatch.setattr(TensorRTForRTX, "convert", convert)
    return given


@pytest.mark.parametrize("sound", [True, False])
def test_no_builder_reads_a_graph_that_was_not_checked(builder: list[str], make: Callable[..., Path], sound: bool) -> None:
    folder = make(target="rtx4090", runtime="tensorrt_rtx")
    if not sound:
        proto = onnx.load(folder / "model.onnx")
        proto.graph.node[0].domain = "stranger"
        onnx.save(proto, folder / "model.onnx")
        said = {n: v for n, v in json.loads((folder / "manifest.json").read_text()).items() if n not in ("schema", "files", "digest")}
        (folder / "manifest.json").unlink()
        write_manifest(folder, said)
    result = run_here("verify", folder, "--build")
    assert (result.code, builder) == ((0, ["model.onnx"]) if sound else (3, [])), result.text


def test_what_build_py_measured_does_not_stand_for_another_engine(builder: list[str], make: Callable[..., Path]) -> None:
    folder = make(target="rtx4090", runtime="tensorrt_rtx")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    write_manifest(folder, {n: v for n, v in manifest.items() if n not in ("schema", "files", "digest")} | {"built": {"measured": True}})
    assert run_here("verify", folder, "--build").code == 0
    found = verify_files(folder)
    assert ("built" in found, found["engine"]["runtime"], builder) == (False, "tensorrt_rtx", ["model.onnx"])


@needs_rtx
def test_a_graph_that_was_changed_is_not_built(make: Callable[..., Path]) -> None:
    folder = make(target="rtx4090", runtime="tensorrt_rtx")
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes() + b"\0")
    result = run_here("verify", folder, "--build")
    assert result.code == 3
    assert "'model.onnx' was changed" in result.err


@needs_rtx
@pytest.mark.parametrize("where", ["build", "swap"])
def test_a_build_that_fails_leaves_the_bundle_as_it_was(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    from edgekd.console import Console

    folder, replace = make(target="rtx4090", runtime="tensorrt_rtx"), Path.replace
    (folder / "manifest.sig").write_bytes(b"s" * 64)
    before = bytes_of(folder)

    def fails(*_: object, **__: object) -> None:
        raise BackendError("no memory is left")

    def stuck(self: Path, target: Path) -> Path:
        if self.name == "manifest.json":
            raise OSError(5, "input/output error")
        return replace(self, target)

    if where == "build":
        monkeypatch.setattr(TensorRTForRTX, "convert", fails)
    else:
        monkeypatch.setattr(Path, "replace", stuck)
    with pytest.raises((BackendError, ResourceError)):
        rebuild(folder, Console(quiet=True))
    assert bytes_of(folder) == before
    assert sorted(p.name for p in folder.parent.iterdir()) == ["bundle"]


# ------------------------------------------------------------------------------------------------------------ the stage
@pytest.mark.usefixtures("quick")
def test_a_profiler_that_fails_costs_the_table_not_the_run(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from edgekd.console import Console

    def fails(*_: object) -> None:
        raise BackendError("the inspector is not there")

    facts = {"backend": "onnxruntime", "device": "host", "threads": 1, "model_file": "model.onnx", "image_size": SIZE, "input": INPUT}
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/engine.json").write_text(json.dumps(facts))
    (tmp_path / "engine/model.onnx").write_bytes(graph.read_bytes())
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("edgekd.backends.onnxruntime.OnnxRuntime.layers", fails)
    ctx: Any = SimpleNamespace(console=Console(quiet=True))
    engine = Artifact("0" * 64, Kind.ENGINE, tmp_path / "engine", "digest")
    Profile().run(Settings("profile", Profile.Config()), {"shipped": engine}, tmp_path / "out", ctx)
    trace = json.loads((tmp_path / "out" / TRACE).read_text())
    assert trace["operators"] == []
    assert trace["latency"]["shipped"]["p50"] > 0
    assert any("the inspector is not there" in w for w in ctx.console.warnings)
