"""Step sizes: fake quantization on a grid of equal steps, learned with the weights or taken from what is seen.

Source: LSQ, Esser et al. 2020 (arXiv 1902.08153), section 2.1 and 2.2, as in zhutmost/lsq-net; `minmax`: Jacob et al. 2018 (arXiv 1712.05877), section 3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

_SMALLEST = 1e-8  # of a step: a learned one may not reach zero or change its sign
_MOMENTUM = 0.1  # of the moving range of an input


def lsq(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """`round(clip(x / step, low, high)) * step`; the gradient of the step is scaled by 1 / sqrt(numel * high). `step` broadcasts to x."""
    out: Tensor = _LSQ.apply(x, step, low, high)
    return out


def initial_step(mean_abs: Tensor, high: int) -> Tensor:
    """`2 * mean|x| / sqrt(high)`."""
    return (2 * mean_abs / math.sqrt(high)).clamp_min(_SMALLEST)


class _LSQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        scaled = x / step
        codes = scaled.round().clamp_(low, high)
        ctx.save_for_backward(scaled, codes, step)
        ctx.bounds = low, high
        rounded: Tensor = codes * step
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled, codes, step = ctx.saved_tensors
        (low, high), [grad] = ctx.bounds, grads
        inside = (scaled >= low) & (scaled <= high)
        of_x = grad * inside
        if not ctx.needs_input_grad[1]:
            return of_x, None, None, None
        # round(x/s) - x/s inside, the bound outside
        per_value = grad * torch.where(inside, codes - scaled, codes)
        of_step = per_value.sum_to_size(step.shape) * (scaled.numel() * high) ** -0.5
        return of_x, of_step, None, None


class Quantizer(nn.Module):
    """Rounds a tensor to integer multiples of a step, from `low` to `high` of them; one step for all, or one for each entry of dimension 0."""

    step: Tensor

    def __init__(self, step: Tensor, low: int, high: int, *, learned: bool, follows: bool):
        super().__init__()
        self.low, self.high, self.learned, self.follows = low, high, learned, follows
        if learned:
            self.step = nn.Parameter(step.detach().clone())
        else:
            self.register_buffer("step", step.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return lsq(x, self.steps(x), self.low, self.high)

    def steps(self, x: Tensor) -> Tensor:
        """The steps in use, shaped to broadcast to x."""
        if not self.learned and not self.follows:  # weights: always as wide as they are now
            with torch.no_grad():
                self.step.copy_(_reach(x, len(self.step)) / self.high)
        elif not self.learned and self.training:
            with torch.no_grad():
                self.step.lerp_(_reach(x, 1) / self.high, _MOMENTUM)
        step = self.step.clamp_min(_SMALLEST)
        return step.view(-1, *[1] * (x.ndim - 1)) if len(step) > 1 else step


def _reach(x: Tensor, channels: int) -> Tensor:
    """The largest magnitude, of all or of each entry of dimension 0."""
    size = x.detach().abs().float()  # autocast gives bf16
    return (size.flatten(1).amax(1) if channels > 1 else size.amax().view(1)).clamp_min(_SMALLEST)
