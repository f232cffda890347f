"""Neighbours' answers are targets as well (low frequencies), and how answers differ along an edge is imitated (high frequencies).

When: citation graphs, where neighbours agree; nearly all of its gain is the low part.
Source: Wu, Lin, Huang, Fan, Li, Extracting Low-/High-Frequency Knowledge from Graph Neural Networks and Injecting it into MLPs, AAAI 2023, equations 8 and 9; as in
the authors' code, the low part is the mean over all edges and a loop at every node, the high part over the edges, of softmaxes of absolute differences of logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from edgekd.graph._distiller import GraphDistillConfig
from edgekd.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from edgekd.graph._distiller import NodeBatch, Teaching


class Ffg2mConfig(GraphDistillConfig):
    temperature: float = Field(1.5, gt=0, le=100, description="of the differences along an edge (tau)")
    low: float = Field(1.0, ge=0, description="weight of the low-frequency term")
    high: float = Field(1.0, ge=0, description="weight of the high-frequency term")


@register("graph_distill")
class Ffg2m:
    Config = Ffg2mConfig
    needs = frozenset({"edges", "ends"})

    def __init__(self, config: Ffg2mConfig):
        self.config = config

    def setup(self, teaching: Teaching) -> None:
        return None

    def terms(self, batch: NodeBatch) -> dict[str, Tensor]:
        import torch

        from edgekd.graph._kl import kl

        if batch.edges is None or batch.ends is None:
            raise ValueError("ffg2m reads edges and their ends")
        share, (rows, others) = 1 - self.config.label_weight, batch.edges
        loops = torch.arange(batch.own, device=rows.device)
        readers, read = torch.cat([rows, loops]), torch.cat([others, batch.nodes[: batch.own]])
        found = {"low": share * self.config.low * kl(batch.teacher[read], batch.student[readers], 1.0)}
        if len(rows):
            theirs = (batch.teacher[batch.nodes[rows]] - batch.teacher[others]).abs()
            mine = (batch.student[rows] - batch.student[batch.ends]).abs()
            found["high"] = share * self.config.high * kl(theirs, mine, self.config.temperature)
        return found
