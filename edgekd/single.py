"""One stage on a user's own model or ONNX file: a recipe made here, run by the same code as any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.errors import FileMissing, RecipeError, UsageError
from edgekd.recipe import Loaded, from_values
from edgekd.safeio import yaml

_DYNAMIC_SIDE = 224  # where an ONNX file takes images of any size


@dataclass(frozen=True)
class Own:
    """A user's own model and data, as a single-stage command names them."""

    model: Path  # weights, an ONNX file, or for `train` and `distill` the name of an architecture
    data: Path | None  # a folder of images by class, or a manifest; None: generated samples, for `export` and `compile`
    arch: str | None = None
    args: Sequence[str] = ()  # NAME=VALUE of the architecture
    image_size: int | None = 224  # None: what the model's file says
    mean: Sequence[float] | None = None  # of the normalisation that the model was trained with; default: its own
    std: Sequence[float] | None = None
    accuracy_drop_max: float = 0.01
    teacher: Path | None = None  # of `distill`: weights with `teacher_arch`, an ONNX file, or a file of predictions
    teacher_arch: str | None = None
    teacher_args: Sequence[str] = ()
    teacher_mean: Sequence[float] | None = None
    teacher_std: Sequence[float] | None = None


def single_recipe(kind: str, body: Mapping[str, Any], own: Own, *, overrides: Sequence[str] = (), devices: Sequence[str] = ()) -> Loaded:
    """The recipe that a single-stage command stands for; raises as a recipe file does."""
    model = _model(kind, own)
    value: dict[str, Any] = {
        "version": 1,
        **_data(own, model),
        **({"teacher": _teacher(own)} if own.teacher is not None else {}),
        "model": model | {n: list(v) for n, v in (("mean", own.mean), ("std", own.std)) if v is not None},
        "accept": {"accuracy_drop_max": own.accuracy_drop_max},
        "stages": _stages(kind, dict(body)),
        "targets": {d: {} for d in devices or ("host",)},
    }
    try:
        return from_values(f"{kind}-{own.model.stem or own.arch}", value, overrides)
    except RecipeError as error:  # there is no file that its places could name
        told = [p.removeprefix("recipe:1:1: ") for p in error.problems]
        raise RecipeError(told, hint=f"edgekd {kind} --help; edgekd methods show NAME") from error


def parse_args(pairs: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` pairs as architecture arguments."""
    found = {}
    for pair in pairs:
        name, equals, raw = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"'{pair}' is no NAME=VALUE", where="--arg", expected="such as img_size=32")
        found[name] = yaml.read_value(raw, f"--arg {pair}")
    return found


def _data(own: Own, model: Mapping[str, Any]) -> dict[str, Any]:
    """The section `data`, or `samples` where there are none; what is not given is read from the model's file."""
    from edgekd.given import Given, known_classes, of_onnx, of_weights

    data, found = own.data, Given(own.image_size, None)
    if data is not None and not data.exists():
        raise FileMissing("the data is not there", where=str(data), expected="a folder of images by class, or a CSV or JSONL manifest")
    if data is None or own.image_size is None:
        found = of_onnx(own.model) if "onnx" in model else of_weights(own.model, model["arch"], model["args"])
    size = own.image_size or found.image_size or _DYNAMIC_SIDE
    if data is None:
        return {"samples": {"image_size": size, "classes": known_classes(found, own.model)}}
    return {"data": {"format": "image_folder" if data.is_dir() else "manifest", "root": str(data.resolve()), "image_size": size}}


def _model(kind: str, own: Own) -> dict[str, Any]:
    model, arch, args = own.model, own.arch, own.args
    if kind in ("train", "distill") and arch is None and not model.is_file():
        return {"arch": str(model), "args": parse_args(args)}
    if not model.is_file():
        hint = f"name a bundle's model: {model / 'model.onnx'}" if (model / "model.onnx").is_file() else None
        raise FileMissing("there is no such model", where=str(model), expected="safetensors, a checkpoint, or an ONNX file", hint=hint)
    if model.suffix == ".onnx":
        return {"onnx": str(model.resolve())}
    if arch is None:
        raise UsageError(
            "weights need the architecture they are for", where=str(model), hint="--arch NAME; edgekd methods list architectures"
        )
    return {"arch": arch, "args": parse_args(args), "weights": str(model.resolve())}


def _teacher(own: Own) -> dict[str, Any]:
    teacher = Path(own.teacher or "")
    if not teacher.is_file():
        raise FileMissing(
            "there is no such teacher", where=str(teacher), expected="safetensors, a checkpoint, an ONNX file, or predictions (.npz, .csv)"
        )
    scale = {n: list(v) for n, v in (("mean", own.teacher_mean), ("std", own.teacher_std)) if v is not None}
    if teacher.suffix in (".onnx", ".npz", ".csv"):
        return {"onnx" if teacher.suffix == ".onnx" else "predictions": str(teacher.resolve())} | scale
    if own.teacher_arch is None:
        raise UsageError(
            "the teacher's weights need the architecture they are for",
            where=str(teacher),
            hint="--teacher-arch NAME; edgekd methods list architectures",
        )
    return {"arch": own.teacher_arch, "args": parse_args(own.teacher_args), "weights": str(teacher.resolve())} | scale


def _stages(kind: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    if kind in ("export", "compile"):  # which every plan has
        return []
    recover = int(body.pop("recover", 0))
    stages = [{kind: body}]
    if recover:
        stages.append({"train": {"name": "recover", "epochs": recover, "lr": 1e-4}})
    return stages
