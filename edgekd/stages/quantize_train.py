"""quantize_train: a model is trained with its weights rounded, imitating the teacher where there is one -> model with plain weights on a grid, and the grid."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import registry
from edgekd.artifact import Artifact, Kind
from edgekd.registry import register
from edgekd.stages._stage import Settings
from edgekd.stages.distill import imitate
from edgekd.stages.train import learn, prepare
from edgekd.train.config import TrainConfig

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.data.dataset import Dataset
    from edgekd.models.spec import ModelSpec
    from edgekd.quantize._learned import Seen
    from edgekd.tasks._task import Task

_BATCH = 32


@register("stage")
class QuantizeTrain:
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
    method_kind = "quantize"

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        from edgekd.data.loader import epoch_order
        from edgekd.quantize._learned import save_grid
        from edgekd.stages._common import method_of

        quantizer, job = method_of(settings, "quantize"), prepare(settings, inputs, ctx)
        wanted = epoch_order(ctx.seed, 0, job.dataset.split("train"))[: quantizer.config.samples]
        quantizer.attach(job.model, seen(job.spec, job.dataset, job.task, wanted), str(settings.facts["flavour"]))
        done: dict[str, Any] = {}
        if {"teacher", "black_box", "answers"} & inputs.keys():
            distiller = registry.load("distill", quantizer.config.distiller)
            done = imitate(job, distiller(distiller.Config(**quantizer.config.distiller_options)), settings, inputs, ctx)
        done |= learn(job, out, ctx, finish=lambda model: save_grid(out, quantizer.bake(model)))
        return done


def seen(spec: ModelSpec, dataset: Dataset, task: Task, positions: Any) -> Seen:
    """Training images as the model sees them, without augmentation, and their label loss."""
    import torch

    from edgekd.data.augment import to_float
    from edgekd.quantize._learned import Seen
    from edgekd.train.views import View

    parts = [positions[i : i + _BATCH] for i in range(0, len(positions), _BATCH)]
    view, classes = View(spec), len(dataset.classes)
    targets = [task.collate(dataset.labels[p], classes) for p in parts]
    batches = [view(to_float(torch.from_numpy(dataset.images(p)))) for p in parts]
    return Seen(batches, lambda logits, number: task.label_loss(logits, targets[number], 0.0))
