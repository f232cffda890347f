"""What `edgekd profile` tells of one file: latency, memory, load time, size and operators, from a measurement made now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import registry
from edgekd.errors import BackendError, BundleRefused, DeviceError, FileMissing, OnnxRefused, UsageError

if TYPE_CHECKING:
    from edgekd.backends import Feeds
    from edgekd.profile.schema import DeviceProfile

_TYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 10: "float16"}
_DYNAMIC_SIDE = 224


def profile_model(
    model: Path, *, device: str, backend: str, threads: int, batch: int, layers: bool, via: str | None, seconds: float
) -> dict[str, Any]:
    """Measures on this machine; raises DeviceError where the device is another one, OnnxRefused for a file that is refused."""
    from edgekd.profile.device import load_device
    from edgekd.profile.footprint import load_facts
    from edgekd.profile.measure import PROTOCOL, measure
    from edgekd.safeio.onnxfile import check_onnx

    profile, file, made = load_device(device), model_file_of(model), _made(model)
    runtime = registry.load("backend", _backend_of(profile, backend, made[0]))()
    _reachable(profile, runtime, via)
    proto = check_onnx(file)
    feeds = inputs_of(proto, batch, file)
    if runtime.builds or made[:2] == (runtime.name, profile.id):
        file = _engine_file(model, runtime, profile)
    if layers and not hasattr(runtime, "layers"):
        raise BackendError(f"{runtime.name} gives no time per operator", where="--layers", hint="--backend onnxruntime")
    with _named(model, runtime.name):
        facts = load_facts(
            file, runtime.name, device=profile, feeds=feeds, threads=threads, options=made[2]
        )  # first: a bad engine may end the process that opens it
        session = runtime.open(file, threads=threads, device=profile, options=made[2])
        samples = measure({"model": session}, {"model": feeds}, budget_s=seconds)["model"]
        session.close()
    found = {
        "model": str(model),
        "device": device,
        "backend": runtime.name,
        "version": runtime.version(),
        "threads": threads,
        "batch": batch,
        "measured": True,
        "protocol": PROTOCOL,
    }
    found |= {
        "latency_ms": samples.summary(),
        "size_bytes": facts["file_bytes"],
        "load_ms": facts["load_ms"],
        "peak_mib": facts["peak_mib"],
    }
    if layers:
        found["operators"] = [asdict(layer) for layer in runtime.layers(file, feeds, threads, profile, made[2])]
    return found


@contextmanager
def _named(model: Path, runtime: str) -> Iterator[None]:
    """Inside, an error about the engine names what the user gave, and an option of this command."""
    try:
        yield
    except BackendError as problem:
        problem.where = str(model)
        if runtime == "openvino":
            problem.hint = "--backend onnxruntime"
        raise


def model_file_of(model: Path) -> Path:
    """The ONNX file of a path: itself, or the model of a bundle whose every byte was verified."""
    from edgekd.bundle import read_facts, verify_files

    if model.is_dir():
        return model / str(read_facts(model, verify_files(model))["model_file"])
    if not model.is_file():
        raise FileMissing("there is no such model", where=str(model), expected="an ONNX file or a bundle")
    if model.suffix == ".engine":
        raise BundleRefused(
            "an engine alone is not opened: it is code, and only a manifest says whose", where=str(model), expected="its bundle"
        )
    return model


def _engine_file(model: Path, runtime: Any, profile: DeviceProfile) -> Path:
    """The engine of a bundle: an engine file alone is code of unknown origin, and is never opened."""
    from edgekd.bundle import engine_of, read_facts, read_manifest

    if not model.is_dir():
        raise BackendError(
            f"{runtime.name} runs engines, and this is a graph",
            where=model.name,
            hint=f"build it: edgekd compile {model} --device {profile.id}; then measure the bundle: edgekd profile BUNDLE --device {profile.id}",
        )
    manifest = read_manifest(model)
    return engine_of(model, manifest, read_facts(model, manifest), runtime, profile)


def inputs_of(proto: Any, batch: int, file: Path) -> Feeds:
    """Random inputs of the declared shapes; dynamic first axes become `batch`, dynamic sides 224."""
    import numpy as np

    from edgekd.safeio.onnxfile import fed_inputs

    rng, feeds = np.random.default_rng(0), {}
    for value in fed_inputs(proto):
        kind = _TYPES.get(value.type.tensor_type.elem_type)
        if kind is None:
            raise OnnxRefused(f"input '{value.name}' has a type that is not measured", where=file.name, expected=", ".join(_TYPES.values()))
        fixed = value.type.tensor_type.shape.dim[0].dim_value if value.type.tensor_type.shape.dim else 0
        if fixed not in (0, batch):
            raise UsageError(f"input '{value.name}' is for {fixed} images at a time", where=file.name, expected=f"--batch {fixed}")
        shape = [
            d.dim_value or (batch if i == 0 else 3 if i == 1 else _DYNAMIC_SIDE) for i, d in enumerate(value.type.tensor_type.shape.dim)
        ]
        feeds[value.name] = rng.standard_normal(shape).astype(kind) if "float" in kind else rng.integers(0, 100, shape).astype(kind)
    return feeds


def _made(model: Path) -> tuple[str | None, str | None, dict[str, Any]]:
    """The runtime, the device and the options of a bundle's engine; nothing where its engine is its graph."""
    from edgekd.bundle import read_facts, read_manifest

    if not model.is_dir():
        return None, None, {}
    manifest = read_manifest(model)
    facts = read_facts(model, manifest)
    if facts.get("engine_file") in (None, facts["model_file"]):
        return None, None, {}
    engine = manifest.get("engine", {})
    return engine.get("runtime"), manifest.get("target"), engine.get("options", {})


def _backend_of(profile: DeviceProfile, name: str, built_with: str | None) -> str:
    if name != "auto":
        registry.load("backend", name)
        return name
    names = [r.name for r in profile.runtimes if r.name in registry.names("backend")]
    found = built_with if built_with in names else next(iter(names), None)
    if found is None:
        raise BackendError(
            f"edgekd has no backend for '{profile.id}'", where=profile.id, hint=f"edgekd predict MODEL --device {profile.id}"
        )
    return found


def _reachable(profile: DeviceProfile, runtime: Any, via: str | None) -> None:
    from edgekd.profile.device import same_machine

    if via is not None and via not in registry.names("transport"):
        raise DeviceError(f"there is no transport '{via}' to a host yet", where="--via", expected=", ".join(registry.names("transport")))
    if same_machine(profile) and (reason := runtime.available()) is not None:
        raise BackendError(reason, where=runtime.name, hint="edgekd doctor")
    if not runtime.runs_on(profile):
        raise DeviceError(
            f"{profile.id} is not this machine, so nothing was measured",
            where="--device",
            hint=f"edgekd predict MODEL --device {profile.id}, or measure there",
        )
