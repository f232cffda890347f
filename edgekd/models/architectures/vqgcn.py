"""Two layers that average over neighbours, with a codebook between them: every neighbourhood is replaced by the code that is nearest to it.

The teacher of `vqgraph`. While it trains, codes follow the nodes that chose them, and three losses of its own come to the labels': the code is near to the node,
and what is decoded from it gives back the node and the edges. Edges are compared for every pair, so memory grows with the square of the nodes of a step.
Source: Yang et al., VQGraph, ICLR 2024, equations 1 to 5, and the authors' code, whose codebook is a cosine one with moving averages (van den Oord et al. 2017,
appendix A.1) of decay 0.8, where unused codes stay; its layers have as many units as there are features until the last hidden one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from edgekd.models.architectures._architecture import LayersConfig
from edgekd.registry import register

if TYPE_CHECKING:
    from torch import nn


class VqGcnConfig(LayersConfig):
    layers: Literal[2] = Field(2, description="how many layers: two")
    norm: Literal["none"] = Field("none", description="there is none")
    width: int = Field(0, ge=0, le=65_536, description="units of the tokenized layer; 0: as many as there are features")
    codes: int = Field(5000, ge=2, le=1_000_000, description="entries of the codebook")
    decay: float = Field(0.8, ge=0, lt=1, description="of the moving average of a code")
    commitment: float = Field(0.25, ge=0, description="weight of how near a node's code is")
    node: float = Field(0.001, ge=0, description="weight of the nodes that are decoded")
    edge: float = Field(0.03, ge=0, description="weight of the edges that are decoded")


@register("architecture")
class VqGcn:
    Config = VqGcnConfig
    looks_at: Literal["rows", "graph"] = "graph"
    tokenizes = True  # its module has `tokens`

    def create(self, config: VqGcnConfig, features: int, classes: int) -> nn.Module:
        from edgekd.models.architectures._tokenizer import Tokenizer

        return Tokenizer(config, features, classes)
