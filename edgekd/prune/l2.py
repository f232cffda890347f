"""L2 magnitude: the squared weights of a unit, over all tensors of its group.

Source: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, summed over groups as in DepGraph, CVPR 2023.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekd.prune._score import CriterionConfig, combine
from edgekd.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from edgekd.prune._group import Group


@register("criterion")
class L2:
    """sum w^2 over the slice of each member."""

    class Config(CriterionConfig):
        """Settings of l2."""

    needs = frozenset({"weights"})

    def __init__(self, config: Config):
        self.config = config

    def score(self, group: Group) -> Tensor | None:
        """(units,) in float64; None for a group without weights."""
        slices = [weight for member in group.members if (weight := member.slices()) is not None]
        return combine([weight.double().square().sum(1) for weight in slices], self.config, group.name)
