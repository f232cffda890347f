"""torch_geometric's layers, without what its import says of torch's own deprecations."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch_geometric.nn import GATConv, GCNConv, SAGEConv

__all__ = ["GATConv", "GCNConv", "MeanConv"]


class MeanConv(SAGEConv):  # type: ignore[misc]
    """SAGEConv over edges whose rows sum to 1, so that its sum is the mean; it aggregates before it multiplies, so rows must be dense."""

    def __init__(self, features: int, out: int):
        super().__init__(features, out, aggr="sum")

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        found: Tensor = super().forward(x if x.layout == torch.strided else x.to_dense(), edges)
        return found
