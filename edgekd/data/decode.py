"""Samples to pixels: read, verify against the index, decode, bring to one size. In order, by threads, never far ahead."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from edgekd.data.index import Format, Sample
from edgekd.data.preprocess import preprocess
from edgekd.errors import DataRefused, ImageRefused

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_AHEAD_PER_WORKER = 32  # images decoded before the consumer takes the first of them: bounds memory
_T = TypeVar("_T")


class Decoder:
    """Pixels of the samples of one dataset."""

    def __init__(self, form: Format, root: Path, how: tuple[int, str, str], *, workers: int):
        """how: image size, resize and interpolation of `preprocess`; workers: 0 decodes in the caller's thread."""
        self._form, self._root, self._how = form, root, how
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode") if workers else None

    def one(self, sample: Sample) -> npt.NDArray[np.uint8]:
        """(size, size, 3). Raises DataRefused where the bytes differ from the index, ImageRefused where they do not decode."""
        data = self._form.read(self._root, sample.id)
        if len(data) != sample.size or hashlib.sha256(data).hexdigest() != sample.sha256:
            what = f"{sample.id} is not what was indexed: its bytes changed"
            hint = "restore the file; if the change is meant, touch it; then run again"
            raise DataRefused(what, where=str(self._root), expected=f"SHA-256 {sample.sha256[:16]}...", hint=hint)
        return preprocess(self._form.image(data, sample.id), *self._how)

    def many(self, samples: Sequence[Sample]) -> Iterator[npt.NDArray[np.uint8]]:
        """The pixels of each sample, in order."""
        return self._map(self.one, samples)

    def attempts(self, samples: Sequence[Sample]) -> Iterator[npt.NDArray[np.uint8] | ImageRefused]:
        """As `many`, with the refusal in place of an image that does not decode."""
        return self._map(self._attempt, samples)

    def _attempt(self, sample: Sample) -> npt.NDArray[np.uint8] | ImageRefused:
        try:
            return self.one(sample)
        except ImageRefused as e:
            return e

    def _map(self, function: Callable[[Sample], _T], samples: Sequence[Sample]) -> Iterator[_T]:
        if self._pool is None:
            yield from map(function, samples)
            return
        step = _AHEAD_PER_WORKER * self._workers
        for start in range(0, len(samples), step):
            yield from self._pool.map(function, samples[start : start + step])
