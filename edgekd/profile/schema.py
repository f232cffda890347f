"""The schema edgekd.device/1: what a piece of hardware is and can do, every number with its provenance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from edgekd.config import Config

_SLUG = r"^[a-z0-9][a-z0-9-]{0,47}$"
_NUMBERED = (
    "arch",
    "compute",
    "units",
    "memory",
    "host_link",
    "power",
    "thermal",
    "overheads_us",
    "efficiency",
)  # sections whose numbers need provenance

Origin = Literal["vendor", "third_party", "memory", "measured", "derived"]
Flavour = Literal["u8s8", "u8s8_reduced", "x8s8", "s8s8"]  # types of activations and weights; x: whichever a tensor's range asks for
Positive = Field(default=None, gt=0, le=1e7)
Fraction = Field(
    None, gt=0, le=4, description="measured or assumed fraction of the peak; above 1 where an algorithm such as Winograd saves work"
)


class Arch(Config):
    """Names of the silicon; `isa` in the words of the tool chain: x86-64, avx2, avx512f, avx512_vnni, armv8.2-a, dotprod ..."""

    gpu: str | None = None
    sm: str | None = None
    cpu: str | None = None
    cores: int | None = Field(default=None, gt=0, le=4096, description="physical cores that the CPU peaks below are for")
    isa: tuple[str, ...] = ()
    npu: str | None = None
    dla: int | None = Field(default=None, ge=0, le=16)


class Sparsity(Config):
    """2:4 structured sparsity: the factor on the dense peaks."""

    supported: bool = False
    multiplier: float = Field(default=1.0, ge=1, le=4)


class Compute(Config):
    """Dense peaks of the whole device, all cores."""

    fp32_tflops: float | None = Positive
    fp16_tflops: float | None = Positive
    int8_tops: float | None = Positive
    fp8_tflops: float | None = Positive
    int4_tops: float | None = Positive
    sparsity_2_4: Sparsity | None = None
    accumulate: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="input type -> accumulators that run at the peak above"
    )


class Unit(Config):
    """One of several engines of a system on chip."""

    name: str
    fp16_tflops: float | None = Positive
    int8_tops: float | None = Positive


class Memory(Config):
    """Sizes in GiB and KiB, bandwidth in 10^9 byte/s."""

    capacity_gib: float | None = Positive
    usable_gib: float | None = Positive
    bandwidth_gbs: float | None = Positive
    shared_with_cpu: bool = False
    type: str | None = None
    l2_kib: float | None = Positive
    llc_kib: float | None = Positive
    sram_param_kib: float | None = Positive


class HostLink(Config):
    """How inputs reach the device."""

    type: Literal["none", "pcie", "usb3"] = "none"
    gbs: float | None = Positive


class PowerMode(Config):
    name: str
    w: float | None = Positive


class Power(Config):
    """Power limits in watts; `control` names one of the tools edgekd knows, never a command."""

    tdp_w: float | None = Positive
    modes: tuple[PowerMode, ...] = ()
    default_mode: str | None = None
    control: Literal["nvpmodel", "nvidia_smi", "cpufreq"] | None = None


class Thermal(Config):
    throttle_c: float | None = Field(default=None, gt=0, le=150)
    probe: Literal["sysfs", "nvml"] | None = None


class Runtime(Config):
    """A runtime of the device, best first; `versions` is a constraint, `opset` what files must have."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    versions: str | None = None
    ep: tuple[Literal["CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"], ...] = ()
    strongly_typed: bool | None = None
    precisions: tuple[str, ...] = ()
    explicit_qdq: bool | None = None
    opset: int | None = Field(default=None, ge=7, le=30)


class Preferred(Config):
    """What runs best there; `channel_multiple` is the quantum of widths by precision."""

    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    batch: int = Field(default=1, ge=1, le=4096)
    layout: Literal["nchw", "nhwc"] = "nchw"
    channel_multiple: dict[Literal["fp32", "fp16", "int8"], int] = Field(default_factory=dict)
    min_channels: int = Field(default=1, ge=1, le=1024)


class OpRule(Config):
    act: tuple[str, ...] = ()
    wt: tuple[str, ...] = ()
    note: str | None = None


class Limits(Config):
    max_params_mb: float | None = Positive
    static_shapes_only: bool = False
    max_engine_mb: float | None = Positive
    int_only: bool = False
    batch: int | Literal["any"] = "any"


class Overheads(Config):
    """Fixed costs in microseconds, measured on the device."""

    launch: float | None = Field(default=None, ge=0, le=1e6)
    h2d_per_mb: float | None = Field(default=None, ge=0, le=1e6)
    session_run: float | None = Field(default=None, ge=0, le=1e6)


class Efficiency(Config):
    """Measured fraction of the peak (of the memory bandwidth for `eltwise_bw`) by class of operator."""

    gemm: float | None = Fraction
    conv3x3: float | None = Fraction
    conv1x1: float | None = Fraction
    depthwise: float | None = Fraction
    attention: float | None = Fraction
    eltwise_bw: float | None = Fraction


class Measured(Config):
    date: str | None = None
    tool_versions: dict[str, str] = Field(default_factory=dict)
    protocol: Literal["edgekd.measure/1"] = "edgekd.measure/1"
    points: tuple[dict[str, Any], ...] = ()


class PredictError(Config):
    mape: float | None = Field(default=None, ge=0)
    within_10pct: float | None = Field(default=None, ge=0, le=1)
    n: int = Field(default=0, ge=0)


class PredictSettings(Config):
    model: Literal["roofline/1"] = "roofline/1"
    error: PredictError = PredictError()


class Access(Config):
    transport: Literal["local", "ssh", "adb", "none"] = "none"
    runner: Literal["trtexec", "ort_perf", "benchmark_model"] | None = None


class Provenance(Config):
    """Where one number comes from."""

    field: str
    value: float
    source: str = Field(min_length=3)
    kind: Origin
    checked: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")


class DeviceProfile(Config):
    """One device: sections as in `hardware/*.yaml`; peaks in 10^12 operations/s, bandwidth in 10^9 byte/s, overheads in microseconds."""

    schema_: Literal["edgekd.device/1"] = Field(alias="schema")
    id: str = Field(pattern=_SLUG)
    variant: str
    name: str
    vendor: str
    kind: Literal["cpu", "dgpu", "soc_gpu", "npu", "dsp", "tpu", "mcu"]
    aliases: tuple[str, ...] = ()
    arch: Arch
    compute: Compute
    units: tuple[Unit, ...] = ()
    memory: Memory
    host_link: HostLink = HostLink()
    power: Power = Power()
    thermal: Thermal = Thermal()
    runtimes: tuple[Runtime, ...] = Field(min_length=1)
    preferred: Preferred = Preferred()
    op_rules: dict[str, OpRule] = Field(default_factory=dict)
    limits: Limits = Limits()
    overheads_us: Overheads = Overheads()
    efficiency: Efficiency = Efficiency()
    measured: Measured = Measured()
    predict: PredictSettings = PredictSettings()
    access: Access = Access()
    provenance: tuple[Provenance, ...] = ()
    confidence: Literal["low", "medium", "high"]

    @property
    def is_cpu(self) -> bool:
        return self.kind == "cpu"

    @property
    def flavour(self) -> Flavour:
        """The quantization flavour of the device's first runtime."""
        return self.flavour_for(self.runtimes[0].name)

    def flavour_for(self, backend: str) -> Flavour:
        """What runtimes of x86 CPUs want (7-bit weights without VNNI; OpenVINO no zero points, onnxruntime no signs); symmetric everywhere else."""
        if backend not in ("onnxruntime", "openvino") or not self.is_cpu or "x86-64" not in self.arch.isa:
            return "s8s8"
        if not any("vnni" in flag for flag in self.arch.isa):
            return "u8s8_reduced"
        return "x8s8" if backend == "openvino" else "u8s8"

    def runtime(self, backend: str) -> Runtime | None:
        """The entry of `runtimes` for a backend, or None where the device does not offer it."""
        return next((r for r in self.runtimes if r.name == backend), None)

    def channel_multiple(self, precision: str) -> int:
        """The quantum of channel widths for a precision, else for the one that the device prefers; 1 where the profile names neither."""
        named = {str(k): v for k, v in self.preferred.channel_multiple.items()}
        return named.get(precision, named.get(self.preferred.precision, 1))

    def origin(self, field: str) -> Origin | None:
        """The kind of provenance of a dotted field."""
        return next((p.kind for p in self.provenance if p.field == field), None)

    @model_validator(mode="after")
    def _numbers_have_provenance(self) -> DeviceProfile:
        known = {p.field: p for p in self.provenance}
        for field, value in numbers(self):
            entry = known.pop(field, None)
            if entry is None:
                raise _at(field, f"{value:g} has no provenance entry")
            if entry.value != value:
                raise _at(field, f"is {value:g}, its provenance says {entry.value:g}")
        if known:
            raise _at("provenance", f"names '{min(known)}', which holds no number")
        return self

    @model_validator(mode="after")
    def _confidence_is_earned(self) -> DeviceProfile:
        unchecked = [p.field for p in self.provenance if p.kind == "memory" and p.field.startswith(("compute.", "memory.bandwidth"))]
        if unchecked and self.confidence != "low":
            raise _at("confidence", f"must be low while {unchecked[0]} is from memory")
        return self


def numbers(profile: DeviceProfile) -> Iterator[tuple[str, float]]:
    """Every number of the sections that describe the hardware, as (dotted field, value)."""
    for section in _NUMBERED:
        value = getattr(profile, section)
        dumped = [u.model_dump() for u in value] if isinstance(value, tuple) else value.model_dump()
        yield from _leaves(dumped, section)


def _leaves(value: Any, field: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in pairs:
            yield from _leaves(item, f"{field}.{key}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield field, value


def _at(field: str, sentence: str) -> PydanticCustomError:
    """An error of the whole profile that points at one of its fields."""
    return PydanticCustomError("device", "{sentence}", {"sentence": sentence, "field": field})
