"""distill: a model learns from a teacher by one of the methods of edgekd/distill -> model. Projectors are dropped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.artifact import Artifact, Kind
from edgekd.registry import register
from edgekd.stages._stage import Settings, read_decision
from edgekd.stages.train import learn, prepare
from edgekd.train.config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

    from edgekd.context import Context
    from edgekd.models.spec import ModelSpec
    from edgekd.train.distiller import Distiller, Side
    from edgekd.train.loop import Job, Teacher

_BATCH = 128


@register("stage")
class Distill:
    Config = TrainConfig
    takes: Mapping[str, Kind] = {
        "model": Kind.MODEL,
        "data": Kind.DATA,
        "teacher": Kind.MODEL,
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
    from edgekd.train.answers import Answers
    from edgekd.train.loop import Teacher

    job.distiller, job.label_weight = distiller, distiller.config.label_weight
    facts: dict[str, Any] = {}
    if "answers" in inputs:
        teacher, teacher_spec = load_model(inputs["teacher"])
        job.teacher = Answers(inputs["answers"].path, job.dataset.split("train"), job.device)
        facts["views"] = job.teacher.about.views
    else:
        config = settings.typed(TrainConfig)
        live, teacher_spec = teacher_of(inputs, autocast=config.autocast == "bf16", channels_last=config.channels_last == "on")
        job.teacher, teacher = live, live.model
        facts["teacher_autocast"] = live.speed.autocast
    taps = "taps" in distiller.needs
    pair = side(job.model, job.spec, taps=taps), side(teacher, teacher_spec, taps=taps)
    pair = replace(pair[0], positions=torch.from_numpy(job.dataset.split("train"))), pair[1]
    if isinstance(job.teacher, Teacher) and "teacher_taps" in distiller.needs:
        job.teacher.tapped = TappedModel(teacher, pair[1].taps)
    if "class_means" in distiller.needs:
        pair = pair[0], replace(pair[1], class_means=class_means(job))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ctx.seed)
        job.projectors = distiller.setup(*pair)
    if taps:
        job.tapped = TappedModel(job.model, pair[0].taps)
    return facts


def class_means(job: Job) -> Tensor:
    """Means of the teacher's pooled last features over each class of the training images, without augmentation; zeros for a class without images."""
    import torch

    from edgekd.data.augment import to_float
    from edgekd.data.loader import batches
    from edgekd.models.taps import pooled

    teacher: Any = job.teacher
    tap, classes = teacher.tapped.taps[-1], len(job.dataset.classes)
    sums, counts = torch.zeros(classes, tap.channels, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)
    for batch in batches(job.dataset, job.dataset.split("train"), _BATCH):
        index = torch.from_numpy(batch.positions)
        features = pooled(teacher(to_float(batch.images.to(job.device)), index, 0).taps[-1], tap).cpu().double()
        labels = torch.from_numpy(job.dataset.labels[batch.positions])
        sums.index_add_(0, labels, features)
        counts.index_add_(0, labels, torch.ones(len(labels), dtype=torch.float64))
    return (sums / counts.clamp_min(1)[:, None]).float().to(job.device)


def teacher_of(inputs: Mapping[str, Artifact], *, autocast: bool, channels_last: bool) -> tuple[Teacher, ModelSpec]:
    """The frozen teacher, run as the tuning decided, or, where none did, as given."""
    import torch

    from edgekd.models.build import load_model
    from edgekd.stages._common import training_device
    from edgekd.train.loop import Speed, Teacher
    from edgekd.train.views import View

    model, spec = load_model(inputs["teacher"])
    found = read_decision(inputs["speed"]).get("teacher") if "speed" in inputs else None
    speed = Speed(found["autocast"], found["channels_last"]) if found else Speed(autocast, channels_last)
    layout = torch.channels_last if speed.channels_last else torch.contiguous_format
    model = model.to(training_device(), memory_format=layout).requires_grad_(False).eval()  # type: ignore[call-overload]
    return Teacher(model, View(spec, channels_last=speed.channels_last, device=training_device()), speed), spec


def side(model: Any, spec: ModelSpec, *, taps: bool = True) -> Side:
    """One model of the pair as a distiller sees it; `taps` only where they are needed, for not every model has stages."""
    from edgekd.models.taps import stage_taps
    from edgekd.train.distiller import Side

    found = stage_taps(model, spec.image_size) if taps else ()
    return Side(model, found, found[-1].channels if found else 0, spec.num_classes)
