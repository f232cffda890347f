"""Relational KD: distances and angles between the images of a batch are the same for student and teacher.

When: features of any two shapes, where only their geometry should carry over; weak alone, good beside kd. Cost: one forward pass of the teacher, and a cube of
the batch size for the angles. Across architectures the geometry of features differs, and it may hurt.
Source: Park et al. 2019, "Relational Knowledge Distillation" (arXiv 1904.05068), equations 4 to 8; weights 25 and 50 as in the authors' code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from edgekd.registry import register
from edgekd.train.distiller import Batch, DistillConfig, Side

if TYPE_CHECKING:
    from torch import Tensor

_EPS = 1e-12


def distances(features: Tensor) -> Tensor:
    """(b, d) -> (b, b) distances in units of their mean; 0 on the diagonal."""
    import torch  # torch stays out of the CLI's start

    squares = features.pow(2).sum(1)
    squared = (squares[:, None] + squares[None] - 2 * features @ features.T).clamp(min=_EPS)
    found = squared.sqrt() * (1 - torch.eye(len(features), dtype=features.dtype, device=features.device))
    return found / found[found > 0].mean()


def angles(features: Tensor) -> Tensor:
    """(b, d) -> (b, b, b) cosines of the angles at each image between every two others."""
    from torch.nn import functional as F

    apart = F.normalize(features[None] - features[:, None], dim=2, eps=_EPS)
    return apart @ apart.transpose(1, 2)


def rkd_terms(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Smooth L1 of distances and of angles; features are (batch, any width)."""
    from torch.nn import functional as F

    return F.smooth_l1_loss(distances(student), distances(teacher)), F.smooth_l1_loss(angles(student), angles(teacher))


@register("distill")
class RKD:
    """Distances and angles of the embeddings."""

    class Config(DistillConfig):
        distance: float = Field(25.0, ge=0, description="weight of the distances")
        angle: float = Field(50.0, ge=0, description="weight of the angles")

    needs: ClassVar[frozenset[str]] = frozenset({"embedding"})
    relational: ClassVar[bool] = True
    co_trains: ClassVar[bool] = False

    def __init__(self, config: Config):
        self.config = config

    def setup(self, student: Side, teacher: Side) -> None:
        """RKD has no projector: relations need no common width."""

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        distance, angle = rkd_terms(*batch.embeddings)
        return {"distance": self.config.distance * distance, "angle": self.config.angle * angle}
