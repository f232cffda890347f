"""Cumulative spatial distillation: what a CNN's classifier says of each place of its last map, a transformer's says of its patches there.

When: a CNN teaches a vision transformer, with no features to align: both sides are logits. Cost: one forward pass of the teacher, and the two classifiers on every position.
The teacher must be a classifier on the mean of its last map; local answers count early in the training, the global one late.
Source: Zhao et al. 2023, "Cumulative Spatial Knowledge Distillation for Vision Transformers" (ICCV, arXiv 2307.08500), and the authors' code. There the student has a
distillation token and averages three answers when it is used; here its own classifier takes both parts, and it ships as it is.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from edgekd.errors import UsageError
from edgekd.registry import register
from edgekd.train.distiller import Batch, DistillConfig, Side

if TYPE_CHECKING:
    from torch import Tensor

    from edgekd.models.taps import Tap

_NEAR = 0.03  # of the largest logit: what a teacher in bf16 may lie away from its classifier on the mean


def local_share(progress: float, fusion: str) -> float:
    """How much of a position's own answer is in its target: 1 at the start, 0 at the end."""
    return {"linear": 1 - progress, "square": (1 - progress) ** 2, "cos": math.cos(math.pi * progress / 2)}[fusion]


def fused(dense: Tensor, share: float) -> Tensor:
    """Logits at each position (batch, classes, h, w), mixed with their mean over positions."""
    return share * dense + (1 - share) * dense.mean((2, 3), keepdim=True)


def dense_loss(student: Tensor, target: Tensor, soft: bool, temperature: float = 1.0) -> Tensor:
    """Mean over images and positions; logits are (batch, classes, h, w). Hard: cross-entropy with the likeliest class; soft: T^2 KL."""
    from torch.nn import functional as F  # torch stays out of the CLI's start

    if not soft:
        return F.cross_entropy(student, target.argmax(1))
    log_s, log_t = F.log_softmax(student / temperature, 1), F.log_softmax(target / temperature, 1)
    return (log_t.exp() * (log_t - log_s)).sum(1).mean() * temperature**2


def global_loss(student: Tensor, teacher: Tensor, soft: bool, temperature: float = 1.0) -> Tensor:
    """The same for the answers (batch, classes) of the whole image; soft: the mean over classes too, as in DeiT's code."""
    from torch.nn import functional as F

    if not soft:
        return F.cross_entropy(student, teacher.argmax(1))
    log_s, log_t = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    return (log_t.exp() * (log_t - log_s)).mean() * temperature**2


@register("distill")
class CSKD:
    """Answers of the whole image and of its parts."""

    class Config(DistillConfig):
        label_weight: float = Field(0.5, ge=0, description="weight of the label loss")
        weight: float = Field(0.5, ge=0, description="weight of the teacher's answer to the whole image")
        dense_weight: float = Field(1.0, ge=0, description="weight of its answers to the parts")
        soft: bool = Field(False, description="match probabilities instead of the likeliest class")
        temperature: float = Field(1.0, gt=0, le=100, description="softmax temperature of both models, where soft")
        fusion: Literal["linear", "square", "cos"] = Field("linear", description="how local answers give way to the global one")

    needs: ClassVar[frozenset[str]] = frozenset({"logits", "taps", "teacher_taps", "embedding", "modules"})
    pairs: ClassVar[frozenset[tuple[str, str]]] = frozenset({("cnn", "vit")})
    co_trains: ClassVar[bool] = False

    def __init__(self, config: Config):
        self.config = config
        self.sides: tuple[Side, Side] | None = None
        self.checked = False

    def setup(self, student: Side, teacher: Side) -> None:
        """CSKD has no projector; raises UsageError where either classifier does not fit single positions."""
        for side, name in ((student, "student"), (teacher, "teacher")):
            if side.taps[-1].channels != side.embedding:
                raise UsageError(
                    f"the classifier of the {name} reads {side.embedding} values and its last features have {side.taps[-1].channels}",
                    where="cskd",
                    expected="a classifier on the last features themselves: no layer between",
                    hint="for any pair: method: ofa",
                )
        self.sides = student, teacher

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        import torch
        from torch.nn import functional as F

        from edgekd.models.taps import feature_map

        if self.sides is None:
            raise RuntimeError("setup comes first")
        (student, teacher), cfg = self.sides, self.config
        tokens = _normed(student.model, batch.student.taps[-1])
        mine = _at_each(student, feature_map(tokens, student.taps[-1]))
        with torch.no_grad():
            its = _at_each(teacher, feature_map(batch.teacher.taps[-1], teacher.taps[-1]))
            if not self.checked:
                _assert_linear(its, batch.teacher.logits)
                self.checked = True
            target = fused(its, local_share(batch.progress, cfg.fusion))
        size = _common(student.taps[-1], teacher.taps[-1])
        mine, target = (x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size) for x in (mine.float(), target.float()))
        whole = global_loss(batch.student.logits, batch.teacher.logits, cfg.soft, cfg.temperature)
        return {
            "cskd": cfg.weight * whole,
            "cskd.dense": cfg.dense_weight * dense_loss(mine, target, cfg.soft, cfg.temperature),
        }


def _normed(model: Any, tokens: Tensor) -> Tensor:
    """Tokens after the norms that stand between the last block and the classifier."""
    for name in ("norm", "fc_norm"):
        layer = getattr(model, name, None)
        tokens = tokens if layer is None else layer(tokens)
    return tokens


def _at_each(side: Side, features: Tensor) -> Tensor:
    """The classifier's logits (batch, classes, h, w) at each position of a map (batch, channels, h, w)."""
    layer: Any = side.model.get_submodule(str(side.classifier))
    if layer.weight.ndim == 4:  # a convolution of one position
        found: Tensor = layer(features)
        return found
    found = layer(features.permute(0, 2, 3, 1))
    return found.permute(0, 3, 1, 2)


def _assert_linear(dense: Tensor, logits: Tensor) -> None:
    """Raises UsageError unless the mean of the answers at positions is the answer to the image."""
    apart = float((dense.float().mean((2, 3)) - logits).abs().max())
    if apart > _NEAR * float(logits.abs().max()):
        raise UsageError(
            f"the teacher's classifier is not linear in its last map: the mean over positions is off by {apart:.3g}",
            where="cskd",
            expected="a CNN that ends in global average pooling and one linear layer",
            hint="for any pair: method: ofa",
        )


def _common(student: Tap, teacher: Tap) -> tuple[int, int]:
    """The smaller of both grids."""
    return min(student.grid[0], teacher.grid[0]), min(student.grid[1], teacher.grid[1])
