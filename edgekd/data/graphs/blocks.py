"""A generated graph with a known answer: communities with more edges inside than between, and features that only hint at the community.

A stochastic block model (Holland, Laskey, Leinhardt, Stochastic Blockmodels: First Steps, 1983). One node's features leave many communities possible, those of
its neighbours together do not: what a graph model knows more than a model of single rows, and what a student must learn from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.data.nodes_config import GraphConfig
from edgekd.registry import register

if TYPE_CHECKING:
    from edgekd.data.nodes import Raw

_CLASSES, _EACH, _WIDTH = 4, 300, 32
_INSIDE, _OUTSIDE = 6.0, 2.0  # edges of a node on average, to its own community and to all others
_HINT = 0.7  # length of a community's mean in deviations of the noise, along each of its own features


@register("graph")
class Blocks:
    """Needs no root; always the same graph, and splits by seed."""

    def files(self, cfg: GraphConfig) -> dict[str, Path]:
        return {}

    def read(self, cfg: GraphConfig) -> Raw:
        import numpy as np

        from edgekd.data.nodes import Raw

        rng, nodes = np.random.default_rng(0), _CLASSES * _EACH
        labels = rng.permutation(np.repeat(np.arange(_CLASSES), _EACH))
        x = rng.standard_normal((nodes, _WIDTH))
        own = np.arange(_WIDTH) % _CLASSES == labels[:, None]
        same = labels[:, None] == labels
        chance = np.where(same, _INSIDE / _EACH, _OUTSIDE / (nodes - _EACH))
        edges = np.argwhere(np.triu(rng.random((nodes, nodes)) < chance, 1)).T
        return Raw((x + _HINT * own).astype(np.float32), np.hstack([edges, edges[::-1]]), labels, tuple("0123"), "blocks")
