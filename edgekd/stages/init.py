"""init: an architecture with seeded, given or published weights -> model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.artifact import Artifact, Kind
from edgekd.models.spec import ModelConfig
from edgekd.registry import register
from edgekd.stages._stage import Settings

if TYPE_CHECKING:
    from edgekd.context import Context


@register("stage")
class Init:
    Config = ModelConfig
    takes: Mapping[str, Kind] = {"data": Kind.DATA}
    gives = Kind.MODEL
    version = 1
    libraries = ("torch", "timm")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        from edgekd.models import build as models  # torch
        from edgekd.models.pretrained import published_weights
        from edgekd.stages._common import open_dataset, unchanged

        config = settings.typed(ModelConfig)
        dataset = open_dataset(inputs["data"], ctx)
        spec = models.make_spec(config, num_classes=len(dataset.classes), image_size=dataset.image_size)
        model = models.build(spec, seed=ctx.seed)
        weights = published_weights(config, ctx) if config.pretrained else config.weights
        if weights is not None:
            unchanged(weights, settings)
            head = str(models.architecture_defaults(spec.arch).get("classifier") or "") if config.pretrained else ""
            stored = models.load_state(model, weights, other_head=head)
            if stored is not None and stored.arch == spec.arch:  # `edgekd import` wrote down how the weights want their input
                spec = spec.model_copy(update={"mean": config.mean or stored.mean, "std": config.std or stored.std})
        models.save_model(model, spec, out)
        return {"arch": spec.arch, "parameters": sum(p.numel() for p in model.parameters())}
