"""TensorRT: an engine for one kind of NVIDIA GPU, from a graph that carries its own precision.

The network is strongly typed, so what runs in int8 or fp16 is what the graph says (Q/DQ pairs, casts), and one code path serves TensorRT 10.3 to 11
and TensorRT for RTX (tensorrt_rtx.py). TensorRT builds on the GPU that will run the engine; without that GPU the bundle carries build.py instead.
An engine is executable code: only what this process built, or a verified bundle, is opened.
Source: NVIDIA's Python API of 10.3, 10.16, 11.4 and RTX 1.7, as listed by the bindings themselves.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from edgekd.backends import asked, version_of
from edgekd.backends._timing import TimingCache
from edgekd.backends._trt_callbacks import first_reason, log_of, monitor_of, stdout_for_data
from edgekd.backends._trt_session import TrtSession
from edgekd.config import Config
from edgekd.errors import BackendError
from edgekd.profile.device import same_machine
from edgekd.profile.host import detect, driver
from edgekd.registry import register

if TYPE_CHECKING:
    from edgekd.backends import Feeds, Layer
    from edgekd.profile.schema import DeviceProfile

_MIB = 2**20
_X86_FLAVOUR = re.compile(r"Non-zero zero point|type Int32 but must have type|zeroPt must be all zeros")
_FLAVOUR_HINT = "the graph is quantized for x86; quantize for this device: edgekd quantize MODEL --data FOLDER --device {device}"


@register("backend")
class TensorRT:
    """Builds strongly typed engines, and runs them on this machine's GPU."""

    class Options(Config):
        max_batch: int = Field(32, ge=1, le=4096, description="largest batch that the engine takes")
        workspace_mib: int | None = Field(None, ge=1, description="scratch memory that kernels may use; default: what the device has")
        version_compatible: bool = Field(False, description="the engine also runs with later versions of the runtime")
        hardware_compatible: bool = Field(False, description="the engine also runs on other GPUs from Ampere on, somewhat slower")
        dla: int | None = Field(None, ge=0, le=15, description="DLA core that runs what it can; the GPU takes the rest")
        optimization: int = Field(3, ge=0, le=5, description="how long the builder searches for kernels")

    name: str = "tensorrt"
    suffix: str = ".engine"
    builds: bool = True
    libraries: ClassVar[tuple[str, ...]] = ("tensorrt",)  # imported in this order; the last one has the API
    wheels: ClassVar[tuple[str, ...]] = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
    install: ClassVar[str] = "pip install tensorrt, on the machine with the GPU"
    times_kernels: ClassVar[bool] = True  # its builder tries kernels on the GPU: worth keeping what it learnt
    _told: Callable[[float, str], None] | None = None

    # ------------------------------------------------------------------------------------------------ what is here
    def available(self) -> str | None:
        if any(importlib.util.find_spec(library) is None for library in self.libraries):
            return f"{self.name} is not installed: {self.install}"
        return None

    def builds_for(self, device: DeviceProfile) -> str | None:
        if (missing := self.available()) is not None:
            return missing
        if not same_machine(device):
            return f"TensorRT builds on the device itself: copy the bundle to {device.id} and run its build.py there"
        return None

    def runs_on(self, device: DeviceProfile) -> bool:
        return self.available() is None and device.arch.gpu is not None and same_machine(device)

    def version(self) -> str:
        return version_of(*self.wheels)

    def prepare(self) -> None:
        self.runtime()

    def runtime(self) -> Any:
        """The imported bindings; raises BackendError where they or their libraries are missing."""
        if (missing := self.available()) is not None:
            raise BackendError(missing, hint="edgekd doctor")
        try:
            return [importlib.import_module(library) for library in self.libraries][-1]
        except (ImportError, OSError) as error:
            raise BackendError(f"{self.name} cannot be imported: {error}", hint="edgekd doctor") from error

    # ------------------------------------------------------------------------------------------------ building
    def convert(self, graph: Path, device: DeviceProfile, out: Path, options: Mapping[str, Any], *, batch: int = 1) -> dict[str, Any]:
        """Builds `model.engine` for `batch` images, and up to `max_batch` where the graph allows; raises BackendError that names the node."""
        chosen, trt = self._asked(options, graph), self.runtime()
        log = log_of(trt).clear()
        try:
            builder = trt.Builder(log)
        except Exception as error:  # the bindings raise pybind11's own types
            raise BackendError(f"{self.name} has no builder here: {error}", where=graph.name, hint="edgekd doctor") from error
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        if not parser.parse(graph.read_bytes()):
            raise self._refused([parser.get_error(i) for i in range(parser.num_errors)], graph, device)
        config = builder.create_builder_config()
        self._target(trt, config, device)
        _apply(trt, config, chosen)
        shapes = _add_profile(builder, config, network, batch, max(batch, chosen.max_batch), graph)
        timing = TimingCache(self.name, trt.__version__, detect().gpu or device.id) if self.times_kernels else None
        if timing is not None:
            timing.attach(config)
        plan = _built(builder, network, config, monitor_of(trt, self._told))
        if plan is None:
            raise BackendError(
                f"{self.name} cannot build an engine for {device.id}: {log.said('the builder gives no reason')}",
                where=graph.name,
                hint=_way_out(graph, device),
            )
        (out / "model.engine").write_bytes(plan)
        return {
            "model_file": "model.engine",
            "runtime": self.name,
            "version": str(trt.__version__),
            "compute_capability": device.arch.sm,
            "layers": network.num_layers,
            "shapes": shapes,
            "max_batch": max((sizes[2][0] for sizes in shapes.values()), default=None),
            "options": chosen.model_dump(exclude_none=True),
            "flags": _flags(trt, network, config),
            **({"driver": version} if (version := driver()) else {}),
            "timing_cache": timing.keep(config) if timing is not None else None,
            "note": timing.note if timing is not None else None,
        }

    def watch(self, told: Callable[[float, str], None] | None) -> None:
        """`convert` calls `told(share done, phase)` from its own threads while it builds; None ends that."""
        self._told = told

    def _asked(self, options: Mapping[str, Any], graph: Path) -> Any:
        """The options; RTX has fewer."""
        return asked(self, options, graph)

    def _target(self, trt: Any, config: Any, device: DeviceProfile) -> None:
        """TensorRT builds for the GPU at hand: nothing to set."""

    def _refused(self, errors: Sequence[Any], graph: Path, device: DeviceProfile) -> BackendError:
        """The parser's first refusal in one line, with the node that it is about."""
        if not errors:
            return BackendError(f"{self.name} cannot read the graph", where=graph.name, expected="an ONNX file", hint="edgekd doctor")
        first, said = errors[0], first_reason(errors[0].desc())
        node = f"node '{first.node_name()}' ({first.node_operator()}): " if first.node_name() or first.node_operator() else ""
        hint = _FLAVOUR_HINT.format(device=device.id) if _X86_FLAVOUR.search(first.desc()) else _way_out(graph, device)
        return BackendError(f"{self.name} does not take the graph: {node}{said}", where=graph.name, hint=hint)

    # ------------------------------------------------------------------------------------------------ running
    def open(self, engine: Path, *, threads: int, device: DeviceProfile, options: Mapping[str, Any] | None = None) -> TrtSession:
        """The engine on this machine's GPU; `threads` is for runtimes of the CPU."""
        if not self.runs_on(device):
            raise BackendError(
                f"an engine for {device.id} does not run on this machine",
                where=engine.name,
                expected=device.name,
                hint="copy the bundle to the device",
            )
        return TrtSession(self.runtime(), engine, lasting=bool((options or {}).get("version_compatible")))

    def layers(
        self, engine: Path, feeds: Feeds, threads: int, device: DeviceProfile, options: Mapping[str, Any] | None = None
    ) -> list[Layer]:
        """Time per layer on this machine's GPU, with the types and formats that the builder chose (slowest first)."""
        session = self.open(engine, threads=threads, device=device, options=options)
        found = session.layers(feeds)
        session.close()
        return found


def _way_out(graph: Path, device: DeviceProfile) -> str:
    """Of a refused graph: without what was rounded, or on another runtime."""
    rounded = b"QuantizeLinear" in graph.read_bytes()
    return f"-o targets.{device.id}.{'precision=fp32' if rounded else 'backend=onnxruntime'}"


# ------------------------------------------------------------------------------------------------------------ a build and its settings
def _built(builder: Any, network: Any, config: Any, monitor: Any) -> Any:
    """The serialized engine, or None; the monitor ends the build where a signal ends the wait."""
    config.progress_monitor = monitor
    with (
        stdout_for_data(),
        ThreadPoolExecutor(1) as pool,
    ):  # an exception of a signal must not be raised in a callback, below the builder's C++
        built = pool.submit(builder.build_serialized_network, network, config)
        try:
            return built.result()
        except BaseException:
            monitor.stopped = True
            raise


def _apply(trt: Any, config: Any, chosen: Any) -> None:
    config.builder_optimization_level = chosen.optimization
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # types and formats of layers, for the engine inspector
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, it would round fp32 to 10 bits behind the graph's back
    if chosen.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, chosen.workspace_mib * _MIB)
    if chosen.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if chosen.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if chosen.dla is not None:
        config.default_device_type, config.DLA_core = trt.DeviceType.DLA, chosen.dla
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)


def _flags(trt: Any, network: Any, config: Any) -> list[str]:
    """Names of what is set. TF32 is on unless it is cleared, so its absence says that it is off."""
    found = [name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag)]
    return sorted(found + ["STRONGLY_TYPED"] * network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


def _add_profile(builder: Any, config: Any, network: Any, batch: int, most: int, graph: Path) -> dict[str, list[list[int]]]:
    """One optimization profile for a dynamic batch: smallest, usual and largest shape of each input. Returns what was set."""
    profile, shapes = builder.create_optimization_profile(), {}
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = [int(d) for d in tensor.shape]
        if -1 not in shape:
            continue
        if shape[0] != -1 or -1 in shape[1:]:
            raise BackendError(f"input '{tensor.name}' is {shape}", where=graph.name, expected="no dynamic size but the batch, the first")
        shapes[tensor.name] = [[n, *shape[1:]] for n in (1, batch, most)]
        profile.set_shape(tensor.name, *map(tuple, shapes[tensor.name]))
    if shapes:
        config.add_optimization_profile(profile)
    return shapes
