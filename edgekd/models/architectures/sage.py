"""Each layer averages over the neighbourhood. Two kinds, and papers mean either.

`gcn`: one weight over (A + 2I) / (d + 2), the node itself counted twice: what DGL's SAGEConv("gcn") computes on a graph that has loops already, and so what the
tables of GLNN, FF-G2M, KRD, NOSMOG and VQGraph call SAGE. `mean`: a weight for the node and another for the mean of its neighbours: the paper's, and
torch_geometric's SAGEConv. Source: Hamilton, Ying, Leskovec, Inductive Representation Learning on Large Graphs, NeurIPS 2017, algorithm 1 and equation 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from edgekd.models.architectures._architecture import LayersConfig
from edgekd.registry import register

if TYPE_CHECKING:
    from torch import nn


class SageConfig(LayersConfig):
    kind: Literal["gcn", "mean"] = Field(
        "gcn", description="gcn: one weight, as in the tables of GNN-to-MLP papers; mean: the paper's, two weights"
    )


@register("architecture")
class Sage:
    Config = SageConfig
    looks_at: Literal["rows", "graph"] = "graph"

    def create(self, config: SageConfig, features: int, classes: int) -> nn.Module:
        from functools import partial

        from edgekd.models.architectures._edges import mean
        from edgekd.models.architectures._layers import GCNConv, MeanConv
        from edgekd.models.architectures._stack import GraphStack, widths

        one = config.kind == "gcn"
        layers = [GCNConv(a, b, normalize=False) if one else MeanConv(a, b) for a, b in widths(config, features, classes)]
        return GraphStack(layers, config, partial(mean, own=2 if one else 0))
