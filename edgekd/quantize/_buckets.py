"""Weights in buckets: every bucket is scaled to [0, 1] by its own range, and values there are rounded to a few points.

Source: Polino et al. 2018 (arXiv 1802.05668), sections 2 and 4; antspy/quantized_distillation `quant_functions.py` for padding and rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_FLAT = 1e-10  # a bucket with less range is one value


def scaled(values: Tensor, bucket: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """(v, alpha, beta): v (buckets, bucket) in [0, 1], alpha and beta (buckets, 1). A short last bucket is filled with the last value.

    Without a bucket size, or where there are fewer values than that, all of them are one bucket.
    """
    flat = values.reshape(-1)
    if bucket and flat.numel() >= bucket:
        flat = torch.cat([flat, flat[-1:].expand(-flat.numel() % bucket)])
        rows = flat.view(-1, bucket)
    else:
        rows = flat.view(1, -1)
    beta = rows.amin(1, keepdim=True)
    alpha = rows.amax(1, keepdim=True) - beta
    alpha = torch.where(alpha < _FLAT, torch.ones_like(alpha), alpha)
    return (rows - beta) / alpha, alpha, beta


def restored(rows: Tensor, alpha: Tensor, beta: Tensor, like: Tensor) -> Tensor:
    """Scaled values as weights again, in the shape of `like`."""
    return (alpha * rows + beta).view(-1)[: like.numel()].view(like.shape)


def uniform_quant(values: Tensor, bits: int, bucket: int | None) -> Tensor:
    """Rounded to 2^bits equal steps in each bucket, halves to even."""
    v, alpha, beta = scaled(values, bucket)
    levels = 2**bits - 1
    return restored((v * levels).round() / levels, alpha, beta, values)


def nearest(rows: Tensor, points: Tensor) -> Tensor:
    """Index of the nearest of the sorted points (n,) for each value."""
    middles = (points[1:] + points[:-1]) / 2
    return torch.bucketize(rows, middles)


def percentile_points(rows: Tensor, count: int) -> Tensor:
    """`count` points at equal shares of the scaled values, sorted."""
    ordered = rows.detach().reshape(-1).sort().values
    places = torch.linspace(0, len(ordered) - 1, count, device=rows.device, dtype=torch.float64)
    low = places.floor().long()
    high = (low + 1).clamp_max(len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (places - low).to(ordered.dtype)


class Uniform(nn.Module):
    """Straight-through rounding of a weight; `truncated` lets no gradient through where a weight lies outside [-1, 1]."""

    def __init__(self, bits: int, bucket: int | None, truncated: bool):
        super().__init__()
        self.bits, self.bucket, self.truncated = bits, bucket, truncated

    def forward(self, weight: Tensor) -> Tensor:
        raw = weight.clamp(-1, 1) if self.truncated else weight
        return raw + (uniform_quant(raw, self.bits, self.bucket) - raw).detach()

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(codes, points, alpha, beta)."""
        v, alpha, beta = scaled(weight.clamp(-1, 1) if self.truncated else weight, self.bucket)
        levels = 2**self.bits - 1
        return (v * levels).round().long(), torch.arange(levels + 1, device=weight.device) / levels, alpha, beta


class Points(nn.Module):
    """Fixed weights, learned points that all buckets of a tensor share: dL/dp_i is the sum of alpha * gradient over the weights at p_i."""

    def __init__(self, weight: Tensor, count: int, bucket: int | None):
        super().__init__()
        v, alpha, beta = scaled(weight.detach(), bucket)
        self.rows: Tensor
        self.alpha: Tensor
        self.beta: Tensor
        for name, value in (("rows", v), ("alpha", alpha), ("beta", beta)):
            self.register_buffer(name, value, persistent=False)  # functions of the weight, which does not change
        self.points = nn.Parameter(percentile_points(v, count))

    def forward(self, weight: Tensor) -> Tensor:
        points = self.points.sort().values
        return restored(points[nearest(self.rows, points.detach())], self.alpha, self.beta, weight)

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(codes, points, alpha, beta)."""
        points = self.points.detach().sort().values
        return nearest(self.rows, points), points, self.alpha, self.beta


def codebooks(model: nn.Module) -> dict[str, Any]:
    """Bakes every quantized weight of the model, in place; returns codes, points, alpha and beta by layer as arrays."""
    import numpy as np
    from torch.nn.utils import parametrize

    arrays: dict[str, Any] = {}
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module, "weight"):
            continue
        quantizer: Any = module.parametrizations.weight[0]
        with torch.no_grad():
            codes, points, alpha, beta = quantizer.codes(module.parametrizations.weight.original)
        parts = {"codes": codes.to(torch.uint8), "points": points.float(), "alpha": alpha, "beta": beta}
        arrays |= {f"{name}/{part}": value.cpu().numpy() for part, value in parts.items()}
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        arrays[f"{name}/shape"] = np.array(module.weight.shape, np.int64)
    return arrays
