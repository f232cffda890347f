"""tune: measures a few steps in fp32 and bf16, in both memory layouts, and compiled where that pays -> the decision how a training stage runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgekd.artifact import Artifact, Kind
from edgekd.registry import register
from edgekd.stages._stage import Settings, write_decision
from edgekd.train.speed import Speed, SpeedConfig

if TYPE_CHECKING:
    from edgekd.context import Context


@register("stage")
class Tune:
    class Config(SpeedConfig):
        batch_size: int = Field(64, ge=1, description="images of a measured step")
        epochs: int = Field(0, ge=0, description="how often the images are seen; 0: not known")

    takes: Mapping[str, Kind] = {"model?": Kind.MODEL, "data": Kind.DATA, "teacher?": Kind.MODEL}
    gives = Kind.DECISION
    version = 2
    libraries = ("torch", "timm")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        import torch

        from edgekd.data.augment import to_float
        from edgekd.models.build import load_model
        from edgekd.stages._common import drawn, open_dataset, training_device
        from edgekd.train import tune
        from edgekd.train.compiled import keep_programs_in
        from edgekd.train.memory import kept_memory

        config = settings.typed(self.Config)
        keep_programs_in(ctx.store.programs)
        dataset = open_dataset(inputs["data"], ctx)
        images = to_float(torch.from_numpy(dataset.images(drawn(dataset, "train", config.batch_size)))).to(training_device())
        batches = len(dataset.split("train")) // config.batch_size
        sides = {"model": ("student", tune.tune_student), "teacher": ("teacher", tune.tune_teacher)}
        with kept_memory():  # as in training
            decision = {
                side: measured(*load_model(inputs[n]), images, config, batches * config.epochs)
                for n, (side, measured) in sides.items()
                if n in inputs
            }
        write_decision(out, decision)
        return {"chosen": {side: str(Speed.of(found)) for side, found in decision.items()}}
