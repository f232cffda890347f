"""Each layer averages over neighbours, weighed by both degrees.

Source: Kipf and Welling, Semi-Supervised Classification with Graph Convolutional Networks, ICLR 2017, equation 2. Layers: torch_geometric's GCNConv.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from edgekd.models.architectures._architecture import LayersConfig
from edgekd.registry import register

if TYPE_CHECKING:
    from torch import nn


@register("architecture")
class Gcn:
    Config = LayersConfig
    looks_at: Literal["rows", "graph"] = "graph"

    def create(self, config: LayersConfig, features: int, classes: int) -> nn.Module:
        from edgekd.models.architectures._edges import symmetric
        from edgekd.models.architectures._layers import GCNConv
        from edgekd.models.architectures._stack import GraphStack, widths

        return GraphStack([GCNConv(a, b, normalize=False) for a, b in widths(config, features, classes)], config, symmetric)
