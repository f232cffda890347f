"""tune: measures a few steps in fp32 and bf16, in both memory layouts -> the decision how a training stage runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from edgekd.artifact import Artifact, Kind
from edgekd.config import Config as Base
from edgekd.registry import register
from edgekd.stages._stage import Settings, write_decision

if TYPE_CHECKING:
    from edgekd.context import Context


@register("stage")
class Tune:
    class Config(Base):
        autocast: Literal["auto", "off", "bf16"] = Field("auto", description="what the stage's settings leave open")
        channels_last: Literal["auto", "off", "on"] = Field("auto", description="what the stage's settings leave open")
        batch_size: int = Field(64, ge=1, description="images of a measured step")

    takes: Mapping[str, Kind] = {"model": Kind.MODEL, "data": Kind.DATA, "teacher?": Kind.MODEL}
    gives = Kind.DECISION
    version = 1
    libraries = ("torch", "timm")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        import torch

        from edgekd.data.augment import to_float
        from edgekd.models.build import load_model
        from edgekd.stages._common import drawn, open_dataset, training_device
        from edgekd.train import tune

        config = settings.typed(self.Config)
        dataset = open_dataset(inputs["data"], ctx)
        images = to_float(torch.from_numpy(dataset.images(drawn(dataset, "train", config.batch_size)))).to(training_device())
        choices = tune.options(config.autocast, config.channels_last)
        decision = {"student": tune.tune_student(*load_model(inputs["model"]), images, choices)}
        if "teacher" in inputs:
            decision["teacher"] = tune.tune_teacher(*load_model(inputs["teacher"]), images, choices)
        write_decision(out, decision)
        return {"chosen": {side: {k: v for k, v in d.items() if k != "seconds"} for side, d in decision.items()}}
