"""Several processes under `torchrun` that train one model: each runs its share of every batch, and all come to the same weights.

The first process runs the recipe; the others wait, and help in the steps that learn. What the models give is gathered before the loss, so that a loss that
compares the images of a batch sees all of them; batch norm takes the statistics of the whole batch; gradients are averaged. The result is that of one
process up to rounding, but for dropout and drop-path, which draw apart on each process. Files are shared: one machine, or a common EDGEKD_HOME.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from edgekd.errors import ResourceError, UsageError
from edgekd.train.distiller import Outputs

_PATIENCE = timedelta(days=14)  # the others wait while the first one quantizes, measures and so on


@cache
def joined() -> Ranks:
    """The group that torchrun made of this process and others, once all have come."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    return Ranks(dist.get_rank(), dist.get_world_size())


@contextmanager
def _lost() -> Iterator[None]:
    """A collective call fails where a process has gone."""
    try:
        yield
    except RuntimeError as problem:
        raise ResourceError(
            "another process of this training is gone",
            where=f"process {dist.get_rank()} of {dist.get_world_size()}",
            hint="its own message says why; the same command continues from the last checkpoint",
        ) from problem


class Ranks:
    """This process among those that train together."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        return self.rank == 0

    def tell(self, order: object = None) -> Any:
        """What the first process says, for all; the others wait for it."""
        said = [order]
        with _lost():
            dist.broadcast_object_list(said, src=0)
        return said[0]

    def share(self, count: int) -> slice:
        """This process's part of a batch. Raises UsageError where the batch cannot be divided evenly."""
        each, left = divmod(count, self.size)
        if left or not each:
            raise UsageError(
                f"a batch of {count} images cannot be divided among {self.size} processes",
                where="batch_size",
                expected=f"a multiple of {self.size}",
                hint=f"-o STAGE.batch_size={max(count // self.size, 1) * self.size}, or another --nproc-per-node",
            )
        return slice(self.rank * each, (self.rank + 1) * each)

    def whole(self, part: Outputs) -> Outputs:
        """The outputs of the whole batch; gradients go back to each process's own part."""

        def gathered(tensor: Tensor | None) -> Any:
            return None if tensor is None else _Gather.apply(tensor, self.rank, self.size)

        return Outputs(gathered(part.logits), tuple(map(gathered, part.taps)), gathered(part.embedding), gathered(part.probabilities))

    @torch.no_grad()
    def average(self, gradients: Iterable[Tensor]) -> None:
        """In place, the mean over the processes; as one message for each type of number."""
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for gradient in gradients:
            kinds.setdefault((gradient.dtype, gradient.device), []).append(gradient)
        for same in kinds.values():
            flat = torch.cat([g.reshape(-1) for g in same])
            _summed(flat)
            for gradient, mean in zip(same, torch.split(flat / self.size, [g.numel() for g in same]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def most(self, number: int) -> int:
        """The largest of a number over the processes."""
        found = torch.tensor(number)
        with _lost():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)


def _summed(tensor: Tensor) -> Tensor:
    with _lost():
        dist.all_reduce(tensor)
    return tensor


class _Gather(torch.autograd.Function):
    """Parts side by side. The loss of the whole batch is computed by every process alike, so each knows the gradient of its part; times the number of
    processes, since gradients of weights are averaged afterwards where those of the parts would have to be summed."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, rank: int, size: int) -> Tensor:
        ctx.rank, ctx.size = rank, size
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(size)]
        with _lost():
            dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.chunk(ctx.size)[ctx.rank] * ctx.size, None, None


class _Sum(torch.autograd.Function):
    """The sum over the processes; the gradient of a sum that all of them read is the sum of theirs."""

    @staticmethod
    def forward(_ctx: Any, tensor: Tensor) -> Tensor:
        return _summed(tensor.clone())

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient.clone(memory_format=torch.contiguous_format))


class WholeBatchNorm(TorchFunctionMode):
    """Inside, batch norm in training takes mean and variance of all processes' parts, whatever module calls it."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def __torch_function__(self, func: Callable[..., Any], _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self._normed(*args, **kwargs)
        return func(*args, **kwargs)

    def _normed(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        over, shape = [d for d in range(x.ndim) if d != 1], [1, -1] + [1] * (x.ndim - 2)
        wide = x.float()
        count = self.size * wide.numel() / wide.shape[1]
        mean: Tensor = _Sum.apply(wide.sum(over)) / count
        centred = wide - mean.view(shape)
        var: Tensor = _Sum.apply(centred.square().sum(over)) / count
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                running_var.lerp_((var * count / max(count - 1, 1)).to(running_var.dtype), momentum)
        out = centred * (var + eps).rsqrt().view(shape)
        if weight is not None:
            out = out * weight.float().view(shape)
        return (out if bias is None else out + bias.float().view(shape)).to(x.dtype)
