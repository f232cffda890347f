"""Training-only attention between a student's map and a teacher's tokens: ScaleKD's projector, and CAKD's two. Dropped before export."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_GROUP = 4  # tokens on a side that share one linear layer (CAKD)


class CrossAttentionProjector(nn.Module):
    """A student's map (batch, c_s, h_s, w_s) -> tokens (batch, positions, width) in a teacher's place: learned queries, or given ones, look at the map.

    Source: ScaleKD, section 3.1 and `AttentionProjector` of the authors' code: the softmax is sharpened by `sharpness`.
    """

    def __init__(
        self, channels: int, grid: tuple[int, int], width: int, positions: int, heads: int, sharpness: float, *, own_queries: bool
    ):
        super().__init__()
        self.heads, self.scale = heads, sharpness * (width // heads) ** -0.5
        self.map = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.places = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, channels, *grid), std=0.02))
        self.queries = nn.Parameter(torch.randn(positions, width)) if own_queries else None
        self.before = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(channels, width), nn.Linear(channels, width)
        self.out, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, features: Tensor, queries: Tensor | None = None) -> Tensor:
        """`queries` (batch, positions, width): in place of the learned ones."""
        seen = (self.map(features) + self.places).flatten(2).transpose(1, 2)
        asked = queries if self.queries is None else self.queries.expand(len(features), -1, -1)
        if asked is None:
            raise RuntimeError("this projector has no queries of its own")
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.q, self.before(asked)), (self.k, seen), (self.v, seen))
        )
        found = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)
        tokens = self.norm(self.out(found))
        given: Tensor = tokens + self.ffn(tokens)
        return given


class QueryKeyValue(nn.Module):
    """A student's map (batch, c, h, w) -> queries, keys and values (batch, h * w, width) each, by a 3 x 3 convolution."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(channels, width, 3, padding=1) for _ in range(3)])

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (conv(features).flatten(2).transpose(1, 2) for conv in self.convs)
        return q, k, v


class GroupLinear(nn.Module):
    """A student's map (batch, c, h, w) -> tokens (batch, h * w, width): neighbourhoods of 4 x 4 positions share one linear layer."""

    def __init__(self, channels: int, grid: tuple[int, int], width: int, dropout: float):
        super().__init__()
        rows, columns = (torch.arange(n) // _GROUP for n in grid)
        groups = (rows[:, None] * (int(columns[-1]) + 1) + columns).flatten()
        self.members = [torch.nonzero(groups == g).flatten() for g in range(int(groups[-1]) + 1)]
        self.layers = nn.ModuleList([nn.Linear(channels, width) for _ in self.members])
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        tokens = features.flatten(2).transpose(1, 2)
        order = torch.cat(self.members).argsort().to(tokens.device)
        found = torch.cat([layer(tokens[:, at.to(tokens.device)]) for layer, at in zip(self.layers, self.members, strict=True)], dim=1)
        given: Tensor = self.dropout(found[:, order])
        return given
