"""The module of `vqgcn`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.models.architectures._edges import symmetric
from edgekd.models.architectures._layers import GCNConv

if TYPE_CHECKING:
    from edgekd.models.architectures.vqgcn import VqGcnConfig


class Codebook(nn.Module):
    """Unit vectors (codes, width); each follows the mean direction of the rows that chose it."""

    codes: Tensor

    def __init__(self, codes: int, width: int, decay: float):
        super().__init__()
        start = torch.empty(codes, width)
        nn.init.kaiming_uniform_(start)
        self.register_buffer("codes", F.normalize(start, dim=1))
        self.decay = decay

    def nearness(self, x: Tensor) -> Tensor:
        """(rows, codes) cosines."""
        return F.normalize(x, dim=1) @ F.normalize(self.codes, dim=1).T

    def forward(self, x: Tensor) -> Tensor:
        """The nearest code of each row, (rows, width); in training its gradient is that of the row, and the codes move afterwards."""
        with torch.no_grad():
            chosen = self.nearness(x).argmax(1)
            found = self.codes[chosen]
            if self.training:
                self._follow(F.normalize(x, dim=1), chosen)
        return x + (found - x).detach() if self.training else found

    def _follow(self, rows: Tensor, chosen: Tensor) -> None:
        used, place = torch.unique(chosen, return_inverse=True)
        sums = torch.zeros(len(used), rows.shape[1], dtype=rows.dtype, device=rows.device).index_add_(0, place, rows)
        means = F.normalize(sums / place.bincount(minlength=len(used)).unsqueeze(1), dim=1)
        codes = F.normalize(self.codes, dim=1)
        codes[used] = means
        self.codes.lerp_(codes, 1 - self.decay)


class Tokenizer(nn.Module):
    """Takes features (nodes, features) and what `edges` gives; says logits (nodes, classes)."""

    def __init__(self, config: VqGcnConfig, features: int, classes: int):
        super().__init__()
        width = config.width or features
        self.body = nn.ModuleList([GCNConv(features, width, normalize=False), GCNConv(width, config.hidden, normalize=False)])
        self.codebook = Codebook(config.codes, width, config.decay)
        self.to_edges, self.to_node = nn.Linear(width, width), nn.Linear(width, width)
        self.classifier = nn.Linear(config.hidden, classes)
        self.dropout, self.weights = config.dropout, (config.commitment, config.node, config.edge)
        self._terms: dict[str, Tensor] = {}

    def edges(self, indptr: Any, neighbours: Any) -> Tensor:
        return symmetric(indptr, neighbours)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self._first(x, edges)
        code = self.codebook(h)
        between = self.to_edges(code)
        if self.training:
            commitment, node, edge = self.weights
            self._terms = {
                "commitment": commitment * F.mse_loss(h, code.detach()),
                "node": node * F.mse_loss(self.to_node(code), h),
                "edge": edge * _edge_loss(between, edges),
            }
        found: Tensor = self.classifier(F.relu(self.body[1](between, edges)))
        return found

    def own_terms(self) -> dict[str, Tensor]:
        """Weighted loss terms of the latest pass in training."""
        found, self._terms = self._terms, {}
        return found

    def tokens(self, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines of each node to each code (nodes, codes), and the codebook (codes, width)."""
        self.eval()
        with torch.no_grad():
            return self.codebook.nearness(self._first(x, edges)), self.codebook.codes.clone()

    def _first(self, x: Tensor, edges: Tensor) -> Tensor:
        return F.dropout(F.relu(self.body[0](x, edges)), self.dropout, self.training)


def _edge_loss(rows: Tensor, edges: Tensor) -> Tensor:
    """Root of the mean squared difference between the adjacency, loops included, and products of rows, scaled to [0, 1]."""
    products = rows @ rows.T
    low, high = products.min(), products.max()
    scaled = (products - low) / (high - low).clamp(min=torch.finfo(products.dtype).tiny)
    counts = edges.crow_indices().diff()
    start = torch.repeat_interleave(torch.arange(len(counts), device=rows.device), counts)
    there = torch.zeros_like(products).index_put_((start, edges.col_indices()), torch.ones((), dtype=rows.dtype, device=rows.device))
    return F.mse_loss(scaled, there).sqrt()
