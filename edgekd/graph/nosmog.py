"""Answers as they are, answers to features pushed where they hurt most, and which nodes the teacher holds alike; best with positions beside the features.

When: where an MLP over features alone falls short of its teacher; `data.positions` then tells it where a node lies (the paper's first part), and whoever asks the
shipped model must know a node, or neighbours of it. Without positions it needs no neighbours, like the others.
Source: Tian, Zhang, Guo, Zhang, Chawla, Learning MLPs on Graphs, ICLR 2023, equations 5 to 9, and the authors' code: adversarial features by five steps of PGD,
each a quarter of the bound; the student's hidden layer goes through a linear layer, ReLU and dropout before its products are compared, the teacher's is as it is
before its ReLU. Their default leaves the labels out, and batches hold 512 nodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from edgekd.graph._distiller import GraphDistillConfig
from edgekd.registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgekd.graph._distiller import NodeBatch, Teaching

_STEPS = 5


class NosmogConfig(GraphDistillConfig):
    temperature: float = Field(1.0, gt=0, le=100, description="of both softmaxes")
    bound: float = Field(0.04, ge=0, description="how far each feature may be pushed (epsilon)")
    adversarial: float = Field(0.1, ge=0, description="weight of the answers to pushed features")
    similarity: float = Field(0.1, ge=0, description="weight of which nodes are held alike (mu)")


@register("graph_distill")
class Nosmog:
    Config = NosmogConfig
    needs = frozenset({"inside", "features", "hidden"})

    def __init__(self, config: NosmogConfig):
        self.config = config

    def setup(self, teaching: Teaching) -> nn.Module:
        from torch import nn

        if teaching.hidden is None:
            raise ValueError("nosmog needs the teacher's hidden layer")
        self.hidden = teaching.hidden
        width = teaching.student_width
        self.project = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(teaching.student_dropout))
        return self.project

    def terms(self, batch: NodeBatch) -> dict[str, Tensor]:
        from edgekd.graph._kl import kl

        config, own, nodes = self.config, batch.own, batch.nodes[: batch.own]
        if batch.hidden is None or batch.features is None or batch.ask is None:
            raise ValueError("nosmog looks inside the student, and asks it")
        theirs, share = batch.teacher[nodes], 1 - config.label_weight
        terms = {"kd": share * kl(theirs, batch.student[:own], config.temperature)}
        if config.adversarial:
            pushed = self._pushed(batch.features, theirs, batch)
            terms["adversarial"] = share * config.adversarial * kl(theirs, batch.ask(pushed), config.temperature)
        if config.similarity:
            mine, hidden = self.project(batch.hidden[:own]), self.hidden.to(nodes.device)[nodes]
            terms["similarity"] = share * config.similarity * (hidden @ hidden.T - mine @ mine.T).square().mean()
        return terms

    def _pushed(self, x: Tensor, theirs: Tensor, batch: NodeBatch) -> Tensor:
        """Features within the bound, moved up the loss from a random start."""
        import torch

        from edgekd.graph._kl import kl

        bound = self.config.bound
        delta = (torch.rand_like(x) * 2 - 1) * bound
        for _ in range(_STEPS):
            delta = delta.requires_grad_()
            loss = kl(theirs, batch.ask(x + delta), self.config.temperature)  # type: ignore[misc]
            (gradient,) = torch.autograd.grad(loss, delta)
            delta = (delta.detach() + bound / 4 * gradient.sign()).clamp(-bound, bound)
        return x + delta
