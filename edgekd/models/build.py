"""ModelSpec -> nn.Module and back: timm architecture, structural diff, safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import nn

from edgekd import registry
from edgekd.artifact import Artifact
from edgekd.errors import CheckpointRefused, InputRefused, UnknownName, UsageError, suggest
from edgekd.models.architectures._pair import Pair
from edgekd.models.names import user_source
from edgekd.models.spec import ModelConfig, ModelSpec
from edgekd.models.structure import apply_structure
from edgekd.safeio.checkpoint import fit_state_dict, load_weights

if TYPE_CHECKING:
    from torch import Tensor

SPEC, WEIGHTS = "spec.json", "model.safetensors"
_SPEC_METADATA = "edgekd.spec"


def make_spec(config: ModelConfig, *, num_classes: int, image_size: int) -> ModelSpec:
    """The spec of a freshly created architecture; mean and std are its own, and the size is the data's, unless the recipe gives others."""
    if config.arch is None:
        raise UsageError("the model has no architecture", expected="arch: NAME", hint="list them: edgekd methods list architectures")
    defaults = architecture_defaults(config.arch)
    mean, std = config.mean or defaults.get("mean", (0.5, 0.5, 0.5)), config.std or defaults.get("std", (0.5, 0.5, 0.5))
    shape = {"arch": config.arch, "args": config.args, "num_classes": num_classes, "image_size": config.image_size or image_size}
    return ModelSpec(**shape, mean=mean, std=std, timm=version("timm"), code=user_source(config.arch))


def make_node_spec(config: ModelConfig, *, num_classes: int, features: int, pairs: bool = False) -> ModelSpec:
    """The spec of an architecture of rows or of a graph; with `pairs`, as the encoder of two nodes."""
    if config.arch is None:
        raise UsageError("the model has no architecture", expected="arch: NAME", hint="list them: edgekd methods list architecture")
    args = dict(registry.load("architecture", config.arch).Config(**config.args).model_dump(mode="json"))
    return ModelSpec(arch=config.arch, args=args, num_classes=num_classes, features=features, pairs=pairs, code=user_source(config.arch))


def architecture_defaults(arch: str) -> dict[str, Any]:
    """timm's pretrained configuration of an architecture (mean, std, input size), or an empty dict."""
    import timm

    if not timm.is_model(arch):
        raise UnknownName(
            f"unknown architecture '{arch}'{suggest(arch, timm.list_models())}", hint="your own: --code FILE with @register_model"
        )
    cfg = timm.get_pretrained_cfg(arch)
    return cfg.to_dict() if cfg else {}


def build(spec: ModelSpec, *, seed: int = 0) -> nn.Module:
    """The module with freshly initialised weights, a function of `seed` alone; the random state outside is untouched."""
    import timm

    if spec.features:
        architecture = registry.load("architecture", spec.arch)()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = architecture.Config(**spec.args)
            made: nn.Module = architecture.create(config, spec.features, config.hidden if spec.pairs else spec.num_classes)
            if spec.pairs:
                made = Pair(made, config.hidden, spec.num_classes, config.dropout)
            return apply_structure(made, spec.structure) if spec.structure else made
    if spec.timm != version("timm") and spec.structure:
        raise CheckpointRefused(
            f"the pruned {spec.arch} was made with timm {spec.timm}, this is {version('timm')}", hint=f"pip install timm=={spec.timm}"
        )
    architecture_defaults(spec.arch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = timm.create_model(spec.arch, pretrained=False, num_classes=spec.num_classes, **spec.args)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise InputRefused(f"{spec.arch} cannot be created with {spec.args}: {error}", where="model.args") from error
        return apply_structure(model, spec.structure) if spec.structure else model


def load_state(model: nn.Module, path: Path, *, other_head: str = "") -> ModelSpec | None:
    """Weights of a safetensors file or checkpoint into the module, strictly: missing, extra or wrong-shape keys are refused.

    `other_head` names the classifier that may have another number of classes and then stays as it is. Returns the spec that edgekd wrote
    into the file, if it did.
    """
    state, metadata = load_weights(path)
    expected = model.state_dict()
    if other_head:
        for name in [n for n in state if n.startswith(f"{other_head}.") and n in expected and state[n].shape != expected[n].shape]:
            state[name] = expected[name]
    state = fit_state_dict(state, {name: tensor.shape for name, tensor in expected.items()}, str(path))
    model.load_state_dict({name: tensor.to(expected[name].dtype) for name, tensor in state.items()}, strict=True)
    return stored_spec(metadata)


def stored_spec(metadata: Mapping[str, str]) -> ModelSpec | None:
    """The spec that edgekd wrote into a file's metadata, if it did."""
    try:
        return ModelSpec.model_validate_json(metadata[_SPEC_METADATA]) if _SPEC_METADATA in metadata else None
    except ValidationError:  # of a version that this one does not know; the weights fit all the same
        return None


def save_model(model: nn.Module, spec: ModelSpec, out: Path) -> None:
    """spec.json and model.safetensors in `out`."""
    from safetensors.torch import save_file

    state: dict[str, Tensor] = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(state, out / WEIGHTS, metadata={_SPEC_METADATA: spec.model_dump_json()})
    (out / SPEC).write_text(json.dumps(spec.model_dump(mode="json"), sort_keys=True, indent=1), encoding="utf-8")


def load_model(artifact: Artifact) -> tuple[nn.Module, ModelSpec]:
    """The module of a MODEL artifact, in eval mode."""
    spec = read_spec(artifact)
    model = build(spec)
    load_state(model, artifact.path / WEIGHTS)
    return model.eval(), spec


def read_spec(artifact: Artifact) -> ModelSpec:
    return ModelSpec.model_validate(artifact.json(SPEC))
