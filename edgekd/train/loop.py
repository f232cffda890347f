"""The one training loop: train, distill, recover and every later stage that learns, from images (train/images.py) or from a graph (graph/_run.py).

Exactness: no state outside the checkpoint. Order, augmentation, mixing and dropout are drawn from (seed, purpose, epoch or step), so a run
killed anywhere continues to the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from edgekd.errors import TrainingDiverged
from edgekd.train import checkpoint
from edgekd.train.memory import kept_memory
from edgekd.train.optim import Average, Dot, learning_rate, make_optimizer

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.models.spec import ModelSpec
    from edgekd.train.ranks import Ranks
    from edgekd.train.speed import Speed

_CHECKPOINT_SECONDS, _CHECKPOINT_SHARE = 10.0, 0.02  # at least so far apart, and at most this part of the time


class Lesson(Protocol):
    """What there is to learn, and how: one training. Its kind of samples is that of the run that it starts."""

    name: str
    model: nn.Module
    spec: ModelSpec
    cfg: Any  # a LearnConfig
    seed: int
    work: Path
    speed: Speed
    projectors: nn.Module | None
    device: str

    def start(self, ranks: Ranks | None) -> Run: ...


@dataclass
class Trained:
    """What training gives: the kept weights are in `model`; curves are rows of step, epoch, loss, terms, lr and, at times, the val metric."""

    model: nn.Module
    curves: list[dict[str, Any]]
    steps: int
    images: int
    elsewhere: str = ""  # a resume in another environment, in words
    refused: str = ""  # why a model that should have been compiled was not


def fit(job: Lesson, ctx: Context) -> Trained:
    """Trains to the end, continuing from a checkpoint in `job.work` if there is one.

    Raises TrainingDiverged for a term that is not finite, Interrupted after a signal (checkpointed).
    """
    run = job.start(ctx.ranks)
    elsewhere = run.resume()
    if elsewhere:
        ctx.console.warn(
            f"{job.name} goes on from a checkpoint of another environment ({elsewhere}): close to one uninterrupted run, not byte-identical"
        )
    with ctx.console.bar(job.name, run.total) as bar, ctx.stop.deferred(), reproducible(job.device), kept_memory():
        started, first, saved = time.monotonic(), run.step, time.monotonic()
        shown, pause = started, _CHECKPOINT_SECONDS
        for batch in run.remaining():
            terms = run.train_step(batch)
            if run.step == first + 1 and (refused := run.refused()):
                ctx.console.warn(f"{job.name} runs uncompiled: {refused}")
            now = time.monotonic()
            if now - shown > job.cfg.log_seconds:
                rate, shown = (run.step - first) * run.samples / (now - started), now
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


class Run:
    """The state of one training: built from the job, overwritten by a checkpoint. What a batch is and what it teaches is for those who derive from it."""

    def __init__(self, job: Lesson, per_epoch: int, samples: int, ranks: Ranks | None = None):
        self.job, cfg, self.ranks = job, job.cfg, ranks
        layout = torch.channels_last if job.speed.channels_last else torch.contiguous_format
        self.model = job.model.to(job.device, memory_format=layout).train()  # type: ignore[call-overload]
        self.trained = nn.ModuleList([m for m in (self.model, job.projectors) if m is not None]).to(job.device)
        self.optimizer = make_optimizer([self.trained], cfg)
        self.average = Average(self.model, cfg.ema) if cfg.ema else None
        self.per_epoch, self.samples = per_epoch, samples  # batches, and what each of them holds
        self.total = self.per_epoch * cfg.epochs
        self.step = 0  # batches seen; the optimizer steps every `accumulate` of them
        self.curves: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self.sums: dict[str, float] = {}
        self.last_finite: dict[str, float] = {}
        self.elsewhere = ""  # what differed where it was resumed

    # ------------------------------------------------------------------------------------------------ what samples there are
    def remaining(self) -> Iterator[Any]:
        """Batches from where the checkpoint stands, epoch after epoch, until `self.step` is `self.total`."""
        raise NotImplementedError

    def terms(self, batch: Any, epoch: int) -> dict[str, Tensor]:
        """Named, weighted loss terms of one batch; the labels' is `label`."""
        raise NotImplementedError

    def val_metric(self, model: nn.Module) -> float | None:
        """How good a model is on val; None where there is none."""
        raise NotImplementedError

    def teacher_fails(self) -> str:
        """What to check where the teacher's last outputs were not finite; nothing where they were."""
        return ""

    def refused(self) -> str:
        """Why the student or its teacher could not be compiled; nothing where that was not asked, or went well."""
        return ""

    # ------------------------------------------------------------------------------------------------ steps
    def train_step(self, batch: Any) -> dict[str, float]:
        """One batch: loss terms, backward, and the optimizer where a group of `accumulate` ends."""
        cfg = self.job.cfg
        epoch = self.step // self.per_epoch
        terms = self.terms(batch, epoch)
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
            (loss / self.job.cfg.accumulate).backward()

    def _checked(self, terms: dict[str, Tensor]) -> dict[str, float]:
        values = dict(zip(terms, torch.stack([t.detach() for t in terms.values()]).tolist(), strict=True))
        for name, value in values.items():
            if not _finite(value):
                if hint := self.teacher_fails():
                    raise TrainingDiverged(
                        f"the teacher's outputs are not finite at step {self.step}",
                        where=self.job.name,
                        expected="finite outputs",
                        hint=hint,
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
            row["val_metric"] = self._validate(epoch)
        self.curves.append(row)
        self.sums = {}

    def _validate(self, epoch: int) -> float | None:
        """The metric on val; the best weights so far are kept where that is asked for, and after too long without better ones the training ends."""
        cfg, model = self.job.cfg, self.average.model if self.average else self.model
        metric = self.val_metric(model)
        if metric is None:
            return None
        if metric >= self.best.get("metric", float("-inf")):  # of equals the latest, which has learned for longer
            state = {n: t.detach().cpu().clone() for n, t in model.state_dict().items()} if cfg.keep == "best" else {}
            self.best = {"metric": metric, "epoch": epoch, "state": state}
        elif cfg.patience and epoch - self.best["epoch"] >= cfg.patience:
            self.total = self.step
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
            "total": self.total,
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
        self.step, self.total = state["step"], state["total"]
        self.curves, self.best, self.sums = state["curves"], state["best"], state["sums"]
        return found

    def finish(self) -> Trained:
        """The kept weights, on the CPU, in eval mode."""
        model = self.average.model if self.average else self.model
        if self.best.get("state"):
            model.load_state_dict(self.best["state"])
        kept = model.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
        for name, tensor in kept.state_dict().items():
            if not bool(tensor.isfinite().all()):  # what would be published could not be read again
                raise TrainingDiverged(f"'{name}' is not finite at the end", where=self.job.name, expected="finite weights")
        return Trained(kept, self.curves, self.total, self.total * self.samples, self.elsewhere, self.refused())


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
