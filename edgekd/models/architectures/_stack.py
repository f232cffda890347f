"""Layers in a row with norm, ReLU and dropout between them: what all architectures of nodes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from edgekd.models.architectures._architecture import LayersConfig


def widths(config: LayersConfig, features: int, classes: int) -> list[tuple[int, int]]:
    """(in, out) of each layer."""
    inner = [config.hidden] * (config.layers - 1)
    return list(zip([features, *inner], [*inner, classes], strict=True))


def dropped(x: Tensor, share: float) -> Tensor:
    """Dropout of features, dense or sparse by rows: what is 0 stays 0 either way."""
    if x.layout == torch.strided:
        return F.dropout(x, share)
    return torch.sparse_csr_tensor(x.crow_indices(), x.col_indices(), F.dropout(x.values(), share), size=x.shape, check_invariants=False)


class Stack(nn.Module):
    """Layers over rows (rows, features), dense or sparse. All but the last are in `body`, each with its norm; the last is `classifier`."""

    def __init__(self, layers: Sequence[nn.Module], config: LayersConfig):
        super().__init__()
        *body, self.classifier = layers
        make = {"none": nn.Identity, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}[config.norm]
        self.body = nn.ModuleList(body)
        self.norms = nn.ModuleList(make(config.hidden) if config.norm != "none" else make() for _ in body)
        self.dropout = config.dropout

    def forward(self, x: Tensor, *edges: Tensor) -> Tensor:
        """Logits (rows, classes)."""
        for layer, norm in zip(self.body, self.norms, strict=True):
            x = F.dropout(F.relu(norm(layer(x, *edges))), self.dropout, self.training)
        found: Tensor = self.classifier(x, *edges)
        return found


class GraphStack(Stack):
    """Layers over a graph: each takes rows and edges, which `edges_by` makes of an adjacency."""

    def __init__(
        self, layers: Sequence[nn.Module], config: LayersConfig, edges_by: Callable[[Any, Any], Tensor], feature_dropout: float = 0.0
    ):
        super().__init__(layers, config)
        self._edges_by, self.feature_dropout = edges_by, feature_dropout

    def forward(self, x: Tensor, *edges: Tensor) -> Tensor:
        """Logits (rows, classes)."""
        return super().forward(dropped(x, self.feature_dropout) if self.training and self.feature_dropout else x, *edges)

    def edges(self, indptr: Any, neighbours: Any) -> Tensor:
        """What `forward` needs of the edges, made once."""
        return self._edges_by(indptr, neighbours)
