"""Random units: the control that every other criterion has to beat.

Source: none; the baseline of Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, section 4.4.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

from pydantic import Field

from edgekd.prune._score import CriterionConfig, combine
from edgekd.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from edgekd.prune._group import Group

_SEED_BYTES = 8


@register("criterion")
class Random:
    """U(0, 1), drawn from the seed and the name of the group alone."""

    class Config(CriterionConfig):
        """Settings of random."""

        seed: int = Field(0, ge=0, description="seed of the draw")

    needs: frozenset[str] = frozenset()

    def __init__(self, config: Config):
        self.config = config

    def score(self, group: Group) -> Tensor | None:
        """(units,) in float64."""
        import torch  # heavy: methods are listed without torch

        seed = sha256(f"{self.config.seed}/{group.name}".encode()).digest()[:_SEED_BYTES]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1)
        return combine([torch.rand(group.width, generator=generator, dtype=torch.float64)], self.config, group.name)
