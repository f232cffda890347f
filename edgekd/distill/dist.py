"""DIST: the student's probabilities correlate with the teacher's, image by image and class by class; their size is free.

When: a teacher that is much stronger than its student, or trained by another recipe. Cost: one forward pass of the teacher. Batches below about 16 make
the class-wise part noisy.
Source: Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher" (arXiv 2205.10536), equations 7 to 10; epsilon as in the authors' code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from edgekd.registry import register
from edgekd.train.distiller import Batch, DistillConfig, Side

if TYPE_CHECKING:
    from torch import Tensor

_EPS = 1e-8  # added to the denominator; F.cosine_similarity clamps instead


def pearson_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - mean correlation of the rows of (n, k) and (n, k)."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    alike: Tensor = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + _EPS)
    return 1 - alike.mean()


@register("distill")
class DIST:
    """Inter- and intra-class relations."""

    class Config(DistillConfig):
        beta: float = Field(2.0, ge=0, description="weight of the relations between classes, image by image; 1 on ImageNet")
        gamma: float = Field(2.0, ge=0, description="weight of the relations between images, class by class; 1 or 2 on ImageNet")
        temperature: float = Field(4.0, gt=0, le=100, description="softmax temperature of both models; 1 on ImageNet")

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    co_trains: ClassVar[bool] = False

    def __init__(self, config: Config):
        self.config = config

    def setup(self, student: Side, teacher: Side) -> None:
        """DIST has no projector."""

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        cfg = self.config
        student, teacher = ((x.logits / cfg.temperature).softmax(1) for x in (batch.student, batch.teacher))
        scale = cfg.temperature**2
        return {
            "inter": scale * cfg.beta * pearson_distance(student, teacher),
            "intra": scale * cfg.gamma * pearson_distance(student.T, teacher.T),
        }
