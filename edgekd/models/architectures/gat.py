"""Each layer weighs neighbours by learned attention.

Source: Velickovic et al., Graph Attention Networks, ICLR 2018, equations 1 to 6. Layers: torch_geometric's GATConv. The last layer has one head, as in the
code of GLNN, FF-G2M and KRD.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from edgekd.models.architectures._architecture import LayersConfig
from edgekd.registry import register

if TYPE_CHECKING:
    from torch import nn

_SLOPE = 0.2


class GatConfig(LayersConfig):
    heads: int = Field(4, ge=1, le=64, description="attention heads; `hidden` is shared between them")
    attention_dropout: float = Field(0.3, ge=0, lt=1, description="of attention weights while training")
    feature_dropout: float = Field(
        0.0, ge=0, lt=1, description="of the features; in the code of GLNN, FF-G2M and KRD as much as between layers"
    )

    @model_validator(mode="after")
    def _shares(self) -> GatConfig:
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")
        return self


@register("architecture")
class Gat:
    Config = GatConfig
    looks_at: Literal["rows", "graph"] = "graph"

    def create(self, config: GatConfig, features: int, classes: int) -> nn.Module:
        from edgekd.models.architectures._edges import listed
        from edgekd.models.architectures._layers import GATConv
        from edgekd.models.architectures._stack import GraphStack, widths

        *body, last = widths(config, features, classes)
        how = {"negative_slope": _SLOPE, "dropout": config.attention_dropout, "add_self_loops": False}
        layers = [GATConv(a, b // config.heads, config.heads, **how) for a, b in body]
        return GraphStack([*layers, GATConv(*last, 1, **how)], config, listed, config.feature_dropout)
