"""train: a model learns from the labels alone -> model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.artifact import Artifact, Kind
from edgekd.errors import ParityBroken
from edgekd.registry import register
from edgekd.stages._stage import Settings, read_decision
from edgekd.train.config import TrainConfig
from edgekd.train.speed import Speed

if TYPE_CHECKING:
    from torch import nn

    from edgekd.context import Context
    from edgekd.models.spec import ModelSpec
    from edgekd.train.images import Job
    from edgekd.train.loop import Lesson

CURVES = "curves.json"


@register("stage")
class Train:
    Config = TrainConfig
    takes: Mapping[str, Kind] = {"model": Kind.MODEL, "data": Kind.DATA, "speed?": Kind.DECISION}
    gives = Kind.MODEL
    version = 1
    libraries = ("torch", "timm")
    user = True
    method_kind = None
    method_field = "method"
    default_method = None
    together = True  # by all processes under torchrun
    compresses = False

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        return learn(prepare(settings, inputs, ctx), out, ctx)


def prepare(settings: Settings, inputs: Mapping[str, Artifact], ctx: Context) -> Job:
    """The job of a training stage without a teacher."""
    from edgekd.models.build import load_model  # torch
    from edgekd.stages._common import open_dataset, task_of, training_device
    from edgekd.train.compiled import keep_programs_in
    from edgekd.train.images import Job

    config = settings.typed(TrainConfig)
    keep_programs_in(ctx.store.programs)
    model, spec = load_model(inputs["model"])
    dataset = open_dataset(inputs["data"], ctx)
    speed = chosen_speed(config, inputs, "student")
    return Job(settings.name, model, spec, dataset, task_of(settings), config, ctx.seed, ctx.work, speed, device=training_device())


def chosen_speed(config: TrainConfig, inputs: Mapping[str, Artifact], side: str) -> Speed:
    """What the tuning decided, or what the settings say."""
    found = read_decision(inputs["speed"]).get(side) if "speed" in inputs else None
    return Speed.of(found) if found is not None else config.speed


def learn(job: Lesson, out: Path, ctx: Context, finish: Callable[[nn.Module], None] | None = None) -> dict[str, Any]:
    """Runs the loop and saves model and curves; `finish` takes off the model what was trained beside it."""
    from edgekd.models.build import save_model
    from edgekd.train.loop import fit

    trained = fit(job, ctx)
    if finish is not None:
        finish(trained.model)
    save_model(trained.model, job.spec, out)
    _assert_same_tensors(trained.model, job.spec, job.name)
    (out / CURVES).write_text(json.dumps(trained.curves, indent=0), encoding="utf-8")
    said = {"resumed_elsewhere": trained.elsewhere, "not_compiled": trained.refused}
    return {"steps": trained.steps, "images": trained.images} | asdict(job.speed) | {n: text for n, text in said.items() if text}


def _assert_same_tensors(model: nn.Module, spec: ModelSpec, name: str) -> None:
    """Nothing that was trained beside the model (projectors, branches) may be in what is kept."""
    from edgekd.models.build import build

    extra = sorted(set(model.state_dict()) - set(build(spec).state_dict()))
    if extra:
        raise ParityBroken(f"the model still holds '{extra[0]}'", where=name, expected="the tensors of its architecture only")
