"""Latency of an ONNX graph on a device that is not here: a roofline over fused operators. Always labelled predicted, with a wide interval.

Each operator takes the longer of computing and moving bytes, plus a launch. Peaks and bandwidth come from the profile; the fraction of them
that a class of operators reaches comes from the profile where it was measured, else from the tables below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgekd.errors import DeviceError
from edgekd.profile.schema import DeviceProfile
from edgekd.profile.workload import OpClass, Precision, Work, total_weights, works

if TYPE_CHECKING:
    from onnx import ModelProto

_PEAK_FIELD: dict[Precision, str] = {"fp32": "fp32_tflops", "fp16": "fp16_tflops", "int8": "int8_tops"}
_CLASS_FIELD: dict[OpClass, str] = {"eltwise": "eltwise_bw"}  # every other class has a field of its own name


@dataclass(frozen=True)
class _Defaults:
    """Assumed where a profile has no measurement; `int8` is the further factor of int8 kernels on their own peak."""

    gemm: float
    conv3x3: float
    conv1x1: float
    depthwise: float
    attention: float
    eltwise_bw: float
    int8: float
    launch_us: float


_CPU = _Defaults(gemm=0.75, conv3x3=0.7, conv1x1=0.65, depthwise=0.15, attention=0.4, eltwise_bw=0.7, int8=0.6, launch_us=3.0)
_GPU = _Defaults(gemm=0.5, conv3x3=0.45, conv1x1=0.35, depthwise=0.05, attention=0.3, eltwise_bw=0.7, int8=0.7, launch_us=4.0)
_OTHER = _Defaults(gemm=0.3, conv3x3=0.3, conv1x1=0.3, depthwise=0.05, attention=0.1, eltwise_bw=0.5, int8=1.0, launch_us=10.0)

# CPUs: measured with onnxruntime 1.31 on one Zen 4 core; other CPUs keep the same shape, their interval is wide for it
_CORE_DRAM_GBS = 13.0  # what one core streams from memory, whatever the socket could deliver
_CORE_CACHE_GBS = 50.0  # and from its caches
_LLC_SHARE = 0.25  # of the last-level cache that one model may count on: it is shared, and other data passes through
_LLC_DEFAULT_KIB = 8192.0
_COSTLY_FLOPS = 48.0  # a transcendental or normalised element costs as much time as this many operations at the peak
_RAGGED_DEPTHWISE = 6.0  # a depthwise width that is no multiple of 4 leaves the vector path: six to seven times slower
_STRIDED, _STRIDED_OPS = 4.0, {"Transpose", "Slice", "Split", "Concat", "Gather", "Pad"}  # copies that do not stream, on CPUs
_GROUPED = 3.0  # grouped convolutions work on short rows: measured on regnety_002 (8 channels a group)
_SPREAD_CALIBRATED, _SPREAD = 2.0, 3.0  # the interval is p50 divided and multiplied by this


@dataclass(frozen=True)
class LayerTime:
    """One fused operator: its time in microseconds, and what bounds it."""

    name: str
    op_types: tuple[str, ...]
    op_class: OpClass
    precision: Precision
    us: float
    bound: Literal["compute", "memory", "launch"]


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of one inference: median and the interval it should lie in; `basis` says what the figure rests on."""

    p50_ms: float
    low_ms: float
    high_ms: float
    device: str
    threads: int
    batch: int
    basis: str
    layers: tuple[LayerTime, ...]
    label: Literal["predicted"] = "predicted"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def predict(graph: Path | ModelProto, device: DeviceProfile, *, threads: int = 1, batch: int = 1, trusted: bool = False) -> Prediction:
    """Predicted latency of a graph as it is: its precision is what its tensors say. `threads` counts on CPUs only.

    Raises DeviceError naming the field that the profile leaves null, OnnxRefused for a file that is refused or whose shapes stay unknown.
    `trusted` skips the checks for files from the verified store. After Williams et al. 2009, Roofline.
    """
    parts = works(_model(graph, trusted), batch=batch)
    machine = _Machine(device, threads, parts)
    layers = tuple(machine.time(part) for part in parts)
    p50 = (sum(layer.us for layer in layers) + machine.session_us) / 1e3
    spread = _spread(device)
    return Prediction(p50, p50 / spread, p50 * spread, device.id, machine.threads, batch, _basis(device), layers)


class _Machine:
    """Rates of one device for one workload."""

    def __init__(self, device: DeviceProfile, threads: int, parts: Sequence[Work]):
        self.device, self.defaults = device, _defaults(device)
        cores = device.arch.cores or threads
        self.threads = min(threads, cores) if device.is_cpu else 1
        self.share = self.threads / cores if device.is_cpu else 1.0
        self.launch_us = _first(device.overheads_us.launch, self.defaults.launch_us)
        self.session_us = _first(device.overheads_us.session_run, 0.0)
        memory = _need(device, "memory", "bandwidth_gbs") * _first(device.efficiency.eltwise_bw, self.defaults.eltwise_bw)
        self.gbs = min(memory, self.threads * _CORE_DRAM_GBS) if device.is_cpu else memory
        self.cache_bytes = _LLC_SHARE * 1024 * _first(device.memory.llc_kib, _LLC_DEFAULT_KIB) if device.is_cpu else 0.0
        self.resident = total_weights(parts) <= self.cache_bytes  # else every run reads the weights from memory again

    def time(self, work: Work) -> LayerTime:
        compute = self._compute_us(work)
        memory = self._memory_us(work)
        us = max(compute, memory) + self.launch_us
        bound: Literal["compute", "memory", "launch"] = "compute" if compute >= memory else "memory"
        if self.launch_us > max(compute, memory):
            bound = "launch"
        return LayerTime(work.name, work.op_types, work.op_class, work.precision, us, bound)

    def _compute_us(self, work: Work) -> float:
        fp32 = _need(self.device, "compute", "fp32_tflops") if work.costly else 0.0
        costly = work.costly * _COSTLY_FLOPS / (fp32 * self.share * 1e6) if work.costly else 0.0
        if work.op_class == "eltwise":
            return costly
        peak = _need(self.device, "compute", _PEAK_FIELD[work.precision]) * self.share * 1e6  # operations per microsecond
        return work.flops * self._raggedness(work) / (peak * self._efficiency(work)) + costly

    def _memory_us(self, work: Work) -> float:
        fast = self.threads * _CORE_CACHE_GBS if self.device.is_cpu else self.gbs
        weights = work.weight_bytes / (fast if self.resident else self.gbs)
        activations = work.activation_bytes / (fast if work.activation_bytes <= self.cache_bytes else self.gbs)
        strided = self.device.is_cpu and not _STRIDED_OPS.isdisjoint(work.op_types)
        return (weights + activations * (_STRIDED if strided else 1.0)) / 1e3

    def _efficiency(self, work: Work) -> float:
        field = _CLASS_FIELD.get(work.op_class, work.op_class)
        own = _first(getattr(self.device.efficiency, field), getattr(self.defaults, field))
        return own * (self.defaults.int8 if work.precision == "int8" else 1.0)

    def _raggedness(self, work: Work) -> float:
        """Operations made over operations asked for: widths are filled up to the device's quantum."""
        if work.op_class == "depthwise":
            return _RAGGED_DEPTHWISE if self.device.is_cpu and work.out_width % 4 else 1.0
        if work.op_class not in ("conv3x3", "conv1x1") or not work.out_width:
            return 1.0
        quantum = self.device.channel_multiple(work.precision)
        filled = -(-work.out_width // quantum) * quantum / work.out_width
        return filled * (_GROUPED * max(1.0, quantum / work.group_width) if work.group_width else 1.0)


def _model(graph: Path | ModelProto, trusted: bool) -> ModelProto:
    if not isinstance(graph, Path):
        return graph
    from edgekd.safeio.onnxfile import check_onnx  # the only reader of ONNX files

    return check_onnx(graph, trusted=trusted)


def _defaults(device: DeviceProfile) -> _Defaults:
    return {"cpu": _CPU, "dgpu": _GPU, "soc_gpu": _GPU}.get(device.kind, _OTHER)


def _need(device: DeviceProfile, section: str, field: str) -> float:
    value: float | None = getattr(getattr(device, section), field)
    if value is None:
        hint = f"see what the profile knows: edgekd devices show {device.id}"
        raise DeviceError(f"{section}.{field} of device '{device.id}' is null: no latency can be predicted", where=device.id, hint=hint)
    return value


def _first(value: float | None, default: float) -> float:
    return default if value is None else value


def _calibrated(device: DeviceProfile) -> bool:
    return any(p.field.startswith("efficiency.") and p.kind == "measured" for p in device.provenance)


def _spread(device: DeviceProfile) -> float:
    return _SPREAD_CALIBRATED if _calibrated(device) else _SPREAD


def _basis(device: DeviceProfile) -> str:
    how = "efficiencies measured" if _calibrated(device) else "efficiencies assumed for its kind"
    return f"roofline/1 on the profile of {device.id} ({device.variant}), {how}, confidence {device.confidence}"
