"""distill: a model learns from a teacher by one of the methods of edgekd/distill -> model. Projectors are dropped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.artifact import Artifact, Kind
from edgekd.registry import register
from edgekd.stages._stage import Settings, read_decision
from edgekd.stages.export import FACTS, GRAPH
from edgekd.stages.train import learn, prepare
from edgekd.train.config import TrainConfig
from edgekd.train.speed import Speed, SpeedConfig

if TYPE_CHECKING:
    from torch import nn

    from edgekd.context import Context
    from edgekd.data.dataset import Dataset
    from edgekd.models.spec import ModelSpec
    from edgekd.train.black_box import BlackBox, RuntimeTeacher
    from edgekd.train.distiller import Distiller
    from edgekd.train.images import Job, Teacher


_RUNTIME = "teacher"  # in a training's own folder: files of a teacher that a runtime answers for


@register("stage")
class Distill:
    Config = TrainConfig
    takes: Mapping[str, Kind] = {
        "model": Kind.MODEL,
        "data": Kind.DATA,
        "teacher?": Kind.MODEL,
        "black_box?": Kind.GRAPH,
        "answers?": Kind.ANSWERS,
        "speed?": Kind.DECISION,
    }
    gives = Kind.MODEL
    version = 1
    libraries = ("torch", "timm")
    user = True
    method_kind = "distill"
    method_field = "method"
    default_method = "kd"
    together = True  # by all processes under torchrun
    compresses = False

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        from edgekd.stages._common import method_of

        job = prepare(settings, inputs, ctx)
        facts = imitate(job, method_of(settings, "distill"), settings, inputs, ctx)
        return learn(job, out, ctx) | facts


def imitate(job: Job, distiller: Distiller, settings: Settings, inputs: Mapping[str, Artifact], ctx: Context) -> dict[str, Any]:
    """Gives the job its teacher, the distiller's loss and its projectors; returns what is recorded of it."""
    from edgekd.models.build import load_model
    from edgekd.train.answers import Answers
    from edgekd.train.pair import listen, teach

    if "answers" in inputs:
        answers = Answers(inputs["answers"].path, job.dataset.split("train"), job.device)
        if "teacher" not in inputs:
            listen(job, distiller, answers)
            return {"views": answers.about.views}
        teach(job, distiller, answers, *load_model(inputs["teacher"]))
        return {"views": answers.about.views}
    if "black_box" in inputs:
        listen(job, distiller, black_box_of(inputs["black_box"], ctx))
        return {}
    live, model, spec = teacher_of(inputs, job.cfg, job.cfg.batch_size, job.dataset, ctx)
    teach(job, distiller, live, model, spec)
    return {"teacher_speed": str(live.speed)}


def black_box_of(graph: Artifact, ctx: Context) -> BlackBox:
    """The teacher in a graph that `read_teacher` made."""
    from edgekd.stages.read_teacher import opened

    return opened(graph.path / GRAPH, graph.json(FACTS), ctx)


def teacher_of(
    inputs: Mapping[str, Artifact], config: SpeedConfig, batch: int, dataset: Dataset, ctx: Context
) -> tuple[Teacher | RuntimeTeacher, nn.Module, ModelSpec]:
    """The frozen teacher, run as the tuning decided, or, where none did, as the settings say."""
    import torch

    from edgekd.models.build import load_model
    from edgekd.stages._common import training_device
    from edgekd.stages._runtimes import by_runtime, calibration_images
    from edgekd.train.images import Teacher
    from edgekd.train.views import View

    model, spec = load_model(inputs["teacher"])
    found = read_decision(inputs["speed"]).get("teacher") if "speed" in inputs else None
    speed = Speed.of(found) if found else config.speed
    if speed.runtime:
        seen, folder = calibration_images(dataset), ctx.work / f"{_RUNTIME}{ctx.ranks.rank if ctx.ranks else ''}"
        return by_runtime(model, spec, speed.runtime, seen, folder, threads=ctx.threads, batch=batch), model, spec
    layout = torch.channels_last if speed.channels_last else torch.contiguous_format
    model = model.to(training_device(), memory_format=layout).requires_grad_(False).eval()  # type: ignore[call-overload]
    return Teacher(model, View(spec, channels_last=speed.channels_last, device=training_device()), speed, batch=batch), model, spec
