"""Differentiable quantization: weights stay, the few values that they are rounded to are learned by SGD, with more of them where gradients are large.

When: as `qd`, for a trained model that should not be trained again: only a few numbers a tensor are learned. Cost: a short training run. It shrinks the
file, not the latency (see `qd`).
Source: Polino et al. 2018 (arXiv 1802.05668), section 4; antspy/quantized_distillation: points start at percentiles of the scaled weights, half of them
are shared out equally and the rest by the norm of each tensor's gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from edgekd.quantize._codebook import Codebook
from edgekd.quantize._learned import LearnedConfig, Seen
from edgekd.registry import register

if TYPE_CHECKING:
    from torch import nn

_FEWEST, _MOST = 2, 256  # points of a tensor
_EDGE = 256  # of the first and the last layer


@register("quantize")
class DQ(Codebook):
    """Learned quantization points."""

    class Config(LearnedConfig):
        bits: int = Field(4, ge=1, le=8, description="bits of a weight on average, before bits are shared out")
        bucket: int = Field(256, ge=0, le=1_000_000, description="weights that share a range; 0 takes a whole tensor")
        allocate: bool = Field(True, description="more points where gradients are large; the sum over all tensors stays")
        edges: bool = Field(True, description="256 points in the first and the last layer")
        optimizer: Literal["adamw", "sgd"] = Field("sgd", description="AdamW, or SGD with Nesterov momentum")
        lr: float = Field(1e-5, gt=0, description="peak learning rate of the points")
        weight_decay: float = Field(0.0, ge=0, description="decay of matrices and kernels, of which none is trained")

    def attach(self, model: nn.Module, seen: Seen, flavour: str) -> None:
        """Points on every convolution and linear weight, everything else frozen; raises InputRefused where there is none."""
        from torch.nn.utils import parametrize

        from edgekd.quantize._attach import sites
        from edgekd.quantize._buckets import Points

        found, config = sites(model, seen.batches), self.config
        edges = {found[0].name, found[-1].name} if config.edges else set()
        norms = {n: v for n, v in _gradient_norms(model, seen, [s.name for s in found]).items() if n not in edges}
        equal = dict.fromkeys(norms, 2**config.bits)
        counts = shared_out(norms, 2**config.bits) if config.allocate else equal
        model.requires_grad_(False)
        for site in found:
            count = counts.get(site.name, _EDGE)
            parametrize.register_parametrization(site.module, "weight", Points(site.module.weight, count, config.bucket or None))  # type: ignore[arg-type]

    def bake(self, model: nn.Module) -> dict[str, Any]:
        arrays = super().bake(model)
        model.requires_grad_(True)
        return arrays


def shared_out(norms: Mapping[str, float], each: int) -> dict[str, int]:
    """Points for each tensor: half of `each`, and the other halves by gradient norm; their sum stays, whatever rounding does."""
    if not norms:
        return {}
    total, base = each * len(norms), each / 2
    weight = sum(norms.values()) or 1.0
    counts = {n: min(_MOST, max(_FEWEST, round(base + base * len(norms) * v / weight))) for n, v in norms.items()}
    while (excess := sum(counts.values()) - total) != 0:
        movable = {n: c for n, c in counts.items() if (c > _FEWEST if excess > 0 else c < _MOST)}
        if not movable:
            break
        name = max(movable, key=lambda n: (movable[n], n)) if excess > 0 else min(movable, key=lambda n: (movable[n], n))
        counts[name] += -1 if excess > 0 else 1
    return counts


def _gradient_norms(model: nn.Module, seen: Seen, layers: list[str]) -> dict[str, float]:
    """Norm of the label loss's gradient at each weight, over the batches that were seen; model and mode stay as they are."""
    import torch

    modules, was = dict(model.named_modules()), model.training
    weights: list[Any] = [modules[n].weight for n in layers]
    totals = [torch.zeros_like(w) for w in weights]
    model.eval()
    for number, batch in enumerate(seen.batches):
        grads = torch.autograd.grad(seen.loss(model(batch), number), weights, allow_unused=True)
        for total, grad in zip(totals, grads, strict=True):
            total += 0 if grad is None else grad
    model.train(was)
    return {n: float(t.norm()) for n, t in zip(layers, totals, strict=True)}
