"""ScaleKD: the student's last two maps, asked by queries in the teacher's place, give the teacher's tokens; the frozen end of the teacher is on the way.

When: a strong transformer teaches a student of any family. Cost: the teacher's forward pass, its last stage a second time with gradients, and four attention
projectors, dropped after training: among the dearest of the methods here.
Source: Fan et al. 2024, "ScaleKD: Strong Vision Transformers Could Be Excellent Teachers" (NeurIPS, arXiv 2411.06786), section 3, and the authors' code:
cross-attention projector, dual-view mimicking (the second view is the map without its mean over positions, which is what zeroing the first DCT coefficient
gives), teacher parameter perception. Of a teacher with equal blocks, those after the third of its four stages are the frozen end, as for BEiT there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from edgekd.errors import UsageError
from edgekd.registry import register
from edgekd.train.distiller import Batch, DistillConfig, Side

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgekd.models.taps import Tap


def spatial_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over positions, mean over images, of the squared distance between unit vectors; tokens are (batch, positions, channels)."""
    from torch.nn import functional as F  # torch stays out of the CLI's start

    return (F.normalize(student, dim=2) - F.normalize(teacher, dim=2)).square().sum() / len(student)


def frequency_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The same of what is left without the mean over positions, the lowest frequency."""
    return spatial_loss(student - student.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True))


@register("distill")
class ScaleKD:
    """Two stages, two views, and logits."""

    class Config(DistillConfig):
        label_weight: float = Field(0.5, ge=0, description="weight of the label loss")
        kd_weight: float = Field(0.5, ge=0, description="weight of the teacher's probabilities, at temperature 1")
        spatial: float = Field(0.08, ge=0, description="weight of the tokens")
        frequency: float = Field(0.06, ge=0, description="weight of the tokens without their mean")
        heads: int = Field(8, ge=1, le=64, description="of the projectors' attention, at most: a divisor of the teacher's width is taken")
        sharpness: float = Field(5.0, gt=0, le=100, description="factor on the logits of that attention")

    needs: ClassVar[frozenset[str]] = frozenset({"logits", "taps", "teacher_taps", "modules"})
    pairs: ClassVar[frozenset[tuple[str, str]]] = frozenset((t, s) for t in ("vit", "swin") for s in ("cnn", "vit", "swin", "mlp"))
    co_trains: ClassVar[bool] = False

    def __init__(self, config: Config):
        self.config = config
        self.sides: tuple[Side, Side] | None = None
        self.projectors: Any = None

    def setup(self, student: Side, teacher: Side) -> nn.Module:
        """Two projectors a view; raises UsageError for models with a single stage."""
        from torch import nn

        from edgekd.models.attention import CrossAttentionProjector

        if min(len(student.taps), len(teacher.taps)) < 2:
            raise UsageError(
                "scalekd compares the last two stages, and one of the models has a single one", where="method", hint="method: ofa"
            )
        self.sides, parts = (student, teacher), {}
        for name, mine, its in (("third", student.taps[-2], teacher.taps[-2]), ("fourth", student.taps[-1], teacher.taps[-1])):
            heads = max(h for h in range(1, self.config.heads + 1) if its.channels % h == 0)
            for view in ("spatial", "frequency"):
                place = its.channels, its.grid[0] * its.grid[1]
                parts[f"{name}_{view}"] = CrossAttentionProjector(
                    mine.channels, mine.grid, *place, heads, self.config.sharpness, own_queries=name == "third"
                )
        self.projectors = nn.ModuleDict(parts)
        return self.projectors  # type: ignore[no-any-return]

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        import torch

        from edgekd.models.taps import feature_map

        if self.sides is None:
            raise RuntimeError("setup comes first")
        (student, teacher), cfg, parts = self.sides, self.config, self.projectors
        third, fourth = (feature_map(f, t) for f, t in zip(batch.student.taps[-2:], student.taps[-2:], strict=True))
        with torch.no_grad():
            target = _tokens(_normed(teacher.model, batch.teacher.taps[-1]), teacher.taps[-1])
        kd = -(batch.teacher.logits.softmax(1) * batch.student.logits.log_softmax(1)).sum(1).mean()
        terms = {"kd": cfg.kd_weight * kd}
        for view, weight, loss in (("spatial", cfg.spatial, spatial_loss), ("frequency", cfg.frequency, frequency_loss)):
            seen = _rest_of(teacher, parts[f"third_{view}"](third))
            terms[f"{view}3"] = weight * loss(seen, target)
            terms[f"{view}4"] = weight * loss(parts[f"fourth_{view}"](fourth, seen), target)
        return terms


def _rest_of(teacher: Side, tokens: Tensor) -> Tensor:
    """Tokens of the teacher's last but one stage through what follows it, frozen; gradients pass."""
    before, last = teacher.taps[-2:]
    (stack, _, start), (_, _, end) = before.module.rpartition("."), last.module.rpartition(".")
    blocks: Any = teacher.model.get_submodule(stack)
    x = tokens.reshape(len(tokens), *before.grid, before.channels) if before.layout == "NHWC" else tokens
    for block in blocks[int(start) + 1 : int(end) + 1]:
        x = block(x)
    x = _normed(teacher.model, x)
    return x.flatten(1, 2) if last.layout == "NHWC" else x


def _normed(model: Any, features: Tensor) -> Tensor:
    norm = getattr(model, "norm", None)
    found: Tensor = features if norm is None else norm(features)
    return found


def _tokens(features: Tensor, tap: Tap) -> Tensor:
    from edgekd.models.taps import patch_tokens

    return patch_tokens(features, tap)
