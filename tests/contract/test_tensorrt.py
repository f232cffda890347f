"""TensorRT for RTX builds real engines here, without a GPU; its parser's refusals become edgekd's own messages."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from edgekd.artifact import digest_of
from edgekd.backends.tensorrt import TensorRT
from edgekd.backends.tensorrt_rtx import TensorRTForRTX
from edgekd.bundle import SIGNATURE, engine_facts, verify_files, write_manifest
from edgekd.errors import BackendError, BundleRefused
from edgekd.export.onnx import INPUT, OUTPUT, export_onnx
from edgekd.profile.device import load_device
from edgekd.profile.host import driver
from edgekd.quantize.fp16 import FP16
from edgekd.quantize.ptq import PTQ
from edgekd.registry import load

RTX = load_device("rtx4090")
TEMPLATE = Path(sys.modules["edgekd"].__file__ or "").parent / "templates" / "build.py"

SHIM = """import tensorrt_rtx_libs
from tensorrt_rtx_bindings import *
from tensorrt_rtx_bindings import ComputeCapability, __version__
import tensorrt_rtx_bindings as rtx


class Config:
    def __init__(self, config):
        object.__setattr__(self, "config", config)

    def __getattr__(self, name):
        return getattr(self.config, name)

    def __setattr__(self, name, value):
        setattr(self.config, name, value)

    def create_timing_cache(self, known):
        print("known:", len(known), "bytes")
        return self.config.create_timing_cache(known)


class Builder(rtx.Builder):
    def create_builder_config(self):
        config = super().create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(ComputeCapability.SM89, 0)
        return Config(config)

    def build_serialized_network(self, network, config):
        return super().build_serialized_network(network, config.config)
"""

pytestmark = pytest.mark.skipif(TensorRTForRTX().available() is not None, reason=str(TensorRTForRTX().available()))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16 * 64, 4))
    path = tmp_path_factory.mktemp("tiny") / "model.onnx"
    export_onnx(net.eval(), 16, path)
    return path


def batches(size: int) -> Any:
    return iter([np.random.default_rng(i).standard_normal((8, 3, size, size), dtype=np.float32) for i in range(2)])


def build(graph: Path, out: Path, **options: Any) -> dict[str, Any]:
    out.mkdir()
    return TensorRTForRTX().convert(graph, RTX, out, options)


def test_an_engine_says_for_what_it_was_built(tiny: Path, tmp_path: Path) -> None:
    meta = build(tiny, tmp_path / "engine")
    assert (tmp_path / "engine" / meta["model_file"]).stat().st_size > 10_000
    assert (meta["compute_capability"], meta["shapes"][INPUT]) == ("8.9", [[1, 3, 16, 16], [1, 3, 16, 16], [32, 3, 16, 16]])


def test_a_graph_quantized_for_x86_is_refused_with_its_node_and_what_to_do(tiny: Path, tmp_path: Path) -> None:
    PTQ(PTQ.Config()).quantize(tiny, tmp_path / "m.onnx", batches(16), "u8s8")
    with pytest.raises(BackendError, match=r"node '.+' \(\w+\)") as error:
        build(tmp_path / "m.onnx", tmp_path / "engine")
    assert "cudaError" not in str(error.value)
    assert "quantized for x86" in (error.value.hint or "")
    assert not list((tmp_path / "engine").iterdir())


def test_damage_and_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x09not a graph")
    with pytest.raises(BackendError, match=r"bad\.onnx"):
        build(tmp_path / "bad.onnx", tmp_path / "engine")


def test_a_size_that_is_dynamic_beside_the_batch_is_refused(tiny: Path, tmp_path: Path) -> None:
    proto = onnx.load(tiny)
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(BackendError, match=r"no dynamic size but the batch|does not take the graph"):
        build(tmp_path / "m.onnx", tmp_path / "engine")


@pytest.mark.parametrize("options", [{"max_batch": 4}, {"workspace_mib": 64}, {"version_compatible": False}, {"optimization": 0}])
def test_options_of_a_build(tiny: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    meta = build(tiny, tmp_path / "engine", **options)
    assert {n: meta["options"][n] for n in options} == options
    assert meta["shapes"][INPUT][2][0] == options.get("max_batch", 32)


def test_the_manifest_says_with_which_flags_and_driver_an_engine_was_built(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = engine_facts(build(tiny, tmp_path / "engine"))
    assert said["flags"] == ["STRONGLY_TYPED"]  # and not TF32, which is on unless it is cleared
    assert (said["compute_capability"], said["max_batch"]) == ("8.9", 32)
    assert "driver" not in said  # there is no GPU here
    monkeypatch.setattr("edgekd.backends.tensorrt.driver", lambda: "580.65.06")
    monkeypatch.setattr("edgekd.backends.tensorrt._apply", lambda *_: None)
    said = engine_facts(build(tiny, tmp_path / "again"))
    assert (said["flags"], said["driver"]) == (["STRONGLY_TYPED", "TF32"], "580.65.06")


def test_the_driver_is_what_the_kernel_says(tmp_path: Path) -> None:
    assert driver(tmp_path) is None
    (tmp_path / "driver/nvidia").mkdir(parents=True)
    (tmp_path / "driver/nvidia/version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 2025\nGCC version: 13.3\n"
    )
    assert driver(tmp_path) == "580.65.06"


def test_unknown_options_and_capabilities_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no option 'turbo'"):
        build(tiny, tmp_path / "engine", turbo=True)
    with pytest.raises(BackendError, match=r"compute capability 9\.0"):
        TensorRTForRTX().convert(tiny, load_device("nvidia-h200"), tmp_path, {})


def test_an_engine_of_another_gpu_is_not_opened(tiny: Path, tmp_path: Path) -> None:
    meta = build(tiny, tmp_path / "engine")
    with pytest.raises(BackendError, match="does not run on this machine"):
        TensorRTForRTX().open(tmp_path / "engine" / meta["model_file"], threads=1, device=RTX)


def test_a_signal_ends_a_build(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exception of a signal comes out of the wait, and the builder is told to stop."""
    stopped: list[Any] = []

    class Pool:
        def __init__(self, workers: int): ...
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, call: Any, network: Any, config: Any) -> Pool:
            stopped.append(config.progress_monitor)
            return self

        def result(self) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setattr("edgekd.backends.tensorrt.ThreadPoolExecutor", Pool)
    with pytest.raises(KeyboardInterrupt):
        build(tiny, tmp_path / "engine")
    assert stopped[0].stopped
    assert stopped[0].step_complete("phase", 1) is False


def test_tensorrt_itself_builds_on_the_device_only() -> None:
    backend, jetson = TensorRT(), load_device("jetson-orin-nano")
    assert backend.builds_for(jetson) is not None
    assert not backend.runs_on(jetson)


# ------------------------------------------------------------------------------------------------------------ build.py
@pytest.fixture
def bundle(tiny: Path, tmp_path: Path) -> Path:
    """A bundle as far as build.py reads it."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    shutil.copyfile(tiny, folder / "model.onnx")
    shutil.copyfile(TEMPLATE, folder / "build.py")
    options = TensorRTForRTX.Options().model_dump(mode="json")
    facts = {
        "model_file": "model.onnx",
        "input": INPUT,
        "output": OUTPUT,
        "fixed_batch": None,
        "tolerance": 1e-3,
        "preprocess": {"mean": [0.5] * 3, "std": [0.5] * 3},
        "build": {"backend": "tensorrt_rtx", "compute_capability": "8.9", "batch": 1, "options": options},
    }
    (folder / "bundle.json").write_text(json.dumps(facts))
    np.savez(folder / "samples.npz", pixels=np.zeros((2, 16, 16, 3), np.uint8), outputs=np.zeros((2, 4), np.float32))
    write_manifest(folder, {"recipe": "r", "target": "rtx4090"})
    return folder


def run_script(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "build.py"], cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_build_py_builds_and_completes_a_manifest_that_still_verifies(bundle: Path) -> None:
    done = run_script(bundle)
    assert done.returncode == 0, done.stderr
    manifest = verify_files(bundle)
    assert manifest["built"]["backend"] == "tensorrt_rtx"
    assert manifest["files"]["model.engine"]["size"] == (bundle / "model.engine").stat().st_size > 10_000
    assert manifest["engine"]["file"] == "model.engine"
    assert digest_of(manifest)  # canonical JSON of both sides is the same, or verify_files had refused it
    assert run_script(bundle).returncode == 0  # it can be repeated
    verify_files(bundle)


def test_build_py_says_of_its_engine_what_edgekd_says_of_one_of_its_own(tiny: Path, bundle: Path, tmp_path: Path) -> None:
    assert run_script(bundle).returncode == 0
    meta = build(tiny, tmp_path / "engine")
    assert verify_files(bundle)["engine"] == json.loads(json.dumps(engine_facts(meta)))
    assert not (bundle / "model.cache").exists()  # RTX's stays empty
    assert (bundle / "model.engine").stat().st_size == (tmp_path / "engine" / "model.engine").stat().st_size


@pytest.fixture
def jetson(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A bundle for `tensorrt`, where that module is RTX's builder under the other name."""
    product = tmp_path / "product"
    product.mkdir()
    (product / "tensorrt.py").write_text(SHIM)
    monkeypatch.setenv("PYTHONPATH", str(product))
    facts = json.loads((bundle / "bundle.json").read_text())
    facts["build"]["backend"] = "tensorrt"
    (bundle / "bundle.json").write_text(json.dumps(facts))
    (bundle / "manifest.json").unlink()
    write_manifest(bundle, {"recipe": "r", "target": "jetson-orin-nano"})
    return bundle


def test_build_py_keeps_what_tensorrt_learnt_and_uses_only_what_it_wrote_itself(jetson: Path) -> None:
    done = run_script(jetson)
    assert done.returncode == 0, done.stderr
    manifest, size = verify_files(jetson), (jetson / "model.cache").stat().st_size
    assert manifest["files"]["model.cache"]["size"] == size > 0
    assert (manifest["engine"]["runtime"], manifest["engine"]["flags"]) == ("tensorrt", ["STRONGLY_TYPED"])
    assert "known: 0 bytes" in done.stdout
    assert f"known: {size} bytes" in run_script(jetson).stdout
    (jetson / "model.cache").write_bytes(b"from elsewhere")
    done = run_script(jetson)
    assert (done.returncode, "known: 0 bytes" in done.stdout) == (0, True), done.stderr
    verify_files(jetson)


KILLED = """\
import os, pathlib, runpy, sys
calls, stop = [], int(sys.argv[1])
for name in ("replace", "unlink"):
    def counted(self, *arguments, real=getattr(pathlib.Path, name)):
        if len(calls) == stop:
            os._exit(9)
        calls.append(self.name)
        return real(self, *arguments)
    setattr(pathlib.Path, name, counted)
runpy.run_path("build.py", run_name="__main__")
"""


@pytest.mark.parametrize("stop", [0, 1, 2])  # before the engine, the removal of the signature, the manifest
def test_a_build_py_that_is_killed_leaves_a_bundle_that_it_completes(bundle: Path, stop: int) -> None:
    (bundle / SIGNATURE).write_bytes(bytes(64))
    done = subprocess.run([sys.executable, "-c", KILLED, str(stop)], cwd=bundle, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 9, done.stderr
    with pytest.raises(BundleRefused, match="not in the manifest") as refused:
        verify_files(bundle)
    assert "python3 build.py" in refused.value.hint
    done = run_script(bundle)
    assert done.returncode == 0, done.stderr
    assert "model.engine" in verify_files(bundle)["files"]
    assert not list(bundle.glob("*.part"))


def test_build_py_takes_the_signature_of_the_old_manifest_away_and_says_so(bundle: Path) -> None:
    (bundle / SIGNATURE).write_bytes(bytes(64))
    done = run_script(bundle)
    assert (done.returncode, f"{SIGNATURE} was removed" in done.stdout) == (0, True), done.stderr
    assert not (bundle / SIGNATURE).exists()
    verify_files(bundle)


def test_build_py_refuses_a_changed_file(bundle: Path) -> None:
    data = bytearray((bundle / "model.onnx").read_bytes())
    data[100] ^= 1
    (bundle / "model.onnx").write_bytes(data)
    done = run_script(bundle)
    assert done.returncode == 1
    assert "'model.onnx' is missing or was changed" in done.stderr
    assert not (bundle / "model.engine").exists()


def test_build_py_is_python_3_8_and_needs_only_numpy_and_tensorrt() -> None:
    tree = ast.parse(TEMPLATE.read_text(), feature_version=(3, 8))
    imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {"numpy"}


def test_build_py_applies_every_option_of_the_backend() -> None:
    text = TEMPLATE.read_text()
    assert [name for name in TensorRT.Options.model_fields if f'"{name}"' not in text] == []


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_both_backends_are_listed(name: str) -> None:
    assert load("backend", name).name == name


class Normalized(torch.nn.Module):
    """Divides by at least 1e-12, which fp16 cannot hold: the builder prints a warning of its own about that."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8 * 36, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.linear(torch.nn.functional.normalize(self.conv(x).flatten(1), dim=1))
        return scores


def test_what_the_builder_prints_stays_off_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_onnx(Normalized().eval(), 8, tmp_path / "fp32.onnx")
    FP16(FP16.Config()).quantize(tmp_path / "fp32.onnx", tmp_path / "fp16.onnx", iter([]), "s8s8")
    build(tmp_path / "fp16.onnx", tmp_path / "engine")
    print("data")
    assert capfd.readouterr().out == "data\n"
