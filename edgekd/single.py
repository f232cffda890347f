"""One stage on a user's own model or ONNX file: a recipe made here, run by the same code as any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekd.errors import FileMissing, UsageError
from edgekd.recipe import Loaded, from_values
from edgekd.safeio import yaml


def single_recipe(
    kind: str | None,
    body: Mapping[str, Any],
    model: Path,
    *,
    data: Path,
    arch: str | None,
    args: Sequence[str],
    image_size: int,
    accuracy_drop_max: float,
    overrides: Sequence[str] = (),
    devices: Sequence[str] = (),
) -> Loaded:
    """The recipe that a single-stage command stands for; raises as a recipe file does."""
    value: dict[str, Any] = {
        "version": 1,
        "data": _data(data, image_size),
        "model": _model(kind, model, arch, args),
        "accept": {"accuracy_drop_max": accuracy_drop_max},
    }
    value["stages"] = _stages(kind, dict(body))
    value["targets"] = {d: {} for d in devices or ("host",)}
    name = kind or "export"
    return from_values(f"{name}-{model.stem or arch}", value, overrides)


def parse_args(pairs: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` pairs as architecture arguments."""
    found = {}
    for pair in pairs:
        name, equals, raw = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"'{pair}' is no NAME=VALUE", where="--arg", expected="such as img_size=32")
        found[name] = yaml.read_value(raw, f"--arg {pair}")
    return found


def _data(data: Path, image_size: int) -> dict[str, Any]:
    if not data.exists():
        raise FileMissing("the data is not there", where=str(data), expected="a folder of images by class, or a CSV or JSONL manifest")
    return {"format": "image_folder" if data.is_dir() else "manifest", "root": str(data.resolve()), "image_size": image_size}


def _model(kind: str | None, model: Path, arch: str | None, args: Sequence[str]) -> dict[str, Any]:
    if kind == "train" and not model.is_file():
        return {"arch": arch, "args": parse_args(args)}
    if not model.is_file():
        raise FileMissing("there is no such model", where=str(model), expected="safetensors, a checkpoint, or an ONNX file")
    if model.suffix == ".onnx":
        return {"onnx": str(model.resolve())}
    if arch is None:
        raise UsageError(
            "weights need the architecture they are for", where=str(model), hint="--arch NAME; edgekd methods list architectures"
        )
    return {"arch": arch, "args": parse_args(args), "weights": str(model.resolve())}


def _stages(kind: str | None, body: dict[str, Any]) -> list[dict[str, Any]]:
    if kind is None:
        return []
    recover = int(body.pop("recover", 0))
    stages = [{kind: body}]
    if recover:
        stages.append({"train": {"name": "recover", "epochs": recover, "lr": 1e-4}})
    return stages
