"""What stands between this machine and a working edgekd: one check per line, each with what was seen, what is wanted and what to do."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from edgekd import registry
from edgekd.errors import ResourceError
from edgekd.profile.host import Machine, detect, driver
from edgekd.safeio.locks import check_locks_work
from edgekd.store import home

Status = Literal["ok", "warn", "fail"]

_MIN_PYTHON, _TESTED_PYTHON = (3, 11), (3, 13)
_WHY = {  # floors that are there for safety
    "torch": "CVE-2026-24747 in older ones",
    "onnx": "four CVEs in older ones",
    "Pillow": "CVE-2026-55380 in older ones",
}
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)>=([0-9.]+)$")
_RUNTIME_WHEELS = ("onnxruntime", "onnxruntime-gpu")
_WANTED_FREE_GB = 5.0


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    status: Status
    seen: str
    wanted: str
    hint: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def examine(store: Path | None = None) -> list[Check]:
    """All checks; `store` defaults to EDGEKD_HOME or ~/.cache/edgekd. Never raises for what it finds."""
    machine, root = detect(), store or home()
    checks = [
        _python(),
        _platform(),
        *_libraries(),
        _runtime_wheels(),
        _providers(machine),
        *_optional_backends(),
        _gpu(machine),
        _cores(machine),
        _vectors(machine),
    ]
    return [*checks, _disk(root), _locking(root)]


def _python() -> Check:
    seen, lowest = platform.python_version(), ".".join(map(str, _MIN_PYTHON))
    newest = ".".join(map(str, _TESTED_PYTHON))
    if sys.version_info < _MIN_PYTHON:
        return Check("python", "fail", seen, f"{lowest} or newer", "make a virtual environment with a newer Python")
    untested = sys.version_info[:2] > _TESTED_PYTHON
    return Check(
        "python", "warn" if untested else "ok", seen, f"{lowest} to {newest}", "newer than what edgekd is tested with" if untested else ""
    )


def _platform() -> Check:
    seen = f"{platform.system()} {platform.machine()}"
    known = platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")
    return Check("platform", "ok" if known else "warn", seen, "Linux on x86-64 or arm64", "" if known else "edgekd is not tested here")


def _libraries() -> Iterator[Check]:
    if not floors():
        yield Check("edgekd", "warn", "not installed", "an installed edgekd, whose requirements can be checked", "pip install -e .")
    for name, floor in floors().items():
        seen, wanted = _version(name), f"{floor} or newer" + (f" ({_WHY[name]})" if name in _WHY else "")
        if seen is None:
            yield Check(name, "fail", "not installed", wanted, f"pip install '{name}>={floor}'")
        elif _numbers(seen) < _numbers(floor):
            yield Check(name, "fail", seen, wanted, f"pip install --upgrade '{name}>={floor}'")
        else:
            yield Check(name, "ok", seen, wanted)


def floors() -> dict[str, str]:
    """Library -> lowest version, as pyproject.toml declares them; those that depend on the platform or an extra are left out."""
    try:
        declared = metadata.requires("edgekd") or []
    except metadata.PackageNotFoundError:
        declared = []
    return {m[1]: m[2] for line in declared if (m := _REQUIREMENT.match(line))}


def _runtime_wheels() -> Check:
    """Two wheels unpack into one folder: whichever came last wins, and uninstalling either breaks both."""
    found = {name: version for name in _RUNTIME_WHEELS if (version := _version(name)) is not None}
    seen = ", ".join(f"{name} {version}" for name, version in found.items()) or "not installed"
    if len(found) == 1:
        return Check("onnxruntime", "ok", seen, "one onnxruntime wheel")
    hint = "pip uninstall onnxruntime onnxruntime-gpu, then install one of them" if found else "pip install onnxruntime"
    return Check("onnxruntime", "fail", seen, "one onnxruntime wheel", hint)


def _providers(machine: Machine) -> Check:
    wanted = "CPUExecutionProvider" + (", CUDAExecutionProvider" if machine.gpu else "")
    if importlib.util.find_spec("onnxruntime") is None:
        return Check("providers", "fail", "no onnxruntime", wanted, "pip install onnxruntime")
    try:
        listed: list[str] = importlib.import_module("onnxruntime").get_available_providers()
    except Exception as err:  # two wheels on top of each other fail in many ways
        return Check("providers", "fail", f"onnxruntime cannot be imported: {err}"[:200], wanted, "reinstall onnxruntime")
    missing = [name for name in wanted.split(", ") if name not in listed]
    hint = f"install onnxruntime-gpu: this build lacks {missing[0]}" if missing else ""
    return Check("providers", "warn" if missing else "ok", ", ".join(listed), wanted, hint)


def _optional_backends() -> Iterator[Check]:
    """Runtimes that a target may name, each with how to get it; none of them is needed."""
    for name in registry.names("backend"):
        backend = registry.load("backend", name)()
        if name not in _RUNTIME_WHEELS:
            missing = backend.available()
            yield Check(f"backend {name}", "ok", backend.version() if missing is None else "not installed", "none is needed", missing or "")


def _gpu(machine: Machine) -> Check:
    if machine.gpu is None:
        return Check("gpu", "ok", "none", "none is needed")
    return Check("gpu", "ok", f"{machine.gpu}, driver {driver() or 'unknown'}", "none is needed")


def _cores(machine: Machine) -> Check:
    limit = os.environ.get("OMP_NUM_THREADS")
    seen = f"{machine.cores} usable" + (f", OMP_NUM_THREADS={limit}" if limit else "")
    enough = machine.cores >= 2
    return Check("cores", "ok" if enough else "warn", seen, "2 or more", "" if enough else "training and measuring will disturb each other")


def _vectors(machine: Machine) -> Check:
    seen, wanted = ", ".join(machine.isa), "AVX2 with VNNI (x86-64) or dotprod (arm64)"
    fast = any("vnni" in flag or flag == "dotprod" for flag in machine.isa)
    return Check(
        "vectors", "ok" if fast else "warn", seen, wanted, "" if fast else "int8 gains little on this CPU; weights are quantized to 7 bits"
    )


def _disk(root: Path) -> Check:
    existing = next(p for p in (root, *root.absolute().parents) if p.exists())
    free_gb = shutil.disk_usage(existing).free / 1e9
    enough = free_gb >= _WANTED_FREE_GB
    hint = "" if enough else "edgekd store gc, or set EDGEKD_HOME to a larger disk"
    return Check("disk", "ok" if enough else "warn", f"{free_gb:.1f} GB free at {root}", f"{_WANTED_FREE_GB:g} GB", hint)


def _locking(root: Path) -> Check:
    wanted, hint = "file locks in the store folder", "set EDGEKD_HOME to a local disk that you may write to"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=root) as file:
            check_locks_work(Path(file.name))
    except (OSError, ResourceError) as err:
        return Check("locking", "fail", f"{root}: {getattr(err, 'strerror', None) or err}", wanted, hint)
    return Check("locking", "ok", str(root), wanted)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> list[int]:
    """Leading numbers of a version: `2.10.0+cu130` -> [2, 10, 0]."""
    return [int(n) for n in re.findall(r"\d+", version.partition("+")[0])]
