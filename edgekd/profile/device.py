"""Devices by name: `host` is detected, every other one is a file `hardware/<id>.yaml`. Loads no torch, numpy or runtime."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgekd.errors import RecipeError, UnknownName, suggest
from edgekd.profile.host import HOST, detect, host_profile, identity
from edgekd.profile.schema import DeviceProfile, numbers
from edgekd.shipped import shipped_dir

__all__ = ["HOST", "DeviceProfile", "device_ids", "host_profile", "identity", "load_device", "numbers", "read_device", "same_machine"]


def device_ids() -> list[str]:
    """`host` first, then every shipped profile, without reading one."""
    return [HOST, *sorted(p.stem for p in shipped_dir("hardware").glob("*.yaml"))]


def load_device(name: str) -> DeviceProfile:
    """The profile of an id or alias; raises UnknownName with the nearest id, RecipeError for a malformed file."""
    ids = device_ids()
    if name == HOST:
        return host_profile()
    if name in ids:
        return _read(shipped_dir("hardware") / f"{name}.yaml")
    for other in ids[1:]:  # an alias is inside a file: read them only now
        profile = _read(shipped_dir("hardware") / f"{other}.yaml")
        if name in profile.aliases:
            return profile
    raise UnknownName(f"unknown device '{name}'{suggest(name, ids)}", hint="list them: edgekd devices list")


def read_device(path: Path) -> DeviceProfile:
    """The profile in one file, whose id must be the file's name; raises RecipeError (`file:line:col`)."""
    from edgekd.safeio.yaml import read_file  # reads YAML only when a file is asked for

    document = read_file(path)
    if not isinstance(document.value, dict):
        raise RecipeError([f"{path}:1:1: a device profile is a mapping of sections"])
    try:
        profile = DeviceProfile.model_validate(document.value)
    except ValidationError as err:
        raise RecipeError([_problem(dict(e), document.marks, str(path)) for e in err.errors()]) from err
    if profile.id != path.stem:
        raise RecipeError([f"{_mark(('id',), document.marks, str(path))}: id '{profile.id}' differs from the file's name '{path.stem}'"])
    return profile


def same_machine(profile: DeviceProfile) -> bool:
    """True if this machine is the device: the detected host, or a graphics card whose name the driver gives (`NVIDIA H200` is `NVIDIA H200 SXM`)."""
    if profile.id == HOST:
        return True
    gpu = detect().gpu if profile.kind == "dgpu" else None
    return gpu is not None and f"{profile.name} ".startswith(f"{gpu} ")


@cache
def _read(path: Path) -> DeviceProfile:
    return read_device(path)


def _problem(error: dict[str, Any], marks: dict[tuple[str | int, ...], str], where: str) -> str:
    pointed = str(error.get("ctx", {}).get("field", "")) if error["type"] == "device" else ""
    loc: tuple[str | int, ...] = tuple(int(s) if s.isdigit() else s for s in pointed.split(".")) if pointed else error["loc"]
    field = ".".join(map(str, loc)) or "device"
    said = f"unknown field{_near(loc)}" if error["type"] == "extra_forbidden" else error["msg"]
    return f"{_mark(loc, marks, where)}: {field}: {said}"


def _near(loc: tuple[str | int, ...]) -> str:
    model: Any = DeviceProfile
    for step in loc[:-1]:
        fields = getattr(model, "model_fields", {})
        model = fields[step].annotation if step in fields else None
    return suggest(loc[-1], [f.alias or n for n, f in getattr(model, "model_fields", {}).items()])


def _mark(loc: tuple[str | int, ...], marks: dict[tuple[str | int, ...], str], where: str) -> str:
    for end in range(len(loc), -1, -1):  # a missing field has no mark of its own: its section has
        if loc[:end] in marks:
            return marks[loc[:end]]
    return f"{where}:1:1"
