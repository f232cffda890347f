"""Link prediction: how likely a node's surroundings and random nodes are to be linked to it, as a distribution and in their order, is as the teacher has it.

When: `task: link_prediction`. Its weights matter and depend on the graph: the authors search all three from 0.001 to 1000 on val.
Source: Guo, Shiao, Zhang, Liu, Chawla, Shah, Zhao, Linkless Link Prediction via Relational Distillation, ICML 2023, equations 4 to 6, and the authors' code: the
softmax is over probabilities, not logits; a node's context are the nodes on a few short walks from it, with repeats, and as many random ones; every two of a
context are compared, and two that the teacher holds closer than the margin should be no further apart than that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from edgekd.graph._distiller import GraphDistillConfig
from edgekd.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from edgekd.graph._distiller import LinkBatch
    from edgekd.graph._links import LinkTeacher


class LlpConfig(GraphDistillConfig):
    label_weight: float = Field(0.1, ge=0, description="weight of the label loss")
    distribution: float = Field(1.0, ge=0, description="weight of the distribution over a context")
    rank: float = Field(1.0, ge=0, description="weight of its order")
    margin: float = Field(0.1, gt=0, lt=1, description="by how much two of a context differ")
    walks: int = Field(3, ge=1, le=100, description="walks from each node")
    hops: int = Field(2, ge=1, le=10, description="steps of a walk")
    random: int = Field(1, ge=1, le=100, description="random nodes for each of a walk")


@register("graph_distill")
class Llp:
    Config = LlpConfig
    needs: frozenset[str] = frozenset()
    of_pairs = True

    def __init__(self, config: LlpConfig):
        self.config = config

    def setup(self, teacher: LinkTeacher) -> None:
        """Nothing is kept beside the student."""

    def terms(self, batch: LinkBatch) -> dict[str, Tensor]:
        import torch
        from torch.nn import functional as F

        from edgekd.graph._kl import kl

        config, mine, theirs = self.config, batch.student, batch.teacher
        found = {"distribution": config.distribution * kl(theirs, mine, 1.0)}
        one, two = torch.combinations(torch.arange(mine.shape[1], device=mine.device)).T
        ahead = theirs[:, one] - theirs[:, two]
        order = (ahead > config.margin).to(mine.dtype) - (ahead < -config.margin).to(mine.dtype)
        found["rank"] = config.rank * F.margin_ranking_loss(mine[:, one], mine[:, two], order, margin=config.margin)
        return found
