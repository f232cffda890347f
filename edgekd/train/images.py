"""Learning from images: batches are augmented, each model sees them in its own view, and a teacher may answer for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgekd.data.augment import augment, mix_batch
from edgekd.data.loader import batches, epoch_order
from edgekd.data.rng import seed_of
from edgekd.train.compiled import Compiled
from edgekd.train.config import TrainConfig
from edgekd.train.distiller import Batch, Outputs
from edgekd.train.evaluate import logits_of
from edgekd.train.loop import Run, Trained
from edgekd.train.ranks import WholeBatchNorm
from edgekd.train.speed import Speed
from edgekd.train.views import View

if TYPE_CHECKING:
    from edgekd.data.dataset import Dataset
    from edgekd.data.loader import Batch as DataBatch
    from edgekd.models.spec import ModelSpec
    from edgekd.models.taps import TappedModel
    from edgekd.tasks._task import Task
    from edgekd.train.answers import Answers
    from edgekd.train.black_box import BlackBox, RuntimeTeacher
    from edgekd.train.distiller import Distiller
    from edgekd.train.ranks import Ranks


@dataclass
class Teacher:
    """The frozen model that is imitated, with its own view of the images."""

    model: nn.Module
    view: View
    speed: Speed
    tapped: TappedModel | None = None
    batch: int = 0  # images in the batches that a compiled teacher is for

    @cached_property
    def forward(self) -> Callable[[Tensor], Any]:
        """The model, with its taps where there are some, as `speed` says that it runs."""
        run = self.tapped or self.model
        return Compiled(run, self.batch, frozen=True) if self.speed.compiled else run

    def __call__(self, images: Tensor, index: Tensor, epoch: int) -> Outputs:
        """Outputs for images in [0, 1]; fp32 whatever the autocast. `index` and `epoch` are for teachers whose answers are kept."""
        kind = images.device.type
        with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=self.speed.autocast):
            seen = self.forward(self.view(images))
        return Outputs.of(
            *(seen if self.tapped else (seen,)), copy=True
        )  # ordinary tensors: inference tensors cannot be saved for a backward pass


@dataclass
class Job:
    """One training run."""

    name: str
    model: nn.Module
    spec: ModelSpec
    dataset: Dataset
    task: Task
    cfg: TrainConfig
    seed: int
    work: Path
    speed: Speed = field(default_factory=Speed)
    distiller: Distiller | None = None
    label_weight: float = 1.0
    teacher: Teacher | Answers | BlackBox | RuntimeTeacher | None = None
    tapped: TappedModel | None = None  # the student with hooks, where the distiller needs features
    projectors: nn.Module | None = None
    device: str = "cpu"

    def start(self, ranks: Ranks | None) -> ImageRun:
        return ImageRun(self, ranks)


class ImageRun(Run):
    """The state of a training on images."""

    job: Job

    def __init__(self, job: Job, ranks: Ranks | None = None):
        if ranks:  # the statistics of batch norm are not in a compiled program
            job.speed = replace(job.speed, compiled=False)
            if isinstance(job.teacher, Teacher):
                job.teacher.speed = replace(job.teacher.speed, compiled=False)
        self.positions = job.dataset.split("train")
        super().__init__(job, max(len(self.positions) // job.cfg.batch_size, 1), job.cfg.batch_size, ranks)
        run = job.tapped or self.model
        self.forward: Callable[[Tensor], Any] = Compiled(run, job.cfg.batch_size) if job.speed.compiled else run
        self.view = View(job.spec, channels_last=job.speed.channels_last, device=job.device)
        self.answer: Outputs | None = None  # the teacher's to the batch at hand

    def remaining(self) -> Iterator[DataBatch]:
        size = self.job.cfg.batch_size
        while self.step < self.total:
            epoch, done = divmod(self.step, self.per_epoch)
            order = epoch_order(self.job.seed, epoch, self.positions)[done * size : self.per_epoch * size]
            yield from batches(self.job.dataset, order, size)

    def terms(self, batch: DataBatch, epoch: int) -> dict[str, Tensor]:
        job, cfg, (positions, images) = self.job, self.job.cfg, batch
        classes = len(job.dataset.classes)
        index = torch.from_numpy(positions)
        view = epoch % cfg.fixed_views if cfg.fixed_views else epoch
        pixels = augment(images.to(job.device), index, cfg.augment, seed=job.seed, epoch=view)
        target = job.task.collate(job.dataset.labels[positions], classes).to(job.device)
        mixed = mix_batch(pixels, cfg.augment, seed=job.seed, step=self.step)
        if mixed is not None:
            pixels, target = mixed.images, job.task.mix(target, target[mixed.partner], mixed.share, classes)
        part = self.ranks.share(len(pixels)) if self.ranks else slice(None)
        student = self._whole(self._student(pixels[part]))
        terms = {"label": job.label_weight * job.task.label_loss(student.logits, target, cfg.label_smoothing)}
        if job.distiller is not None and job.teacher is not None:
            progress, self.answer = self.step / max(self.total - 1, 1), self._whole(job.teacher(pixels[part], index[part], epoch))
            terms |= job.distiller.terms(Batch(student, self.answer, target, index, progress))
        return terms

    def _student(self, pixels: Tensor) -> Outputs:
        """What the student gives; dropout and drop-path are those of the step, and of the process."""
        job, seed = self.job, seed_of(self.job.seed, "step", self.step)
        torch.manual_seed(seed + (self.ranks.rank if self.ranks else 0))
        whole = WholeBatchNorm(self.ranks.size) if self.ranks else nullcontext()
        with torch.autocast(torch.device(job.device).type, torch.bfloat16, enabled=job.speed.autocast), whole:
            seen = self.forward(self.view(pixels))
        if self.ranks:
            torch.manual_seed(seed)  # what a loss draws is the same everywhere
        return Outputs.of(*(seen if job.tapped else (seen,)))

    def _whole(self, part: Outputs) -> Outputs:
        return self.ranks.whole(part) if self.ranks else part

    def val_metric(self, model: nn.Module) -> float | None:
        job, positions = self.job, self.job.dataset.split("val")
        if not len(positions):
            return None
        outputs = logits_of(model, self.view, job.dataset, positions, device=job.device)
        return float(job.task.metrics(outputs, job.dataset.labels[positions], None)[job.task.metric_name])

    def teacher_fails(self) -> str:
        if self.answer is None or bool(self.answer.logits.isfinite().all()):
            return ""
        return f"check its weights, teacher.mean and teacher.std; if it answers in bf16: -o {self.job.name}.autocast=off"

    def refused(self) -> str:
        teacher = self.job.teacher.forward if isinstance(self.job.teacher, Teacher) else None
        return next((f.refused for f in (self.forward, teacher) if isinstance(f, Compiled) and f.refused), "")

    def finish(self) -> Trained:
        if self.job.tapped:
            self.job.tapped.close()
        return super().finish()
