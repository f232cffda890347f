"""Attention transfer: where the student's feature maps are strong is where the teacher's are.

When: CNN to CNN with stages alike, whatever their widths. Cost: one forward pass of the teacher; nothing is trained beside the student. It is known to fail
on MobileNetV2, and means nothing across architectures.
Source: Zagoruyko, Komodakis 2017, "Paying More Attention to Attention" (arXiv 1612.03928), section 3.1, as in the authors' code: squared difference of unit maps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from edgekd.distill._pairs import stage_of, stage_pairs
from edgekd.registry import register
from edgekd.train.distiller import Batch, DistillConfig, Side

if TYPE_CHECKING:
    from torch import Tensor

_POSITIONS = 64  # of the last maps on CIFAR, for which the weight was found


def attention(features: Tensor, power: int) -> Tensor:
    """(b, c, h, w) -> unit vectors (b, h * w): the mean over channels of |f|^power."""
    from torch.nn import functional as F  # torch stays out of the CLI's start

    return F.normalize(features.abs().pow(power).mean(1).flatten(1), dim=1, eps=1e-12)


def at_loss(student: Tensor, teacher: Tensor, power: int = 2) -> Tensor:
    """Mean squared difference of the attention of two maps; the larger one is averaged to the size of the smaller."""
    from torch.nn import functional as F

    size = min((f.shape[-2], f.shape[-1]) for f in (student, teacher))
    student, teacher = (f if f.shape[-2:] == size else F.adaptive_avg_pool2d(f, size) for f in (student, teacher))
    return (attention(student, power) - attention(teacher, power)).pow(2).mean()


@register("distill")
class AT:
    """Attention maps of every stage."""

    class Config(DistillConfig):
        weight: float = Field(1000.0, ge=0, description="weight of the sum over the stages")
        power: int = Field(2, ge=1, le=4, description="of the activations that are averaged over channels")
        even: bool = Field(True, description="a stage counts alike at any resolution; off, as in the source, larger maps count less")
        stages: tuple[tuple[int, int], ...] = Field(
            (), description="[student's, teacher's] stages that are compared, the last is 4; empty: by resolution and depth"
        )

    needs: ClassVar[frozenset[str]] = frozenset({"logits", "taps", "teacher_taps"})
    pairs: ClassVar[frozenset[tuple[str, str]]] = frozenset({("cnn", "cnn")})  # what a position means differs between families
    co_trains: ClassVar[bool] = False

    def __init__(self, config: Config):
        self.config = config
        self.stages: list[tuple[int, int]] = []
        self.explicit = config

    def setup(self, student: Side, teacher: Side) -> None:
        """Pairs the stages; nothing is projected."""
        self.stages = stage_pairs(student, teacher, self.config.stages)
        numbers = tuple((stage_of(student.taps, mine), stage_of(teacher.taps, its)) for mine, its in self.stages)
        self.explicit = self.config.model_copy(update={"stages": numbers})

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        terms = {}
        for mine, its in self.stages:
            student, teacher = batch.student.taps[mine], batch.teacher.taps[its]
            positions = min(student.shape[-2] * student.shape[-1], teacher.shape[-2] * teacher.shape[-1])
            scale = positions / _POSITIONS if self.config.even else 1.0
            terms[f"at{mine + 1}"] = self.config.weight * scale * at_loss(student, teacher, self.config.power)
        return terms
