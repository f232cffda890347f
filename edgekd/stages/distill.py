"""distill: a model learns from a teacher by one of the methods of edgekd/distill -> model. Projectors are dropped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.artifact import Artifact, Kind
from edgekd.registry import register
from edgekd.stages._stage import Settings
from edgekd.stages.train import chosen_speed, learn, prepare
from edgekd.train.config import TrainConfig

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.models.spec import ModelSpec
    from edgekd.train.distiller import Distiller, Side
    from edgekd.train.loop import Job


@register("stage")
class Distill:
    Config = TrainConfig
    takes: Mapping[str, Kind] = {"model": Kind.MODEL, "data": Kind.DATA, "teacher": Kind.MODEL, "speed?": Kind.DECISION}
    gives = Kind.MODEL
    version = 1
    libraries = ("torch", "timm")
    user = True
    method_kind = "distill"
    method_field = "method"
    default_method = "kd"
    compresses = False

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        from edgekd.stages._common import method_of

        job = prepare(settings, inputs, ctx)
        facts = imitate(job, method_of(settings, "distill"), settings, inputs, ctx)
        return learn(job, out, ctx) | facts


def imitate(job: Job, distiller: Distiller, settings: Settings, inputs: Mapping[str, Artifact], ctx: Context) -> dict[str, Any]:
    """Gives the job its teacher, the distiller's loss and its projectors; returns what is recorded of it."""
    import torch

    from edgekd.models.build import load_model
    from edgekd.models.taps import TappedModel
    from edgekd.train.loop import Teacher
    from edgekd.train.views import View

    teacher, teacher_spec = load_model(inputs["teacher"])
    job.distiller, job.label_weight = distiller, distiller.config.label_weight
    speed = chosen_speed(settings.typed(TrainConfig), inputs, "teacher") if "speed" in inputs else job.speed
    layout = torch.channels_last if speed.channels_last else torch.contiguous_format
    teacher = teacher.to(job.device, memory_format=layout).requires_grad_(False).eval()  # type: ignore[call-overload]
    job.teacher = Teacher(teacher, View(teacher_spec, channels_last=speed.channels_last, device=job.device), speed)
    taps = "taps" in distiller.needs
    pair = side(job.model, job.spec, taps=taps), side(teacher, teacher_spec, taps=taps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ctx.seed)
        job.projectors = distiller.setup(*pair)
    if taps:
        job.tapped = TappedModel(job.model, pair[0].taps)
    return {"teacher_autocast": speed.autocast}


def side(model: Any, spec: ModelSpec, *, taps: bool = True) -> Side:
    """One model of the pair as a distiller sees it; `taps` only where they are needed, for not every model has stages."""
    from edgekd.models.taps import stage_taps
    from edgekd.train.distiller import Side

    found = stage_taps(model, spec.image_size) if taps else ()
    return Side(model, found, found[-1].channels if found else 0, spec.num_classes)
