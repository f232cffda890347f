"""Kullback-Leibler divergence between tempered softmaxes, without a factor T^2: what all these methods use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """(rows,) of the softmax of each row, in nats."""
    said = logits.log_softmax(1)
    return -(said.exp() * said).sum(1)


def kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Mean over rows of KL(softmax(teacher / T) || softmax(student / T)), both (rows, classes) of logits."""
    from torch.nn import functional as F

    said = F.log_softmax(teacher / temperature, 1)
    return F.kl_div(F.log_softmax(student / temperature, 1), said, reduction="batchmean", log_target=True)
