"""train_nodes: a model learns from the labels of a graph's training nodes -> model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import registry
from edgekd.artifact import Artifact, Kind
from edgekd.registry import register
from edgekd.stages._stage import Settings
from edgekd.train.config import NodeTrainConfig

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.graph._run import NodeJob


@register("stage")
class TrainNodes:
    Config = NodeTrainConfig
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


def prepare(settings: Settings, inputs: Mapping[str, Artifact], ctx: Context) -> NodeJob:
    """The job of a training without a teacher."""
    from edgekd.graph._run import NodeJob  # torch
    from edgekd.models.build import load_model
    from edgekd.stages._common import open_nodes, task_of, training_device

    model, spec = load_model(inputs["model"])
    looks_at = registry.load("architecture", spec.arch).looks_at
    nodes, config = open_nodes(inputs["data"]), settings.typed(NodeTrainConfig)
    return NodeJob(settings.name, model, spec, looks_at, nodes, task_of(settings), config, ctx.seed, ctx.work, device=training_device())
