"""Multiply-accumulates and parameters of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


def count_macs(model: nn.Module, example_input: Tensor) -> int:
    """Multiply-accumulates of one sample: convolutions, linear layers and attention products; example_input: (batch, ...)."""
    from torch.utils.flop_counter import FlopCounterMode  # heavy

    counter = FlopCounterMode(display=False)
    with evaluating(model), counter:
        model(example_input[:1])
    return counter.get_total_flops() // 2


def count_params(model: nn.Module) -> int:
    """Elements of all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in the mode it was in."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
