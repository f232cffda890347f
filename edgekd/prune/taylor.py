"""First-order Taylor: how much the loss is expected to move when a unit is set to zero.

Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, summed over groups as in DepGraph, CVPR 2023.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from edgekd.errors import UsageError
from edgekd.prune._score import CriterionConfig, combine
from edgekd.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from edgekd.prune._group import Group, Member


@register("criterion")
class Taylor:
    """sum |w g| over the slice of each member, BatchNorm scales included; g: gradients accumulated by `collect_gradients`."""

    class Config(CriterionConfig):
        """Settings of taylor."""

        signed: bool = Field(False, description="let opposite contributions inside one tensor cancel: |sum w g| in place of sum |w g|")

    needs = frozenset({"weights", "grads"})

    def __init__(self, config: Config):
        self.config = config

    def score(self, group: Group) -> Tensor | None:
        """(units,) in float64; None for a group without weights. Raises UsageError where gradients were not collected."""
        return combine([change for member in group.members if (change := self._change(member)) is not None], self.config, group.name)

    def _change(self, member: Member) -> Tensor | None:
        weight, grad = member.slices(), member.slices(grad=True)
        if weight is None:
            return None
        if grad is None:
            raise UsageError(
                "there is no gradient to score with",
                where=member.name,
                expected="gradients on every weight",
                hint="unfreeze the layer or use criterion l1",
            )
        product = weight.double() * grad.double()
        return product.sum(1).abs() if self.config.signed else product.abs().sum(1)
