"""Quantized distillation: weights of a few bits in buckets, rounded in every forward pass while the student trains with the teacher's loss.

When: flash or download size is the limit and `weight_only` (8 bits) is not small enough. Cost: a training run. The file holds indices and a table; the
runtime makes fp32 weights of them when it loads the file, so memory and latency stay as they were.
Source: Polino et al. 2018 (arXiv 1802.05668), section 3; antspy/quantized_distillation. Batch norms and biases stay in fp32 (in buckets of their own
they cost most of the accuracy), the gradient goes straight through.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from edgekd.quantize._codebook import Codebook
from edgekd.quantize._learned import LearnedConfig, Seen
from edgekd.registry import register

if TYPE_CHECKING:
    from torch import nn

_EDGE = 8  # bits of the first and the last layer


@register("quantize")
class QD(Codebook):
    """Bucketed uniform weights, trained."""

    class Config(LearnedConfig):
        bits: int = Field(4, ge=1, le=8, description="bits of a weight")
        bucket: int = Field(256, ge=0, le=1_000_000, description="weights that share a range; 0 takes a whole tensor")
        edges: bool = Field(True, description="keep 8 bits in the first and the last layer")
        backward: Literal["straight", "truncated"] = Field(
            "straight", description="truncated clips weights to [-1, 1] and stops their gradient"
        )
        optimizer: Literal["adamw", "sgd"] = Field("sgd", description="AdamW, or SGD with Nesterov momentum")
        lr: float = Field(0.01, gt=0, description="peak learning rate")
        weight_decay: float = Field(2.2e-4, ge=0, description="decay of matrices and kernels")

    def attach(self, model: nn.Module, seen: Seen, flavour: str) -> None:
        """Rounding on every convolution and linear weight; raises InputRefused where there is none."""
        from torch.nn.utils import parametrize

        from edgekd.quantize._attach import sites
        from edgekd.quantize._buckets import Uniform

        found, config = sites(model, seen.batches), self.config
        edges = {found[0].name, found[-1].name} if config.edges else set()
        for site in found:
            bits = max(config.bits, _EDGE) if site.name in edges else config.bits
            quantizer = Uniform(bits, config.bucket or None, config.backward == "truncated")
            parametrize.register_parametrization(site.module, "weight", quantizer)
