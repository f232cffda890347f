"""Soft-label distillation: the student matches the teacher's tempered class probabilities.

When: teacher and student of any architecture; the cheapest method and the baseline of every other. Cost: one teacher forward pass.
Source: Hinton, Vinyals, Dean 2015 (arXiv 1503.02531), section 2; weights of mdistiller's CIFAR protocol (0.1 label, 0.9 teacher, T 4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from edgekd.registry import register
from edgekd.train.distiller import Batch, DistillConfig, Side

if TYPE_CHECKING:
    from torch import Tensor


def kd_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of tempered softmaxes, mean over the batch. Logits are (batch, classes)."""
    from torch.nn import functional as F  # torch stays out of the CLI's start

    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def sampled_kd_loss(student: Tensor, shares: Tensor, temperature: float) -> Tensor:
    """The same from an estimate (batch, classes) of the teacher's tempered probabilities: cross-entropy, for the teacher's entropy is not known."""
    from torch.nn import functional as F

    return -(shares * F.log_softmax(student / temperature, dim=1)).sum(dim=1).mean() * temperature**2


@register("distill")
class KD:
    """KD on logits."""

    class Config(DistillConfig):
        label_weight: float = Field(0.1, ge=0, description="weight of the label loss")
        weight: float = Field(0.9, ge=0, description="weight of the distillation term")
        temperature: float = Field(4.0, gt=0, le=100, description="softmax temperature of both models")

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    co_trains: ClassVar[bool] = False

    def __init__(self, config: Config):
        self.config = config

    def setup(self, student: Side, teacher: Side) -> None:
        """KD has no projector."""

    @property
    def linear_at(self) -> float:
        """KL's gradient is linear in the teacher's tempered probabilities."""
        return float(self.config.temperature)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        student, teacher, temperature = batch.student.logits, batch.teacher, self.config.temperature
        sampled = teacher.probabilities
        loss = kd_loss(student, teacher.logits, temperature) if sampled is None else sampled_kd_loss(student, sampled, temperature)
        return {"kd": self.config.weight * loss}
