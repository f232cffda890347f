"""One stage on a user's own model or ONNX file: a recipe made here, run by the same code as any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.errors import FileMissing, UsageError
from edgekd.recipe import Loaded, from_values
from edgekd.safeio import yaml


@dataclass(frozen=True)
class Own:
    """A user's own model and data, as a single-stage command names them."""

    model: Path  # weights, an ONNX file, or for `train` the name of an architecture
    data: Path  # a folder of images by class, or a manifest
    arch: str | None = None
    args: Sequence[str] = ()  # NAME=VALUE of the architecture
    image_size: int = 224
    mean: Sequence[float] | None = None  # of the normalisation that the model was trained with; default: its own
    std: Sequence[float] | None = None
    accuracy_drop_max: float = 0.01


def single_recipe(
    kind: str | None, body: Mapping[str, Any], own: Own, *, overrides: Sequence[str] = (), devices: Sequence[str] = ()
) -> Loaded:
    """The recipe that a single-stage command stands for; raises as a recipe file does."""
    value: dict[str, Any] = {
        "version": 1,
        "data": _data(own.data, own.image_size),
        "model": _model(kind, own) | {n: list(v) for n, v in (("mean", own.mean), ("std", own.std)) if v is not None},
        "accept": {"accuracy_drop_max": own.accuracy_drop_max},
        "stages": _stages(kind, dict(body)),
        "targets": {d: {} for d in devices or ("host",)},
    }
    return from_values(f"{kind or 'export'}-{own.model.stem or own.arch}", value, overrides)


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


def _model(kind: str | None, own: Own) -> dict[str, Any]:
    model, arch, args = own.model, own.arch, own.args
    if kind == "train" and arch is None and not model.is_file():
        return {"arch": str(model), "args": parse_args(args)}
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
