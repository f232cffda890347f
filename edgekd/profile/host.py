"""The machine at hand as a device profile, read from the kernel's own files: no tool is started and no runtime imported."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgekd.profile.schema import DeviceProfile

HOST = "host"
_PROC, _CPU0 = Path("/proc"), Path("/sys/devices/system/cpu/cpu0")
_ISA_FLAGS = {  # kernel's flag -> the name used in profiles
    "avx2": "avx2",
    "fma": "fma",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "asimd": "neon",
    "asimdhp": "fp16",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
}
_MACHINES = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "armv8", "arm64": "armv8"}
_CORE_GBS, _PLATFORM_GBS = 12.8, 51.2  # what one core streams, and two channels of DDR4-3200: a rule, not a measurement
_AMD_ZEN5 = 26  # family; before it AMD's 512-bit operations take two cycles
# Fractions of the *base-clock* peak: above 1 because the core boosts, and measured with that clock
_AVX512_EFFICIENCY = {"gemm": 1.25, "conv3x3": 1.11, "conv1x1": 1.03, "depthwise": 0.34, "attention": 1.11}
_AVX512_SOURCE = "tools/bench_predict.py --efficiency: single operators, onnxruntime 1.31, one thread of an AMD Zen 4 server"
_AVX512_CHECKED = "2026-11-22"


@dataclass(frozen=True)
class Machine:
    """Raw facts; `isa` in profile words, `cores` physical and usable by this process."""

    cpu: str
    vendor: str
    family: int
    isa: tuple[str, ...]
    cores: int
    clock_ghz: float | None
    memory_gib: float | None
    l2_kib: float | None
    llc_kib: float | None
    gpu: str | None


def host_profile() -> DeviceProfile:
    """The detected profile `host`; peaks follow from cores, clock and vector width, and are null where one of them is unknown."""
    return profile_of(detect())


def identity() -> dict[str, Any]:
    """What makes measurements of two machines comparable, for cache keys; no host name, no clock."""
    m = detect()
    return {"cpu": m.cpu, "isa": list(m.isa), "cores": m.cores, "arch": platform.machine(), "gpu": m.gpu}


def driver(proc: Path = _PROC) -> str | None:
    """Version of NVIDIA's kernel driver; None without it."""
    found = re.search(r"\d+\.\d+(\.\d+)?", _text(proc / "driver/nvidia/version"))
    return found.group() if found else None


def detect(proc: Path = _PROC, cpu0: Path = _CPU0) -> Machine:
    """Reads the facts below `proc` and `cpu0`; whatever is missing is None."""
    blocks = _cpu_blocks(_text(proc / "cpuinfo"))
    first = blocks[0] if blocks else {}
    flags = (first.get("flags") or first.get("Features") or "").split()
    isa = [_MACHINES.get(platform.machine().lower(), platform.machine()), *(_ISA_FLAGS[f] for f in _ISA_FLAGS if f in flags)]
    caches = _caches(cpu0)
    return Machine(
        cpu=first.get("model name") or f"{platform.machine()} part {first.get('CPU part', 'unknown')}",
        vendor=first.get("vendor_id", "unknown"),
        family=int(first.get("cpu family", "0")),
        isa=tuple(isa),
        cores=_physical_cores(blocks),
        clock_ghz=_clock_ghz(first, cpu0),
        memory_gib=_memory_gib(_text(proc / "meminfo")),
        l2_kib=caches.get(2),
        llc_kib=caches[max(caches)] if caches else None,
        gpu=_gpu(proc),
    )


def profile_of(m: Machine) -> DeviceProfile:
    """The profile that follows from the facts."""
    from edgekd.profile.schema import DeviceProfile  # the schema costs more than the facts, and most callers want only those

    return DeviceProfile.model_validate(raw_profile(m))


def raw_profile(m: Machine) -> dict[str, Any]:
    """The same as plain data, as a profile's file would say it."""
    memory = {
        "capacity_gib": m.memory_gib,
        "bandwidth_gbs": min(m.cores * _CORE_GBS, _PLATFORM_GBS),
        "l2_kib": m.l2_kib,
        "llc_kib": m.llc_kib,
    }
    compute, efficiency = _peaks(m), _AVX512_EFFICIENCY if "avx512f" in m.isa else {}
    quantum = 16 if "avx512f" in m.isa else 8  # channels of one vector register
    detected = {"arch.cores": m.cores} | {f"memory.{k}": v for k, v in memory.items() if k != "bandwidth_gbs"}
    derived = {"memory.bandwidth_gbs": memory["bandwidth_gbs"]} | {f"compute.{k}": v for k, v in compute.items()}
    return {
        "schema": "edgekd.device/1",
        "id": HOST,
        "variant": "detected",
        "name": f"this machine ({m.cpu})",
        "vendor": m.vendor,
        "kind": "cpu",
        "arch": {"cpu": m.cpu, "gpu": m.gpu, "cores": m.cores, "isa": m.isa},
        "compute": compute,
        "memory": memory,
        "efficiency": efficiency,
        "runtimes": [
            {"name": "onnxruntime", "ep": ["CPUExecutionProvider"], "precisions": ["fp32", "int8"]},
            {"name": "openvino", "precisions": ["fp32", "int8"]},
        ],
        "preferred": {"precision": "int8", "channel_multiple": {"fp32": quantum, "int8": quantum}},
        "access": {"transport": "local"},
        "confidence": "medium",
        "provenance": [
            *_entries(detected, "kernel files of this machine", "measured"),
            *_entries(derived, "cores x clock x vector width; bandwidth by a rule per core", "derived"),
            *_entries({f"efficiency.{k}": v for k, v in efficiency.items()}, _AVX512_SOURCE, "measured", _AVX512_CHECKED),
        ],
    }


def _peaks(m: Machine) -> dict[str, float | None]:
    if m.clock_ghz is None:
        return {"fp32_tflops": None, "fp16_tflops": None, "int8_tops": None}
    fp32 = _flops_per_cycle(m) * m.clock_ghz * m.cores / 1e3
    fp16 = 2 * fp32 if {"fp16", "avx512_fp16"} & set(m.isa) else None
    return {"fp32_tflops": round(fp32, 4), "fp16_tflops": round(fp16, 4) if fp16 else None, "int8_tops": round(fp32 * _int8_gain(m), 4)}


def _flops_per_cycle(m: Machine) -> int:
    """fp32 operations of one core in one cycle, two for a multiply-add."""
    if "avx512f" in m.isa:
        return 32 if m.vendor == "AuthenticAMD" and m.family < _AMD_ZEN5 else 64
    if "avx2" in m.isa:
        return 32
    return 16 if "neon" in m.isa else 8


def _int8_gain(m: Machine) -> float:
    """int8 operations per fp32 operation: dot-product instructions do four; without them little is won."""
    if {"avx512_vnni", "avx_vnni", "dotprod"} & set(m.isa):
        return 4
    return 2 if "neon" in m.isa else 1.5


def _entries(values: Mapping[str, float | None], source: str, kind: str, checked: str | None = None) -> list[dict[str, Any]]:
    day = checked or date.today().isoformat()
    return [{"field": f, "value": v, "source": source, "kind": kind, "checked": day} for f, v in values.items() if v is not None]


def _cpu_blocks(text: str) -> list[dict[str, str]]:
    blocks = []
    for block in text.strip().split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines())
        blocks.append({key.strip(): value.strip() for key, _, value in pairs})
    return [b for b in blocks if "processor" in b]


def _physical_cores(blocks: list[dict[str, str]]) -> int:
    """Cores, not hyper-threads, and no more than this process may use (containers, taskset)."""
    ids = {(b["physical id"], b["core id"]) for b in blocks if "core id" in b and "physical id" in b}
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(len(ids) or len(blocks) or allowed, allowed))


def _clock_ghz(first: Mapping[str, str], cpu0: Path) -> float | None:
    """The base clock where the kernel names it, else its highest, else what it runs at now."""
    for name in ("base_frequency", "cpuinfo_max_freq"):
        text = _text(cpu0 / "cpufreq" / name).strip()
        if text.isdigit():
            return round(int(text) / 1e6, 2)
    mhz = first.get("cpu MHz")
    return round(float(mhz) / 1e3, 2) if mhz else None


def _memory_gib(text: str) -> float | None:
    kib = next((line.split()[1] for line in text.splitlines() if line.startswith("MemTotal:")), None)
    return round(int(kib) / 2**20, 1) if kib else None


def _caches(cpu0: Path) -> dict[int, float]:
    """Level -> KiB of the data or unified caches that the first core sees."""
    found: dict[int, float] = {}
    for folder in sorted((cpu0 / "cache").glob("index*")):
        level, size = _text(folder / "level").strip(), _text(folder / "size").strip()
        if level.isdigit() and size.endswith("K") and _text(folder / "type").strip() != "Instruction":
            found[int(level)] = float(size[:-1])
    return found


def _gpu(proc: Path) -> str | None:
    """The model that NVIDIA's kernel driver names; None without the driver."""
    if not (proc / "driver/nvidia/version").is_file():
        return None
    for info in sorted((proc / "driver/nvidia/gpus").glob("*/information")):
        for line in _text(info).splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return "NVIDIA GPU"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
