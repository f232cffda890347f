"""The one training loop: train, distill, recover and every later stage that learns.

Exactness: no state outside the checkpoint. Order, augmentation, mixing and dropout are drawn from (seed, purpose, epoch or step), so a run
killed anywhere continues to the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgekd.data.augment import augment, mix_batch
from edgekd.data.loader import batches, epoch_order
from edgekd.data.rng import seed_of
from edgekd.errors import TrainingDiverged
from edgekd.train import checkpoint
from edgekd.train.compiled import Compiled
from edgekd.train.config import TrainConfig
from edgekd.train.distiller import Batch, Outputs
from edgekd.train.evaluate import logits_of
from edgekd.train.memory import kept_memory
from edgekd.train.optim import Average, Dot, learning_rate, make_optimizer
from edgekd.train.ranks import WholeBatchNorm
from edgekd.train.speed import Speed
from edgekd.train.views import View

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekd.context import Context
    from edgekd.data.dataset import Dataset
    from edgekd.data.loader import Batch as DataBatch
    from edgekd.models.spec import ModelSpec
    from edgekd.models.taps import TappedModel
    from edgekd.tasks._task import Task
    from edgekd.train.answers import Answers
    from edgekd.train.black_box import BlackBox
    from edgekd.train.distiller import Distiller
    from edgekd.train.ranks import Ranks

_CHECKPOINT_SECONDS, _CHECKPOINT_SHARE = 10.0, 0.02  # at least so far apart, and at most this part of the time


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
    teacher: Teacher | Answers | BlackBox | None = None
    tapped: TappedModel | None = None  # the student with hooks, where the distiller needs features
    projectors: nn.Module | None = None
    device: str = "cpu"


@dataclass
class Trained:
    """What training gives: the kept weights are in `model`; curves are rows of step, epoch, loss, terms, lr and, at times, the val metric."""

    model: nn.Module
    curves: list[dict[str, Any]]
    steps: int
    images: int
    elsewhere: str = ""  # a resume in another environment, in words
    refused: str = ""  # why a model that should have been compiled was not


def fit(job: Job, ctx: Context) -> Trained:
    """Trains to the end, continuing from a checkpoint in `job.work` if there is one.

    Raises TrainingDiverged for a term that is not finite, Interrupted after a signal (checkpointed).
    """
    run = _Run(job, ctx.ranks)
    elsewhere = run.resume()
    if elsewhere:
        ctx.console.warn(
            f"{job.name} goes on from a checkpoint of another environment ({elsewhere}): close to one uninterrupted run, not byte-identical"
        )
    with ctx.console.bar(job.name, run.total) as bar, ctx.stop.deferred(), reproducible(job.device), kept_memory():
        started, first, saved = time.monotonic(), run.step, time.monotonic()
        shown, pause = started, _CHECKPOINT_SECONDS
        for batch in run.remaining():
            terms = run.train_step(batch.positions, batch.images)
            if run.step == first + 1 and (refused := run.refused()):
                ctx.console.warn(f"{job.name} runs uncompiled: {refused}")
            now = time.monotonic()
            if now - shown > job.cfg.log_seconds:
                rate, shown = (run.step - first) * job.cfg.batch_size / (now - started), now
                bar.update(run.step, **{n: f"{v:.3f}" for n, v in terms.items()}, rate=f"{rate:.0f}/s")
            if run.ranks:
                ctx.stop.code = run.ranks.most(ctx.stop.code or 0) or None  # all stop after the same step
            if ctx.stop.code is not None or now - saved > pause:
                run.save()
                saved = time.monotonic()
                pause = max(_CHECKPOINT_SECONDS, (saved - now) / _CHECKPOINT_SHARE)
            ctx.stop.check()
    return run.finish()


@contextmanager
def reproducible(device: str) -> Iterator[None]:
    """On the CPU, only operations whose sums do not depend on thread timing (backward of an indexed table, for one); warns where there is none."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if device == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def _environment(device: str, ranks: Ranks | None) -> dict[str, str]:
    """What byte-identical results depend on beside the key of the step."""
    return {
        "torch": str(torch.__version__),
        "threads": str(torch.get_num_threads()),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "device": device,
        "processes": str(ranks.size if ranks else 1),
    }


class _Run:
    """The state of one training: built from the job, overwritten by a checkpoint."""

    def __init__(self, job: Job, ranks: Ranks | None = None):
        self.job, cfg, self.ranks = job, job.cfg, ranks
        if self.ranks:  # the statistics of batch norm are not in a compiled program
            job.speed = replace(job.speed, compiled=False)
            if isinstance(job.teacher, Teacher):
                job.teacher.speed = replace(job.teacher.speed, compiled=False)
        layout = torch.channels_last if job.speed.channels_last else torch.contiguous_format
        self.model = job.model.to(job.device, memory_format=layout).train()  # type: ignore[call-overload]
        run = job.tapped or self.model
        self.forward: Callable[[Tensor], Any] = Compiled(run, cfg.batch_size) if job.speed.compiled else run
        self.trained = nn.ModuleList([m for m in (self.model, job.projectors) if m is not None]).to(job.device)
        self.optimizer = make_optimizer([self.trained], cfg)
        self.average = Average(self.model, cfg.ema) if cfg.ema else None
        self.view = View(job.spec, channels_last=job.speed.channels_last, device=job.device)
        self.positions = job.dataset.split("train")
        self.per_epoch = max(len(self.positions) // cfg.batch_size, 1)
        self.total = self.per_epoch * cfg.epochs
        self.step = 0  # batches seen; the optimizer steps every `accumulate` of them
        self.curves: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self.sums: dict[str, float] = {}
        self.last_finite: dict[str, float] = {}
        self.answer: Outputs | None = None  # the teacher's to the batch at hand
        self.elsewhere = ""  # what differed where it was resumed

    # ------------------------------------------------------------------------------------------------ steps
    def remaining(self) -> Iterator[DataBatch]:
        """Batches from where the checkpoint stands, epoch after epoch."""
        size = self.job.cfg.batch_size
        while self.step < self.total:
            epoch, done = divmod(self.step, self.per_epoch)
            order = epoch_order(self.job.seed, epoch, self.positions)[done * size : self.per_epoch * size]
            yield from batches(self.job.dataset, order, size)

    def train_step(self, positions: NDArray[np.int64], images: Tensor) -> dict[str, float]:
        """One batch: loss terms, backward, and the optimizer where a group of `accumulate` ends."""
        cfg = self.job.cfg
        epoch = self.step // self.per_epoch
        terms = self._terms(positions, images, epoch)
        values = self._checked(terms)
        self._backward(terms)
        self.step += 1
        if self.step % cfg.accumulate == 0 or self.step == self.total:
            self._update()
        self._log(values, epoch)
        return values

    def _backward(self, terms: dict[str, Tensor]) -> None:
        """Adds the gradients of a batch's terms; those of the labels apart where the optimizer asks for that."""
        parts = dict(terms)
        if isinstance(self.optimizer, Dot):
            task = parts.pop("label") / self.job.cfg.accumulate
            self.optimizer.add_task(torch.autograd.grad(task, self.optimizer.parameters, retain_graph=bool(parts), allow_unused=True))
        if parts:
            loss = sum(parts.values(), start=torch.zeros((), device=self.job.device))
            (loss / self.job.cfg.accumulate).backward()  # type: ignore[no-untyped-call]

    def _terms(self, positions: NDArray[np.int64], images: Tensor, epoch: int) -> dict[str, Tensor]:
        job, cfg = self.job, self.job.cfg
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

    def _checked(self, terms: dict[str, Tensor]) -> dict[str, float]:
        values = dict(zip(terms, torch.stack([t.detach() for t in terms.values()]).tolist(), strict=True))
        for name, value in values.items():
            if not _finite(value):
                if self.answer is not None and not bool(self.answer.logits.isfinite().all()):
                    raise TrainingDiverged(
                        f"the teacher's outputs are not finite at step {self.step}",
                        where=self.job.name,
                        expected="finite outputs",
                        hint=f"check its weights, teacher.mean and teacher.std; if it answers in bf16: -o {self.job.name}.autocast=off",
                    )
                rate = self._rate(self.step)
                before = self.last_finite.get(name)
                raise TrainingDiverged(
                    f"loss term '{name}' is {value} at step {self.step} (learning rate {rate:.3g}, last finite value {before})",
                    where=self.job.name,
                    expected="finite loss terms",
                    hint=f"lower the rate, or clip: -o {self.job.name}.lr={self.job.cfg.lr / 3:.2g} -o {self.job.name}.clip_grad=1",
                )
        self.last_finite = values
        return values

    def _update(self) -> None:
        cfg = self.job.cfg
        rate = self._rate(self.step - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        dot = self.optimizer if isinstance(self.optimizer, Dot) else None
        if self.ranks:
            held = [p.grad for p in self.trained.parameters() if p.grad is not None]
            self.ranks.average(held + (dot.task_gradients() if dot else []))
        gradients = dot.gradients() if dot else [p.grad for p in self.trained.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if not _finite(float(norm)):  # before the optimizer, so that weights, checkpoints and results stay finite
            raise self._bad_gradient(float(norm))
        if cfg.clip_grad and dot:
            dot.scale(min(1.0, cfg.clip_grad / (float(norm) + 1e-6)))
        elif cfg.clip_grad:
            nn.utils.clip_grads_with_norm_(self.trained.parameters(), cfg.clip_grad, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.model, -(-self.step // cfg.accumulate))

    def _rate(self, batch: int) -> float:
        """The learning rate of the optimizer step that a batch belongs to: accumulating does not change the schedule."""
        each = self.job.cfg.accumulate
        return learning_rate(self.job.cfg, batch // each, -(-self.total // each))

    def _bad_gradient(self, norm: float) -> TrainingDiverged:
        named = ((n, p.grad) for n, p in self.trained.named_parameters() if p.grad is not None)
        bad = next((n.partition(".")[2] for n, g in named if not bool(g.isfinite().all())), "")
        what = f"the gradient of '{bad}' is not finite" if bad else f"the gradient norm is {norm}"
        return TrainingDiverged(
            f"{what} at step {self.step - 1} (learning rate {self._rate(self.step - 1):.3g})",
            where=self.job.name,
            expected="finite gradients",
            hint=f"lower the rate, or turn bf16 off: -o {self.job.name}.lr={self.job.cfg.lr / 3:.2g} -o {self.job.name}.autocast=off",
        )

    def refused(self) -> str:
        """Why the student or its teacher could not be compiled; nothing where that was not asked, or went well."""
        teacher = self.job.teacher.forward if isinstance(self.job.teacher, Teacher) else None
        return next((f.refused for f in (self.forward, teacher) if isinstance(f, Compiled) and f.refused), "")

    # ------------------------------------------------------------------------------------------------ logging and val
    def _log(self, values: dict[str, float], epoch: int) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if self.step % self.per_epoch:
            return
        terms = {n: v / self.per_epoch for n, v in self.sums.items()}
        rate = self._rate(self.step - 1)
        row = {"step": self.step, "epoch": epoch + 1, "loss": sum(terms.values()), "terms": terms, "lr": rate, "val_metric": None}
        evaluations, epochs = self.job.cfg.evaluations, self.job.cfg.epochs
        if (epoch + 1) * evaluations // epochs > epoch * evaluations // epochs:
            row["val_metric"] = self._validate()
        self.curves.append(row)
        self.sums = {}

    def _validate(self) -> float | None:
        job, positions = self.job, self.job.dataset.split("val")
        if not len(positions):
            return None
        model = self.average.model if self.average else self.model
        outputs = logits_of(model, self.view, job.dataset, positions, device=job.device)
        metric = float(job.task.metrics(outputs, job.dataset.labels[positions], None)[job.task.metric_name])
        if job.cfg.keep == "best" and metric > self.best.get("metric", float("-inf")):
            self.best = {"metric": metric, "state": {n: t.detach().cpu().clone() for n, t in model.state_dict().items()}}
        return metric

    # ------------------------------------------------------------------------------------------------ checkpoints
    def save(self) -> None:
        """Everything that the next step depends on; of several processes, the first one's is everyone's."""
        if self.ranks and not self.ranks.first:
            return
        state = {
            "trained": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.model.state_dict() if self.average else {},
            "gradients": {n: p.grad for n, p in self.trained.named_parameters() if p.grad is not None},
            "step": self.step,
            "curves": self.curves,
            "best": self.best,
            "sums": self.sums,
            "environment": _environment(self.job.device, self.ranks),
            "elsewhere": self.elsewhere,
        }
        checkpoint.save(self.job.work, state)

    def resume(self) -> str:
        """Takes over a checkpoint of the same job, if there is one; returns what of its environment differed, in words."""
        state = checkpoint.load(self.job.work)
        if state is None:
            return ""
        here = _environment(self.job.device, self.ranks)
        found = ", ".join(f"{n} {v}, here {here.get(n)}" for n, v in state.get("environment", {}).items() if here.get(n) != v)
        self.elsewhere = found or state.get("elsewhere", "")
        self.trained.load_state_dict(state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.model.load_state_dict(state["average"])
        for name, parameter in self.trained.named_parameters():
            if name in state["gradients"]:
                parameter.grad = state["gradients"][name].to(parameter.device)
        self.step, self.curves, self.best, self.sums = state["step"], state["curves"], state["best"], state["sums"]
        return found

    def finish(self) -> Trained:
        """The kept weights, on the CPU, in eval mode."""
        if self.job.tapped:
            self.job.tapped.close()
        model = self.average.model if self.average else self.model
        if self.best:
            model.load_state_dict(self.best["state"])
        kept = model.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
        for name, tensor in kept.state_dict().items():
            if not bool(tensor.isfinite().all()):  # what would be published could not be read again
                raise TrainingDiverged(f"'{name}' is not finite at the end", where=self.job.name, expected="finite weights")
        return Trained(kept, self.curves, self.total, self.total * self.job.cfg.batch_size, self.elsewhere, self.refused())


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
