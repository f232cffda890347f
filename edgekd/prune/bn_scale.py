"""BatchNorm scale: a channel that its BatchNorm multiplies by little matters least; meant for nets trained with an L1 penalty on it.

Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekd.prune._score import CriterionConfig, combine
from edgekd.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from edgekd.prune._group import Group


@register("criterion")
class BnScale:
    """|gamma| of the BatchNorm layers on the width."""

    class Config(CriterionConfig):
        """Settings of bn_scale."""

    needs = frozenset({"weights"})

    def __init__(self, config: Config):
        self.config = config

    def score(self, group: Group) -> Tensor | None:
        """(units,) in float64; None for a group without BatchNorm, which then keeps its width."""
        from torch.nn.modules.batchnorm import _BatchNorm  # heavy: methods are listed without torch

        norms = [member for member in group.members if isinstance(member.owner, _BatchNorm)]
        scales = [scale.double().abs().sum(1) for member in norms if (scale := member.slices()) is not None]
        return combine(scales, self.config, group.name)
