"""tune: measures a few steps in fp32 and bf16, in both memory layouts, and compiled where that pays -> the decision how a training stage runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgekd.artifact import Artifact, Kind
from edgekd.registry import register
from edgekd.stages._stage import Settings, write_decision
from edgekd.train.speed import Speed, SpeedConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgekd.context import Context
    from edgekd.data.dataset import Dataset
    from edgekd.models.spec import ModelSpec


@register("stage")
class Tune:
    class Config(SpeedConfig):
        batch_size: int = Field(64, ge=1, description="images of a measured step")
        epochs: int = Field(0, ge=0, description="how often the images are seen; 0: not known")
        logits_only: bool = Field(False, description="nothing is asked of the teacher but its logits, so that any runtime may give them")

    takes: Mapping[str, Kind] = {"model?": Kind.MODEL, "data": Kind.DATA, "teacher?": Kind.MODEL}
    gives = Kind.DECISION
    version = 3
    libraries = ("torch", "timm", "onnxruntime-gpu", "onnxruntime")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        import torch

        from edgekd.data.augment import to_float
        from edgekd.models.build import load_model
        from edgekd.stages._common import drawn, open_dataset, training_device
        from edgekd.stages._runtimes import ways
        from edgekd.train import tune
        from edgekd.train.compiled import keep_programs_in
        from edgekd.train.memory import kept_memory

        config = settings.typed(self.Config)
        keep_programs_in(ctx.store.programs)
        dataset = open_dataset(inputs["data"], ctx)
        images = to_float(torch.from_numpy(dataset.images(drawn(dataset, "train", config.batch_size)))).to(training_device())
        batches = len(dataset.split("train")) // config.batch_size
        steps, decision = batches * config.epochs, {}
        with kept_memory(), TemporaryDirectory() as folder:  # memory as in training
            if "model" in inputs:
                decision["student"] = tune.tune_student(*load_model(inputs["model"]), images, config, steps)
            if "teacher" in inputs:
                model, spec = load_model(inputs["teacher"])
                place = partial(_by, model, spec, dataset, Path(folder), ctx.threads, config.batch_size)
                make = {way: partial(place, way) for way in (ways() if config.logits_only else ())}
                decision["teacher"] = tune.tune_teacher(model, spec, images, config, steps, make)
        write_decision(out, decision)
        return {"chosen": {side: str(Speed.of(found)) for side, found in decision.items()}}


def _by(
    model: nn.Module, spec: ModelSpec, dataset: Dataset, folder: Path, threads: int, batch: int, way: str
) -> Callable[[Tensor], Tensor]:
    """The teacher by a runtime, as a function of images."""
    from edgekd.stages._runtimes import by_runtime, calibration_images

    teacher = by_runtime(model, spec, way, calibration_images(dataset), folder, threads=threads, batch=batch)
    return lambda images: teacher(images, images, 0).logits
