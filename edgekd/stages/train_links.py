"""train_links: a model learns which nodes of a graph are linked -> model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import registry
from edgekd.artifact import Artifact, Kind
from edgekd.registry import register
from edgekd.stages._stage import Settings
from edgekd.train.config import LinkTrainConfig

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.graph._links import LinkJob


@register("stage")
class TrainLinks:
    Config = LinkTrainConfig
    takes: Mapping[str, Kind] = {"model": Kind.MODEL, "data": Kind.DATA}
    gives = Kind.MODEL
    version = 1
    libraries = ("torch", "torch-geometric")
    method_kind = None
    method_field = "method"
    default_method = None
    compresses = False

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        from edgekd.stages.train import learn

        return learn(prepare(settings, inputs, ctx), out, ctx)


def prepare(settings: Settings, inputs: Mapping[str, Artifact], ctx: Context) -> LinkJob:
    """The job of a training without a teacher."""
    from edgekd.graph._links import LinkJob  # torch
    from edgekd.models.build import load_model
    from edgekd.stages._common import open_links, task_of, training_device

    model, spec = load_model(inputs["model"])
    looks_at = registry.load("architecture", spec.arch).looks_at
    links, config = open_links(inputs["data"]), settings.typed(LinkTrainConfig)
    return LinkJob(settings.name, model, spec, looks_at, links, task_of(settings), config, ctx.seed, ctx.work, device=training_device())
