"""Redundancy suppression: each dimension of the student's projected embedding correlates with its own of the teacher's, and with no other.

When: teacher and student of different families; the simplest method made for that, without logits or stages. Cost: one forward pass of the teacher and two
linear layers, dropped after training.
Source: Zhang et al. 2025, "Cross-Architecture Distillation Made Simple with Redundancy Suppression" (ICCV), and the authors' code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from edgekd.registry import register
from edgekd.train.distiller import Batch, DistillConfig, Side

if TYPE_CHECKING:
    from torch import Tensor, nn


def rsd_loss(student: Tensor, teacher: Tensor, kappa: float) -> Tensor:
    """Sum of (R - I)^2, what is off the diagonal times kappa, of the correlations R over the batch; both are (batch, width)."""
    import torch  # torch stays out of the CLI's start

    def standard(features: Tensor) -> Tensor:
        return (features - features.mean(0)) / (features.std(0, unbiased=False) + 1e-5)

    identity = torch.eye(student.shape[1], dtype=student.dtype, device=student.device)
    apart = standard(teacher).T @ standard(student) / len(student) - identity
    return (apart.square() * (identity + kappa * (1 - identity))).sum()


@register("distill")
class RSD:
    """Redundancy suppression of the embeddings."""

    class Config(DistillConfig):
        weight: float = Field(0.1, ge=0, description="weight of the term")
        kappa: float = Field(0.01, ge=0, le=1, description="weight of correlations between different dimensions")
        expansion: int = Field(2, ge=1, le=16, description="hidden width of the projector, in widths of the student's embedding")

    needs: ClassVar[frozenset[str]] = frozenset({"embedding"})
    co_trains: ClassVar[bool] = False

    def __init__(self, config: Config):
        self.config = config
        self.project: nn.Module | None = None

    def setup(self, student: Side, teacher: Side) -> nn.Module:
        """Two linear layers to the teacher's width: they keep the objective off the student's own features."""
        from torch import nn

        hidden = student.embedding * self.config.expansion
        first, last = nn.Linear(student.embedding, hidden, bias=False), nn.Linear(hidden, teacher.embedding, bias=False)
        self.project = nn.Sequential(first, nn.BatchNorm1d(hidden), nn.GELU(), last)
        return self.project

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        if self.project is None:
            raise RuntimeError("setup comes first")
        mine, its = batch.embeddings
        return {"rsd": self.config.weight * rsd_loss(self.project(mine).float(), its, self.config.kappa)}
