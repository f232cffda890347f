"""Order of an epoch and its batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgekd.data.dataset import Dataset
from edgekd.data.rng import uniform

_AHEAD_BATCHES = 3


class Batch(NamedTuple):
    """positions (b,) in the dataset, images (b, size, size, 3) uint8."""

    positions: npt.NDArray[np.int64]
    images: Tensor


def epoch_order(seed: int, epoch: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A permutation of `positions` that depends on seed, epoch and the set of positions only, not on their order."""
    ascending = np.sort(positions)
    return ascending[np.argsort(uniform(seed, "order", epoch, ascending, 1)[:, 0], kind="stable")]


def batches(dataset: Dataset, order: npt.NDArray[np.int64], batch_size: int, *, drop_last: bool = False) -> Iterator[Batch]:
    """Batches along `order`; drop_last leaves out a short last one unless it is the only one. Decoding runs ahead in the background."""
    parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    if drop_last and len(parts) > 1 and len(parts[-1]) < batch_size:
        parts.pop()

    def read(part: npt.NDArray[np.int64]) -> Batch:
        return Batch(part, torch.from_numpy(dataset.images(part)))

    return map(read, parts) if dataset.cached else _ahead(read, parts)


def _ahead(read: Callable[[npt.NDArray[np.int64]], Batch], parts: list[npt.NDArray[np.int64]]) -> Iterator[Batch]:
    pool = ThreadPoolExecutor(1, thread_name_prefix="batches")  # one: batches come in order, the dataset decodes each with its own threads
    waiting: deque[Future[Batch]] = deque()
    try:
        for part in parts:
            waiting.append(pool.submit(read, part))
            if len(waiting) > _AHEAD_BATCHES:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also when the consumer stops early
        pool.shutdown(wait=True, cancel_futures=True)
