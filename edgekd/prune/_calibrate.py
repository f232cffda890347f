"""What a cut needs from data: gradients before it, BatchNorm statistics after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from edgekd.errors import DataRefused, TrainingDiverged
from edgekd.prune._count import evaluating

if TYPE_CHECKING:
    from torch import Tensor, nn

_MIN_BATCH = 2  # the variance of one sample may be that of one number


def collect_gradients(model: nn.Module, batches: Iterable[tuple[Tensor, Any]], loss_fn: Callable[[Any, Any], Tensor]) -> int:
    """Leaves the gradient of the mean loss over all samples in `.grad`, in evaluation mode; returns the number of samples.

    batches: (inputs, targets); loss_fn(outputs, targets) is the mean over its batch. Score on held-out samples: a memorised training
    set has no gradient. Raises DataRefused without samples, TrainingDiverged if the loss is not finite.
    """
    import torch  # heavy

    samples = 0
    model.zero_grad(set_to_none=True)
    with evaluating(model), torch.enable_grad():
        for inputs, targets in batches:
            loss = loss_fn(model(inputs), targets)
            if not loss.isfinite():
                raise TrainingDiverged(
                    f"the label loss is {loss.item()} after {samples} samples", where="prune", hint="look at the weights"
                )
            torch.autograd.backward(loss * len(inputs))
            samples += len(inputs)
    if not samples:
        raise DataRefused("there are no samples to take gradients from", where="prune", expected="at least one batch")
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= samples
    return samples


def recalibrate_bn(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replaces all BatchNorm statistics by their average over the batches; returns the number of BatchNorm layers.

    batches: (batch, ...) inputs; about 8 suffice. Everything else stays in evaluation mode, and no gradient is computed. A model
    without BatchNorm reads no batch. Raises DataRefused without batches or with a batch of one sample.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
                norm.training = True
            fed = _feed(model, batches if norms else ())
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    if norms and not fed:
        raise DataRefused("there are no batches to recalibrate with", where="prune", expected="at least one batch")
    return len(norms)


def _feed(model: nn.Module, batches: Iterable[Tensor]) -> int:
    count = 0
    for inputs in batches:
        if len(inputs) < _MIN_BATCH:
            raise DataRefused("a batch of one sample has no statistics", where="prune", expected=f"batches of at least {_MIN_BATCH}")
        model(inputs)
        count += 1
    return count
