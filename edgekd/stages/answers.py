"""answers: a teacher answers every view of every training image once -> what it said, for every training stage that imitates it on these views."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgekd.artifact import Artifact, Kind
from edgekd.data.config import AugmentConfig
from edgekd.registry import register
from edgekd.stages._stage import Settings
from edgekd.train.speed import SpeedConfig

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.train.black_box import BlackBox, RuntimeTeacher
    from edgekd.train.images import Teacher

_BATCH = 128
_SAVE_SECONDS = 10.0


@register("stage")
class Answers:
    class Config(SpeedConfig):
        views: int = Field(1, ge=1, description="augmented views of each image")
        samples: int = Field(0, ge=0, description="classes drawn of each answer; 0 keeps all logits")
        temperature: float = Field(1.0, gt=0, description="of the softmax that classes are drawn from")
        augment: AugmentConfig = Field(default_factory=AugmentConfig, description="of the stage that trains")

    takes: Mapping[str, Kind] = {"teacher?": Kind.MODEL, "black_box?": Kind.GRAPH, "data": Kind.DATA, "speed?": Kind.DECISION}
    gives = Kind.ANSWERS
    version = 1
    libraries = ("torch", "timm")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        import torch

        from edgekd.data.augment import augment
        from edgekd.data.loader import batches
        from edgekd.stages._common import open_dataset, training_device
        from edgekd.stages.distill import black_box_of, teacher_of
        from edgekd.train.answers import About, Writer
        from edgekd.train.compiled import keep_programs_in
        from edgekd.train.memory import kept_memory

        config, dataset = settings.typed(self.Config), open_dataset(inputs["data"], ctx)
        keep_programs_in(ctx.store.programs)
        classes = len(dataset.classes)
        teacher: Teacher | BlackBox | RuntimeTeacher
        if "black_box" in inputs:
            teacher = black_box_of(inputs["black_box"], ctx)
        else:
            teacher, _, _ = teacher_of(inputs, config, _BATCH, dataset, ctx)
        about = About(classes, config.views, config.samples if config.samples < classes else 0, config.temperature)
        writer = Writer(ctx.work, about, dataset.split("train"), ctx.seed)
        first, saved, started = writer.done, time.monotonic(), time.monotonic()
        with ctx.console.bar(settings.name, writer.total) as bar, ctx.stop.deferred(), kept_memory():
            while writer.done < writer.total:
                view, positions = writer.rest()
                for batch in batches(dataset, positions, _BATCH):
                    index = torch.from_numpy(batch.positions)
                    pixels = augment(batch.images.to(training_device()), index, config.augment, seed=ctx.seed, epoch=view)
                    writer.add(teacher(pixels, index, view).logits.cpu().numpy())
                    now = time.monotonic()
                    bar.update(writer.done, rate=f"{(writer.done - first) / max(now - started, 1e-9):.0f}/s")
                    if ctx.stop.code is not None or now - saved > _SAVE_SECONDS:
                        writer.save()
                        saved = time.monotonic()
                    ctx.stop.check()
        writer.publish(out)
        facts = {"views": about.views, "images": len(dataset.split("train")), "kept": about.width}
        speed = getattr(teacher, "speed", None)  # one that came as a graph has none
        return facts | ({"teacher_speed": str(speed)} if speed else {})
