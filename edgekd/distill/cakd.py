"""Partially crossed attention and group-wise linear projection: a CNN's map is turned into the teacher's attention, and into its tokens.

When: a vision transformer teaches a CNN. Cost: one forward pass of the teacher, three convolutions and a few linear layers, dropped after training; attention over the
teacher's tokens twice.
Source: Liu et al. 2022, "Cross-Architecture Knowledge Distillation" (ACCV, arXiv 2207.05273), equations 2 to 5, read through secondary sources: squared distances are means over
their elements, both weights are 1 and the projectors learn at the student's rate. The adversarial training on several views is not part of this.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from edgekd.errors import UsageError
from edgekd.registry import register
from edgekd.train.distiller import Batch, DistillConfig, Side

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from edgekd.models.taps import Tap


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], crossed: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of softmax(QK^T / sqrt d) V, plus that of V V^T / sqrt d; queries, keys and values are (..., positions, d).

    crossed: the student's, some elements replaced by the teacher's; the first part reads these, the second the student's own values.
    """
    from torch.nn import functional as F  # torch stays out of the CLI's start

    scale = math.sqrt(student[0].shape[-1])

    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) / scale).softmax(-1) @ v

    gram = [v @ v.transpose(-1, -2) / scale for v in (student[2], teacher[2])]
    return F.mse_loss(attended(*crossed), attended(*teacher)) + F.mse_loss(gram[0], gram[1])


@register("distill")
class CAKD:
    """The last attention of a transformer, and its tokens."""

    class Config(DistillConfig):
        attention: float = Field(1.0, ge=0, description="weight of the attention")
        tokens: float = Field(1.0, ge=0, description="weight of the tokens")
        crossed: float = Field(
            0.5, ge=0, lt=1, description="probability that an element of the student's queries, keys and values is the teacher's"
        )
        dropout: float = Field(0.1, ge=0, lt=1, description="of the group-wise linear projection")

    needs: ClassVar[frozenset[str]] = frozenset({"logits", "taps", "teacher_taps", "modules"})
    pairs: ClassVar[frozenset[tuple[str, str]]] = frozenset({("vit", "cnn")})
    co_trains: ClassVar[bool] = False

    def __init__(self, config: Config):
        self.config = config
        self.taps: tuple[int, Tap] | None = None  # the student's, by its place, and the teacher's
        self.heads = 1
        self.seen: list[Tensor] = []  # what the teacher's layer of queries, keys and values gave last
        self.projectors: Any = None

    def setup(self, student: Side, teacher: Side) -> nn.Module:
        """Projectors from the student's map that is nearest in size to the teacher's grid; listens to the teacher's last attention.

        Raises UsageError where that attention has no joint layer of queries, keys and values.
        """
        from torch import nn

        from edgekd.models.attention import GroupLinear, QueryKeyValue

        its = teacher.taps[-1]
        block: Any = teacher.model.get_submodule(its.module)
        layer = getattr(getattr(block, "attn", None), "qkv", None)
        if layer is None or layer.out_features != 3 * its.channels:
            raise UsageError(
                f"the last block of the teacher, '{its.module}', has no attention whose queries, keys and values can be read",
                where="cakd",
                expected="a plain vision transformer as teacher",
                hint="method: ofa, or vkd",
            )
        self.heads = int(block.attn.num_heads)
        layer.register_forward_hook(self._listen)
        places = [abs(math.log(t.grid[0] / its.grid[0])) for t in student.taps]
        mine = student.taps[places.index(min(places))]
        self.taps = places.index(min(places)), its
        parts = {
            "attention": QueryKeyValue(mine.channels, its.channels),
            "tokens": GroupLinear(mine.channels, its.grid, its.channels, self.config.dropout),
        }
        self.projectors = nn.ModuleDict(parts)
        return self.projectors  # type: ignore[no-any-return]

    def _listen(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        self.seen[:] = [output]

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        import torch
        from torch.nn import functional as F

        from edgekd.models.taps import patch_tokens

        if self.taps is None:
            raise RuntimeError("setup comes first")
        (place, its), cfg = self.taps, self.config
        features = _sized(batch.student.taps[place], its.grid)
        told = self.seen[0][:, its.prefix :].float().clone()  # a clone is an ordinary tensor, which the backward pass may keep
        teacher = told.chunk(3, dim=-1)
        student = self.projectors["attention"](features)
        crossed = [torch.where(torch.rand_like(t) < cfg.crossed, t, s) for s, t in zip(student, teacher, strict=True)]
        pca = attention_loss(*([_split(x, self.heads) for x in parts] for parts in (student, teacher, crossed)))
        tokens = F.mse_loss(self.projectors["tokens"](features), patch_tokens(batch.teacher.taps[-1], its))
        return {"attention": cfg.attention * pca, "tokens": cfg.tokens * tokens}


def _split(tokens: Tensor, heads: int) -> Tensor:
    batch, positions, width = tokens.shape
    return tokens.reshape(batch, positions, heads, width // heads).transpose(1, 2)


def _sized(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map (batch, c, h, w) at another size: averaged where it is larger, interpolated where it is smaller."""
    from torch.nn import functional as F

    if features.shape[-2] >= grid[0] and features.shape[-1] >= grid[1]:
        return F.adaptive_avg_pool2d(features, grid)
    return F.interpolate(features, grid, mode="bilinear", align_corners=False)
