"""Linear layers over a node's own features. Needs no neighbours: what ships."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from edgekd.models.architectures._architecture import LayersConfig
from edgekd.registry import register

if TYPE_CHECKING:
    from torch import nn


@register("architecture")
class Mlp:
    Config = LayersConfig
    looks_at: Literal["rows", "graph"] = "rows"

    def create(self, config: LayersConfig, features: int, classes: int) -> nn.Module:
        from torch import nn

        from edgekd.models.architectures._stack import Stack, widths

        return Stack([nn.Linear(a, b) for a, b in widths(config, features, classes)], config)
