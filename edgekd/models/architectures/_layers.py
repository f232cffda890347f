"""torch_geometric's layers, without what its import says of torch's own deprecations."""

from __future__ import annotations

import warnings

from torch import Tensor
from torch.nn import functional as F

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch_geometric.nn import GATConv, GCNConv, SAGEConv

__all__ = ["GATConv", "GCNConv", "MeanConv"]


class MeanConv(SAGEConv):  # type: ignore[misc]
    """SAGEConv over edges whose rows sum to 1, so that its sum is the mean; it multiplies before it aggregates, so that rows may be sparse and get narrow."""

    def __init__(self, features: int, out: int):
        super().__init__(features, out, aggr="sum")

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        found: Tensor = edges @ F.linear(x, self.lin_l.weight) + self.lin_l.bias + F.linear(x, self.lin_r.weight)
        return found
