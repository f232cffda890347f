"""Two nodes by one encoder, and what their product says of a link: the shape of every model of link prediction.

Source: Guo et al., Linkless Link Prediction via Relational Distillation, ICML 2023, section 2, and the authors' code: two layers over the elementwise product of
both embeddings. Two logits here, whose difference is that code's one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch.nn import Module


class Pair(nn.Module):
    """Rows of two nodes side by side (pairs, 2 x features) -> logits (pairs, 2): no link, link. An encoder of a graph is asked by `encoded` instead."""

    def __init__(self, encoder: Module, width: int, classes: int, dropout: float):
        super().__init__()
        self.encoder: Any = encoder
        self.hidden, self.classifier = nn.Linear(width, width), nn.Linear(width, classes)
        self.dropout = dropout

    def scored(self, a: Tensor, b: Tensor) -> Tensor:
        """Logits (pairs, 2) of two embeddings (pairs, width)."""
        found: Tensor = self.classifier(F.dropout(F.relu(self.hidden(a * b)), self.dropout, self.training))
        return found

    def forward(self, pairs: Tensor) -> Tensor:
        a, b = pairs.chunk(2, dim=1)
        return self.scored(self.encoder(a), self.encoder(b))
