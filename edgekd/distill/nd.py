"""Norm and direction (KD++): the student's embeddings point where the teacher's class means do, and are as long as the teacher's.

When: beside a method on logits: `method: [kd, {nd: {weight: 2}}]`. Cost: one forward pass of the teacher, and one over the training images before the first epoch.
Source: Wang et al. 2023, "Improving Knowledge Distillation via Regularizing Feature Norm and Direction" (arXiv 2305.17007), equation 8; the projector where
widths differ as in the authors' code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from edgekd.registry import register
from edgekd.train.distiller import Batch, DistillConfig, Side

if TYPE_CHECKING:
    from torch import Tensor, nn


def nd_loss(student: Tensor, teacher: Tensor, means: Tensor) -> Tensor:
    """Mean over the batch of 1 - (s . e) / max(|s|, |t|); features (batch, d), and the class mean (batch, d) of each image, of which e has the direction."""
    from torch.nn import functional as F  # torch stays out of the CLI's start

    along = (student * F.normalize(means, dim=1)).sum(1)
    longer = student.norm(dim=1).maximum(teacher.norm(dim=1)).clamp_min(1e-12)
    loss: Tensor = (1 - along / longer).mean()
    return loss


@register("distill")
class ND:
    """Norm and direction of the embeddings."""

    class Config(DistillConfig):
        weight: float = Field(2.0, ge=0, description="weight of the term; 0.5 to 2 in the source, most for small students")
        dropout: float = Field(0.5, ge=0, lt=1, description="of the projector, where the widths of the features differ")

    needs: ClassVar[frozenset[str]] = frozenset({"embedding", "class_means", "labels"})
    co_trains: ClassVar[bool] = False

    def __init__(self, config: Config):
        self.config = config
        self.project: nn.Module | None = None
        self.means: Tensor | None = None

    def setup(self, student: Side, teacher: Side) -> nn.Module | None:
        """Batch norm, dropout and a linear layer to the teacher's width, where the student has another."""
        from torch import nn

        self.means, mine, its = teacher.class_means, student.embedding, teacher.embedding
        if mine != its:
            self.project = nn.Sequential(nn.BatchNorm1d(mine), nn.Dropout(self.config.dropout), nn.Linear(mine, its))
        return self.project

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        if self.means is None:
            raise RuntimeError("setup comes first")
        mine, its = batch.embeddings
        self.means = self.means.to(its.device)  # moved once
        mine = self.project(mine) if self.project is not None else mine
        return {"nd": self.config.weight * nd_loss(mine, its, self.means.to(mine.dtype)[batch.hard_target])}
