"""A checkpoint from outside -> safetensors that fit an architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import CheckpointRefused, UsageError

if TYPE_CHECKING:
    from torch import Tensor


def import_weights(
    path: Path,
    arch: str,
    args: Mapping[str, Any],
    *,
    num_classes: int | None,
    image_size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    out: Path | None,
) -> dict[str, Any]:
    """Writes `out` (default: beside the checkpoint) and returns what was found; raises CheckpointRefused, FileMissing, UsageError."""
    from edgekd.models.build import architecture_defaults, build, make_spec
    from edgekd.models.spec import ModelConfig
    from edgekd.safeio.checkpoint import fit_state_dict, load_weights

    target = out or path.with_suffix(".safetensors")
    if target.resolve() == path.resolve():
        raise UsageError("the result would overwrite the file that is read", where=str(path), hint="name another: --out FILE.safetensors")
    defaults = architecture_defaults(arch)
    state, _ = load_weights(path)
    config = ModelConfig(arch=arch, args=dict(args), mean=_triple(mean), std=_triple(std))
    size = image_size or own_size(defaults, args)
    spec = make_spec(config, num_classes=num_classes or classes_of(state, path), image_size=size)
    model = build(spec)
    state = fit_state_dict(state, {n: t.shape for n, t in model.state_dict().items()}, str(path))
    _write(state, spec.model_dump_json(), target)
    return {
        "out": str(target),
        "arch": arch,
        "tensors": len(state),
        "parameters": sum(t.numel() for t in state.values()),
        "num_classes": spec.num_classes,
        "mean": spec.mean,
        "std": spec.std,
    }


def own_size(defaults: Mapping[str, Any], args: Mapping[str, Any]) -> int:
    """The image size of an architecture: as its arguments say, else as timm trained it."""
    return int(args.get("img_size") or (defaults.get("input_size") or (3, 224, 224))[-1])


def classes_of(state: Mapping[str, Tensor], path: Path) -> int:
    """Outputs of the last layer: the last two-dimensional weight of the file."""
    heads = [t.shape[0] for n, t in state.items() if n.endswith("weight") and t.ndim == 2]
    if not heads:
        raise CheckpointRefused("its number of classes cannot be read", where=str(path), hint="give it: --num-classes N")
    return int(heads[-1])


def _triple(values: Sequence[float] | None) -> tuple[float, float, float] | None:
    return None if values is None else (values[0], values[1], values[2])


def _write(state: Mapping[str, Tensor], spec: str, target: Path) -> None:
    from safetensors.torch import save

    from edgekd.safeio.files import resource_errors, write_atomic

    with resource_errors(target):
        write_atomic(target, save({n: t.contiguous() for n, t in state.items()}, metadata={"edgekd.spec": spec}))
