"""Zachary's karate club with four communities as classes: 34 nodes, nothing to download. A node's feature is its own number.

Source: Zachary, An Information Flow Model for Conflict and Fission in Small Groups, 1977; the communities and the four training nodes are torch_geometric's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.data.nodes_config import GraphConfig
from edgekd.registry import register

if TYPE_CHECKING:
    from edgekd.data.nodes import Raw


@register("graph")
class Karate:
    """Needs no root. So small that its test metric moves by 6 points with one node: an example, not a measurement."""

    def files(self, cfg: GraphConfig) -> dict[str, Path]:
        return {}

    def read(self, cfg: GraphConfig) -> Raw:
        import warnings

        import numpy as np

        with warnings.catch_warnings():  # its import talks of torch's own deprecations
            warnings.simplefilter("ignore")
            from torch_geometric.datasets import KarateClub

        from edgekd.data.nodes import Raw

        data = KarateClub()[0]
        labels = data.y.numpy().astype(np.int64)
        parts = np.zeros(len(labels), np.int8)
        others = np.flatnonzero(~data.train_mask.numpy())
        parts[others] = 1 + np.arange(len(others)) % 2  # val and test in turn
        return Raw(data.x.numpy(), data.edge_index.numpy().astype(np.int64), labels, tuple("0123"), "karate", parts=parts)
