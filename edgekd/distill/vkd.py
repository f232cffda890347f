"""Orthogonal projection: the student's mean feature, turned and never stretched, is the teacher's normalised mean feature.

When: a CNN teaches a transformer (the source's case), or any pair whose features differ in kind: an orthogonal map cannot hide what the student has not learned. Cost: one
forward pass of the teacher and one matrix, dropped after training.
Source: Miles et al. 2024, "V_kD: Improving Knowledge Distillation using Orthogonal Projections" (arXiv 2403.06213), and the authors' code: torch's orthogonal
parametrization, layer norm without weights on the teacher's side, smooth L1, and KL at temperature 1 on the logits. Here the student's own logits take the place
of a distillation token's, and Cayley's map that of torch's default: the same matrices, on another path, and for a teacher of 2048 channels a step of the
matrix takes 1.5 s of one core where Householder reflections and the matrix exponential both take half a minute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from edgekd.distill.kd import kd_loss
from edgekd.registry import register
from edgekd.train.distiller import Batch, DistillConfig, Side

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgekd.models.taps import Tap


def vkd_loss(projected: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between a projection (batch, width) and the teacher's feature (batch, width), standardised image by image."""
    from torch.nn import functional as F  # torch stays out of the CLI's start

    return F.smooth_l1_loss(projected, F.layer_norm(teacher, teacher.shape[1:]))


@register("distill")
class VKD:
    """Features through an orthogonal matrix, and logits."""

    class Config(DistillConfig):
        weight: float = Field(1.0, ge=0, description="weight of the features")
        logit_weight: float = Field(1.0, ge=0, description="weight of KL on the logits, at temperature 1")

    needs: ClassVar[frozenset[str]] = frozenset({"logits", "taps", "teacher_taps"})
    co_trains: ClassVar[bool] = False

    def __init__(self, config: Config):
        self.config = config
        self.taps: tuple[Tap, Tap] | None = None
        self.project: nn.Module | None = None

    def setup(self, student: Side, teacher: Side) -> nn.Module:
        """A linear layer that stays orthogonal while it is trained: orthonormal columns, or rows where the teacher is narrower."""
        from torch import nn
        from torch.nn.utils.parametrizations import orthogonal

        self.taps = student.taps[-1], teacher.taps[-1]
        self.project = orthogonal(nn.Linear(self.taps[0].channels, self.taps[1].channels, bias=False), orthogonal_map="cayley")
        return self.project

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        import torch

        from edgekd.models.taps import patch_tokens

        if self.taps is None or self.project is None:
            raise RuntimeError("setup comes first")
        mine, its = (patch_tokens(side.taps[-1], tap).mean(1) for side, tap in zip((batch.student, batch.teacher), self.taps, strict=True))
        with torch.autocast(mine.device.type, enabled=False):  # solving equations is not written for bf16
            projected = self.project(mine.float())
        kd = kd_loss(batch.student.logits, batch.teacher.logits, 1.0)
        return {"vkd": self.config.weight * vkd_loss(projected, its.float()), "logits": self.config.logit_weight * kd}
