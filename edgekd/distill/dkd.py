"""Decoupled KD: what the teacher says of the right class, and how it ranks the others, with a weight each.

When: same or other architectures, where plain KD hides the ranking of wrong classes behind a sure teacher. Cost: one forward pass of the teacher.
More `beta` for a surer teacher: 2 for small CIFAR pairs, 6 to 8 for wide ones, 0.5 with temperature 1 on ImageNet.
Source: Zhao et al. 2022, "Decoupled Knowledge Distillation" (arXiv 2203.08679), section 3; warm-up and weights of mdistiller. The other classes are
masked out of the softmax, not given a logit of -1000 as there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from edgekd.errors import UsageError
from edgekd.registry import register
from edgekd.train.distiller import Batch, DistillConfig, Side

if TYPE_CHECKING:
    from torch import Tensor


def dkd_terms(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """KL of (target, rest) and KL among the rest, each times T^2; logits are (batch, classes), target (batch,)."""
    import torch  # torch stays out of the CLI's start
    from torch.nn import functional as F

    classes = student.shape[1]
    mask = F.one_hot(target, classes).bool()
    both = []
    for logits in (student, teacher):
        log_all = F.log_softmax(logits / temperature, dim=1)
        log_target = log_all[mask]
        log_rest = torch.logsumexp(log_all.masked_fill(mask, float("-inf")), dim=1)
        others = logits[~mask].view(len(logits), classes - 1) / temperature
        both.append((torch.stack([log_target, log_rest], dim=1), F.log_softmax(others, dim=1)))
    found = [F.kl_div(s, t, reduction="batchmean", log_target=True) * temperature**2 for s, t in zip(*both, strict=True)]
    return found[0], found[1]


@register("distill")
class DKD:
    """Target-class and non-target-class distillation."""

    class Config(DistillConfig):
        alpha: float = Field(1.0, ge=0, description="weight of the target class against the rest")
        beta: float = Field(2.0, ge=0, description="weight of the ranking of the other classes")
        temperature: float = Field(4.0, gt=0, le=100, description="softmax temperature of both models")
        warmup: float = Field(
            0.083, ge=0, le=1, description="share of training in which both weights grow from 0: 20 of 240 epochs in the source"
        )

    needs: ClassVar[frozenset[str]] = frozenset({"logits", "labels"})
    co_trains: ClassVar[bool] = False

    def __init__(self, config: Config):
        self.config = config

    def setup(self, student: Side, teacher: Side) -> None:
        """Refuses two classes: among the others there is then nothing to rank."""
        if student.num_classes < 3:
            raise UsageError("dkd ranks the classes that are not the right one", expected="3 or more classes", hint="method: kd")

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        cfg = self.config
        # mixed labels count as their larger part
        of_target, of_rest = dkd_terms(batch.student.logits, batch.teacher.logits, batch.hard_target, cfg.temperature)
        share = min(batch.progress / cfg.warmup, 1.0) if cfg.warmup else 1.0
        return {"target": share * cfg.alpha * of_target, "rest": share * cfg.beta * of_rest}
