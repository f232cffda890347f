"""A node's own teacher answer is its target.

When: first; on dense co-purchase graphs it is as good as any of the others.
Source: Zhang, Liu, Sun, Shah, Graph-less Neural Networks, ICLR 2022, equation 1; the authors' code has temperature 1 and no factor T^2. One step on the sum of
both losses here, where that code makes a step for each in turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from edgekd.graph._distiller import GraphDistillConfig
from edgekd.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from edgekd.graph._distiller import NodeBatch, Teaching


class GlnnConfig(GraphDistillConfig):
    temperature: float = Field(1.0, gt=0, le=100, description="of both softmaxes")


@register("graph_distill")
class Glnn:
    Config = GlnnConfig
    needs: frozenset[str] = frozenset()

    def __init__(self, config: GlnnConfig):
        self.config = config

    def setup(self, teaching: Teaching) -> None:
        return None

    def terms(self, batch: NodeBatch) -> dict[str, Tensor]:
        from edgekd.graph._kl import kl

        mine, theirs = batch.student[: batch.own], batch.teacher[batch.nodes[: batch.own]]
        return {"kd": (1 - self.config.label_weight) * kl(theirs, mine, self.config.temperature)}
