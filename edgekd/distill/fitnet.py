"""FitNet hints: a projection of one of the student's feature maps is the teacher's.

When: CNN to CNN, stages alike. Cost: one forward pass of the teacher, and a convolution with batch norm that is dropped after training. Between a CNN and a
transformer it is known to hurt.
Source: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets" (arXiv 1412.6550), equation 3; projector, weight and one stage of training instead of two as
in mdistiller. A map of more than twice the teacher's size is averaged first (there, the kernel grows with it), and a smaller one averages the teacher's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from edgekd.distill._pairs import stage_of, stage_pairs
from edgekd.registry import register
from edgekd.train.distiller import Batch, DistillConfig, Side

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgekd.models.taps import Tap


def projector(student: Tap, teacher: Tap) -> nn.Sequential:
    """Convolution and batch norm from the student's map to the teacher's width, and to its size where that is at most twice apart."""
    from torch import nn  # torch stays out of the CLI's start

    mine, its = student.grid[0], teacher.grid[0]
    c_in, c_out = student.channels, teacher.channels
    if mine == 2 * its:
        conv: nn.Module = nn.Conv2d(c_in, c_out, 3, 2, 1)
    elif 2 * mine == its:
        conv = nn.ConvTranspose2d(c_in, c_out, 4, 2, 1)
    elif mine > 2 * its:
        conv = nn.Sequential(nn.AdaptiveAvgPool2d(teacher.grid), nn.Conv2d(c_in, c_out, 1))
    elif mine >= its:
        conv = nn.Conv2d(c_in, c_out, 1 + mine - its)
    else:
        conv = nn.Conv2d(c_in, c_out, 3, 1, 1)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


def hint_loss(projected: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error; what is rectified at the teacher is rectified here, and a teacher's larger map is averaged to the size of the other."""
    from torch.nn import functional as F

    if teacher.shape[-2:] != projected.shape[-2:]:
        teacher = F.adaptive_avg_pool2d(teacher, (projected.shape[-2], projected.shape[-1]))
    # taps behind an activation hold nothing negative, and those before one cannot be reached through a ReLU
    return F.mse_loss(F.relu(projected) if bool((teacher >= 0).all()) else projected, teacher)


@register("distill")
class FitNet:
    """One hint."""

    class Config(DistillConfig):
        weight: float = Field(100.0, ge=0, description="weight of the hint")
        stages: tuple[int, int] | None = Field(
            None,
            description="student's and teacher's stage, the last is 4; default: the second pair by resolution and depth, as in the source",
        )

    needs: ClassVar[frozenset[str]] = frozenset({"logits", "taps", "teacher_taps"})
    pairs: ClassVar[frozenset[tuple[str, str]]] = frozenset({("cnn", "cnn")})  # what a position means differs between families
    co_trains: ClassVar[bool] = False

    def __init__(self, config: Config):
        self.config = config
        self.pair: tuple[int, int] = (0, 0)
        self.project: nn.Module | None = None
        self.explicit = config

    def setup(self, student: Side, teacher: Side) -> nn.Module:
        """The projector from the student's map to the teacher's."""
        pairs = stage_pairs(student, teacher, () if self.config.stages is None else (self.config.stages,))
        self.pair = pairs[:2][-1]
        numbers = stage_of(student.taps, self.pair[0]), stage_of(teacher.taps, self.pair[1])
        self.explicit = self.config.model_copy(update={"stages": numbers})
        self.project = projector(student.taps[self.pair[0]], teacher.taps[self.pair[1]])
        return self.project

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        if self.project is None:
            raise RuntimeError("setup comes first")
        mine, its = batch.student.taps[self.pair[0]], batch.teacher.taps[self.pair[1]]
        return {"hint": self.config.weight * hint_loss(self.project(mine), its)}
