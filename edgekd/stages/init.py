"""init: an architecture with seeded, given or published weights -> model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import registry
from edgekd.artifact import Artifact, Kind
from edgekd.errors import CheckpointRefused
from edgekd.models.spec import ModelConfig
from edgekd.registry import register
from edgekd.stages._stage import Settings

if TYPE_CHECKING:
    from edgekd.context import Context


NODES = "nodes.json"  # what the data of a graph have


@register("stage")
class Init:
    Config = ModelConfig
    takes: Mapping[str, Kind] = {"data": Kind.DATA}
    gives = Kind.MODEL
    version = 1
    libraries = ("torch", "timm")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        from edgekd.models import build as models  # torch
        from edgekd.models.labels import in_order_of
        from edgekd.models.pretrained import published_weights
        from edgekd.stages._common import open_dataset, unchanged

        config = settings.typed(ModelConfig)
        if (inputs["data"].path / NODES).is_file():
            return _of_nodes(config, settings, inputs, out, ctx)
        dataset = open_dataset(inputs["data"], ctx)
        spec = models.make_spec(config, num_classes=len(config.classes or dataset.classes), image_size=dataset.image_size)
        model = models.build(spec, seed=ctx.seed)
        weights = published_weights(config, ctx) if config.pretrained else config.weights
        if weights is not None:
            unchanged(weights, settings)
            head = str(models.architecture_defaults(spec.arch).get("classifier") or "") if config.pretrained else ""
            try:
                stored = models.load_state(model, weights, other_head="" if config.classes else head)
            except CheckpointRefused as error:
                section = "model" if settings.name == "student" else "teacher"
                error.hint = (
                    f"{error.hint}; of other classes than the data's, name them in the order of its outputs: -o {section}.classes=[A,B]"
                )
                raise
            if stored is not None and stored.arch == spec.arch:  # `edgekd import` wrote down how the weights want their input
                spec = spec.model_copy(update={"mean": config.mean or stored.mean, "std": config.std or stored.std})
        if config.classes:
            model, spec = in_order_of(model, spec, config.classes, dataset.classes)
        models.save_model(model, spec, out)
        return {"arch": spec.arch, "parameters": sum(p.numel() for p in model.parameters())}


def _of_nodes(config: ModelConfig, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
    """A model of rows, or of a graph."""
    from edgekd.data.links import CLASSES, PAIRS
    from edgekd.models import build as models
    from edgekd.stages._common import open_nodes, unchanged

    nodes, pairs = open_nodes(inputs["data"]), (inputs["data"].path / PAIRS).is_file()
    classes = CLASSES if pairs else nodes.classes
    rows = config.arch in registry.names("architecture") and registry.load("architecture", config.arch).looks_at == "rows"
    spec = models.make_node_spec(config, num_classes=len(classes), features=nodes.sample_width if rows else nodes.width, pairs=pairs)
    model = models.build(spec, seed=ctx.seed)
    if config.weights is not None:
        unchanged(config.weights, settings)
        models.load_state(model, config.weights)
    models.save_model(model, spec, out)
    return {"arch": spec.arch, "parameters": sum(p.numel() for p in model.parameters())}
