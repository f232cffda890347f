"""Which codes of the teacher's codebook a node is near to, beside the teacher's answers: a code stands for what a neighbourhood looks like.

When: with a teacher that tokenizes (`vqgcn`). The weight of the tokens is 1e-8 in the authors' script, which is as good as nothing: what their code then gains over
`glnn` is its other teacher's. Set `tokens` and judge on val.
Source: Yang et al., VQGraph, ICLR 2024, equations 6 and 7, and the authors' code: nearness is the cosine on the teacher's side and minus the distance of a linear
projection of the student's last hidden layer on the student's; softmaxes at temperature 4, times its square. One step on the sum of the losses here, where that
code makes a step for each in turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from edgekd.graph._distiller import GraphDistillConfig
from edgekd.registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgekd.graph._distiller import NodeBatch, Teaching


_TINY = 1e-12  # a squared distance below has no gradient


class VqgraphConfig(GraphDistillConfig):
    tokens: float = Field(1e-8, ge=0, description="weight of the code assignments")
    token_temperature: float = Field(4.0, gt=0, le=100, description="of both assignments")
    temperature: float = Field(1.0, gt=0, le=100, description="of both softmaxes over classes")


@register("graph_distill")
class Vqgraph:
    Config = VqgraphConfig
    needs = frozenset({"inside", "tokens"})

    def __init__(self, config: VqgraphConfig):
        self.config = config

    def setup(self, teaching: Teaching) -> nn.Module:
        from torch import nn

        if teaching.nearness is None or teaching.codebook is None:
            raise ValueError("vqgraph needs the teacher's codebook")
        said = (teaching.nearness / self.config.token_temperature).log_softmax(1)
        self.assigned, self.certainty = said.exp(), (said.exp() * said).sum(1)  # the same at every step
        self.codebook = teaching.codebook
        self.project = nn.Linear(teaching.student_width, self.codebook.shape[1])
        return self.project

    def terms(self, batch: NodeBatch) -> dict[str, Tensor]:
        from edgekd.graph._kl import kl

        config, nodes = self.config, batch.nodes[: batch.own]
        if batch.embedding is None:
            raise ValueError("vqgraph looks inside the student")
        theirs, share = batch.teacher[nodes], 1 - config.label_weight
        terms = {"kd": share * kl(theirs, batch.student[: batch.own], config.temperature)}
        if config.tokens:
            terms["tokens"] = share * config.tokens * self._tokens(batch.embedding[: batch.own], nodes)
        return terms

    def _tokens(self, embedding: Tensor, nodes: Tensor) -> Tensor:
        """Mean divergence of the student's assignments from the teacher's, times the square of the temperature."""
        t, codebook = self.config.token_temperature, self.codebook.to(nodes.device)
        place, weight, bias = self.project(embedding), self.project.weight, self.project.bias
        products = embedding @ (codebook @ weight).T + codebook @ bias  # of place and codes, by way of the smaller of both spaces
        squares = place.square().sum(1, keepdim=True) - 2 * products + codebook.square().sum(1)
        mine = -squares.clamp(min=_TINY).sqrt() / t
        assigned, certainty = self.assigned.to(nodes.device)[nodes], self.certainty.to(nodes.device)[nodes]
        found: Tensor = t * t * (certainty - (assigned * mine).sum(1) + mine.logsumexp(1)).mean()
        return found
