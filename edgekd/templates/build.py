"""Builds this bundle's engine on the device, checks it on the sample images, measures it, and completes the manifest: python3 build.py

Needs Python 3.8 or newer, numpy and the device's own TensorRT (tensorrt, or TensorRT for RTX); no pip and nothing of edgekd.
Where there is no GPU the engine is built and neither checked nor measured, and the manifest says so. What TensorRT learnt about kernels stays in
model.cache, so that building again is faster.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
PRODUCTS = {"tensorrt": ["tensorrt"], "tensorrt_rtx": ["tensorrt_rtx_libs", "tensorrt_rtx_bindings"]}
ENGINE, CACHE, MANIFEST, SIGNATURE = "model.engine", "model.cache", "manifest.json", "manifest.sig"
DRIVER = Path("/proc/driver/nvidia/version")
WARM_UP, RUNS = 50, 500
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2


def main() -> None:
    bundle = json.loads((HERE / "bundle.json").read_text(encoding="utf-8"))
    manifest = json.loads((HERE / MANIFEST).read_text(encoding="utf-8"))
    check_files(manifest)
    for name in (ENGINE, CACHE, MANIFEST):  # of a build that was killed
        if (HERE / (name + ".part")).is_file():
            (HERE / (name + ".part")).unlink()
    trt = load(bundle["build"]["backend"])
    print(f"building with {trt.__name__} {trt.__version__} ...")
    plan, cache, engine = build(trt, bundle, known_kernels(manifest))
    print(f"{ENGINE}: {len(plan)} bytes")
    found: dict[str, Any] = {"backend": bundle["build"]["backend"], "version": trt.__version__, "measured": False}
    cuda = Cuda.find()
    if cuda is None:
        print("no CUDA device here: the engine was built, but neither checked nor measured")
    else:
        found.update(run(trt, plan, bundle, cuda), measured=True)
        p50 = found["latency_ms"]["p50"]
        print(f"sample outputs within {found['gap']:.3g} (tolerance {bundle['tolerance']:.3g}); p50 {p50:.3f} ms")
    write(HERE / ENGINE, plan)  # not before it passed: a bundle with a file of no manifest counts as tampered with
    if cache:
        write(HERE / CACHE, cache)
    elif (HERE / CACHE).is_file():
        (HERE / CACHE).unlink()
    complete(manifest, engine, found)


# ---------------------------------------------------------------------------------------------------------------- files
def check_files(manifest: dict[str, Any]) -> None:
    """Every byte as it was packed; what an earlier build made may be there."""
    for name, entry in manifest["files"].items():
        if name not in (ENGINE, CACHE) and not ((HERE / name).is_file() and sha256(HERE / name) == entry["sha256"]):
            sys.exit(f"'{name}' is missing or was changed since the bundle was made: copy the bundle again")


def known_kernels(manifest: dict[str, Any]) -> bytes:
    """The timing cache of an earlier build, if it is what that build wrote."""
    wanted, path = manifest["files"].get(CACHE, {}).get("sha256"), HERE / CACHE
    return path.read_bytes() if path.is_file() and sha256(path) == wanted else b""


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def complete(manifest: dict[str, Any], engine: dict[str, Any], found: dict[str, Any]) -> None:
    """The engine, with what it was built and what was measured, under the same digest as everything else.

    The manifest comes last: until it is there, a kill leaves an engine that is not the manifest's, and running this again completes it.
    """
    manifest["files"].pop(CACHE, None)
    for name in (ENGINE, CACHE):
        if (HERE / name).is_file():
            manifest["files"][name] = {"size": (HERE / name).stat().st_size, "sha256": sha256(HERE / name)}
    manifest["engine"], manifest["built"] = engine, found
    manifest.pop("digest", None)
    if (HERE / SIGNATURE).exists():  # it is of the manifest as it was
        (HERE / SIGNATURE).unlink()
        print(f"{SIGNATURE} was removed: the manifest changed with the engine; sign it again")
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    manifest["digest"] = hashlib.sha256(canonical.encode()).hexdigest()
    write(HERE / MANIFEST, (json.dumps(manifest, sort_keys=True, indent=1, ensure_ascii=True) + "\n").encode())


def write(path: Path, data: bytes) -> None:
    """Whole or not at all, also where the power fails."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


# ---------------------------------------------------------------------------------------------------------------- engine
def load(product: str) -> Any:
    try:
        return [importlib.import_module(name) for name in PRODUCTS[product]][-1]
    except (ImportError, OSError) as error:
        sys.exit(f"{product} cannot be imported: {error}. It comes with the device's system image, or from NVIDIA.")


def build(trt: Any, bundle: dict[str, Any], known: bytes) -> tuple[bytes, bytes, dict[str, Any]]:
    """A strongly typed engine, whose precision is what the graph says; what was learnt about kernels; and what the manifest says of the engine."""
    asked = bundle["build"]["options"]
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse((HERE / bundle["model_file"]).read_bytes()):
        sys.exit("the graph is refused:\n" + "\n".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.builder_optimization_level = asked["optimization"]
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)
    if asked.get("workspace_mib"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, asked["workspace_mib"] * 2**20)
    if asked["version_compatible"]:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if asked["hardware_compatible"]:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if asked.get("dla") is not None:
        config.default_device_type, config.DLA_core = trt.DeviceType.DLA, asked["dla"]
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    if trt.__name__.startswith("tensorrt_rtx") and Cuda.find() is None:  # cannot ask a GPU: build for the one that the bundle is for
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.__members__["SM" + bundle["build"]["compute_capability"].replace(".", "")], 0)
    profile, batch = builder.create_optimization_profile(), bundle["build"]["batch"]
    tensor, shapes = network.get_input(0), {}
    if tensor.shape[0] == -1:
        shapes[tensor.name] = [[n, *tuple(tensor.shape)[1:]] for n in (1, batch, max(batch, asked["max_batch"]))]
        profile.set_shape(tensor.name, *map(tuple, shapes[tensor.name]))
        config.add_optimization_profile(profile)
    timed = not trt.__name__.startswith("tensorrt_rtx")  # that one chooses kernels when it first loads the engine: its cache stays empty
    if timed:
        attach(config, known)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        sys.exit("the engine could not be built; the reason stands above")
    learnt = bytes(config.get_timing_cache().serialize()) if timed else b""
    return bytes(plan), learnt, facts(trt, config, shapes, bundle["build"])


def attach(config: Any, known: bytes) -> None:
    """The kernels that an earlier build timed, or none where that was another version or GPU."""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def facts(trt: Any, config: Any, shapes: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says of an engine, in the words that edgekd uses for one of its own."""
    flags = [name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag)]
    found = {
        "file": ENGINE,
        "runtime": asked["backend"],
        "version": trt.__version__,
        "compute_capability": asked.get("compute_capability"),
        "max_batch": next((sizes[2][0] for sizes in shapes.values()), None),
        "shapes": shapes,
        "options": {name: value for name, value in asked["options"].items() if value is not None},
        "flags": sorted([*flags, "STRONGLY_TYPED"]),
    }
    driver = re.findall(r"\d+\.\d+(?:\.\d+)?", DRIVER.read_text(encoding="utf-8")) if DRIVER.is_file() else []
    return dict(found, driver=driver[0]) if driver else found


# ---------------------------------------------------------------------------------------------------------------- running
class Cuda:
    """The four calls of the CUDA runtime that one engine needs."""

    def __init__(self, library: Any):
        self.library = library

    @staticmethod
    def find() -> Cuda | None:
        names = ["libcudart.so", "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0"]
        names += [str(p) for folder in sys.path for p in Path(folder or ".").glob("nvidia/*/lib/libcudart.so*")]  # from wheels
        for name in names:
            try:
                library = ctypes.CDLL(name)
            except OSError:
                continue
            count = ctypes.c_int(0)
            if library.cudaGetDeviceCount(ctypes.byref(count)) == 0 and count.value > 0:
                return Cuda(library)
        return None

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code != 0:
            sys.exit(f"{name} failed with CUDA error {code}")

    def memory(self, size: int) -> ctypes.c_void_p:
        pointer = ctypes.c_void_p()
        self.call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer

    def copy(self, to: Any, source: Any, size: int, direction: int) -> None:
        self.call("cudaMemcpy", to, source, ctypes.c_size_t(size), ctypes.c_int(direction))

    def stream(self) -> ctypes.c_void_p:
        stream = ctypes.c_void_p()
        self.call("cudaStreamCreate", ctypes.byref(stream))
        return stream


def prepared(stored: Any, settings: dict[str, Any]) -> np.ndarray:
    """The sample inputs as the model takes them: images are normalised, rows of features are as they are."""
    if "features" in settings:
        return np.ascontiguousarray(stored["rows"], np.float32)
    mean, std = np.asarray(settings["mean"], np.float32), np.asarray(settings["std"], np.float32)
    return np.ascontiguousarray(((stored["pixels"].astype(np.float32) / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))


def run(trt: Any, plan: bytes, bundle: dict[str, Any], cuda: Cuda) -> dict[str, Any]:
    """Outputs of the sample images against the stored ones, then latency of one inference without copies."""
    logger = trt.Logger(trt.Logger.ERROR)
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = bundle["build"]["options"]["version_compatible"]  # such an engine brings its own runtime
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        sys.exit("the engine was built but does not load on this GPU")
    context, stream = engine.create_execution_context(), cuda.stream()
    with np.load(HERE / "samples.npz") as stored:
        inputs, wanted = prepared(stored, bundle["preprocess"]), stored["outputs"]
    size = bundle["fixed_batch"] or bundle["build"]["batch"]
    x = np.ascontiguousarray(np.repeat(inputs[:1], size, axis=0))
    y = np.empty((size,) + wanted.shape[1:], np.float32)
    held = {bundle["input"]: cuda.memory(x.nbytes), bundle["output"]: cuda.memory(y.nbytes)}
    context.set_input_shape(bundle["input"], x.shape)
    for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
        if name not in held:  # a further output, which nobody reads
            held[name] = cuda.memory(int(np.prod(context.get_tensor_shape(name))) * 8)
    for name, pointer in held.items():
        context.set_tensor_address(name, pointer.value)

    def infer() -> None:
        if not context.execute_async_v3(stream.value):
            sys.exit("the engine failed while running")
        cuda.call("cudaStreamSynchronize", stream)

    answers = []
    for one in inputs:
        x[:] = one
        cuda.copy(held[bundle["input"]], x.ctypes.data_as(ctypes.c_void_p), x.nbytes, HOST_TO_DEVICE)
        infer()
        cuda.copy(y.ctypes.data_as(ctypes.c_void_p), held[bundle["output"]], y.nbytes, DEVICE_TO_HOST)
        answers.append(y[0].copy())
    got = np.stack(answers)
    gap, alike = float(np.abs(got - wanted).max()), float((got.argmax(1) == wanted.argmax(1)).mean())
    if not np.isfinite(got).all() or gap > bundle["tolerance"]:
        sys.exit(f"outputs differ by up to {gap:.3g}, allowed are {bundle['tolerance']:.3g}; {alike:.0%} of the labels agree")
    for _ in range(WARM_UP):
        infer()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        infer()
        times.append(1e3 * (time.perf_counter() - start))
    p50, p95, p99 = (float(q) for q in np.percentile(times, [50, 95, 99]))
    return {"gap": gap, "labels_alike": alike, "batch": size, "latency_ms": {"p50": p50, "p95": p95, "p99": p99, "n": RUNS}}


if __name__ == "__main__":
    main()
