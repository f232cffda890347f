"""Reliable nodes teach their neighbours. A node whose answer hardly changes with noise is reliable; how sharply that counts follows the student.

When: citation graphs. It asks the teacher about noisy features, so that a file of answers is not enough.
Source: Wu, Lin, Huang, Li, Quantifying the Knowledge in GNNs for Reliable Distillation into MLPs, ICML 2023, equations 5 to 9, and the authors' code: edges come
with the probability 1 - rho^a of the node that teaches, rho the change of entropy under one draw of unit noise over its maximum; from epoch 50 on, a follows, by
momentum, a least-squares fit to how often student and teacher agree at each rho.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgekd.graph._distiller import GraphDistillConfig
from edgekd.registry import register

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from edgekd.graph._distiller import NodeBatch, Teaching

_OFFSET = 0.05  # from the left edge of a bin to where the code takes it to be
_FITS = 2000


class KrdConfig(GraphDistillConfig):
    temperature: float = Field(1.0, gt=0, le=100, description="of both softmaxes (tau)")
    momentum: float = Field(0.99, ge=0, lt=1, description="of the power a")
    power: float = Field(1.0, gt=0, description="a at the start")
    bins: int = Field(50, ge=2, le=1000, description="of the histogram that a is fitted to")
    warmup: int = Field(50, ge=0, description="epochs that use every edge")


@register("graph_distill")
class Krd:
    Config = KrdConfig
    needs = frozenset({"edges", "decisions", "noise"})

    def __init__(self, config: KrdConfig):
        self.config = config

    def setup(self, teaching: Teaching) -> nn.Module:
        import torch
        from torch import nn

        from edgekd.graph._kl import entropy

        if teaching.noisy_entropy is None:
            raise ValueError("krd needs the teacher's entropies under noise")
        clean = entropy(teaching.logits)
        change = (teaching.noisy_entropy - clean).abs()
        self.state = nn.Module()
        self.state.register_buffer("rho", change / change.max().clamp(min=torch.finfo(change.dtype).tiny))
        self.state.register_buffer("power", torch.tensor(self.config.power, dtype=torch.float64))
        return self.state

    def terms(self, batch: NodeBatch) -> dict[str, Tensor]:
        import torch

        from edgekd.graph._kl import kl

        if batch.edges is None:
            raise ValueError("krd reads edges")
        rows, others = batch.edges
        rho, power = self.state.get_buffer("rho"), self.state.get_buffer("power")
        if batch.epoch >= self.config.warmup:
            if batch.decisions is not None:
                agree = batch.decisions.argmax(1) == batch.teacher.argmax(1)
                found = fitted_power(rho.cpu().numpy(), agree.cpu().numpy(), self.config.bins, float(power))
                power.copy_(self.config.momentum * power + (1 - self.config.momentum) * found)
            kept = torch.rand(len(others), device=others.device) < 1 - rho[others] ** power
            rows, others = rows[kept], others[kept]
        loops = torch.arange(batch.own, device=rows.device)
        readers, read = torch.cat([rows, loops]), torch.cat([others, batch.nodes[: batch.own]])
        return {"krd": (1 - self.config.label_weight) * kl(batch.teacher[read], batch.student[readers], self.config.temperature)}


def fitted_power(rho: NDArray[Any], agree: NDArray[np.bool_], bins: int, start: float) -> float:
    """The a of 1 - x^a closest to the rate of agreement by bins of rho, min-max scaled; `start` where the rates are all equal or nothing fits."""
    import numpy as np
    from scipy.optimize import curve_fit

    right, edges = np.histogram(rho[agree], bins, (0, 1))
    wrong, _ = np.histogram(rho[~agree], bins, (0, 1))
    rate = right / (right + wrong + 1e-6)
    if rate.max() == rate.min():
        return start
    rate = (rate - rate.min()) / (rate.max() - rate.min())
    try:
        (found,), _ = curve_fit(lambda x, a: 1 - x**a, edges[:-1] + _OFFSET, rate, p0=[start], maxfev=_FITS)
    except (RuntimeError, ValueError):  # it does not converge
        return start
    return float(found) if np.isfinite(found) and found > 0 else start
