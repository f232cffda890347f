"""torch.compile for batches of one size: a model, or a model with its taps, as one fused program.

Where it pays is measured (train/tune.py). Batches of other sizes, such as the last one of a pass, run as they are: a program for each would cost more
than it saves.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Compiled:
    """What `run` does with images (batch, 3, h, w), compiled at the first batch of that size. `refused` is the reason where that failed, and `run` goes on.

    frozen: weights and mode do not change any more, so that they become constants of the program.
    """

    def __init__(self, run: Callable[[Tensor], Any], batch: int, *, frozen: bool = False):
        self.run, self.batch, self.refused = run, batch, ""
        call: Callable[[Tensor], Any] = run if isinstance(run, nn.Module) else run.__call__  # type: ignore[operator]  # torch takes functions and modules
        self._program = torch.compile(call, dynamic=False, options={"freezing": True} if frozen else None)
        self._ran = False

    def __call__(self, images: Tensor) -> Any:
        if len(images) != self.batch or self.refused:
            return self.run(images)
        if self._ran:
            return self._program(images)
        try:
            found = self._program(images)
        except Exception as problem:  # no C++ compiler, an operator that it does not know, code that it cannot trace
            self.refused = next(iter(str(problem).strip().splitlines()), type(problem).__name__)[:200]
            return self.run(images)
        self._ran = True
        return found


def keep_programs_in(folder: Path) -> None:
    """Where compiled programs are kept for the next run; torch's own default is a folder under /tmp that anyone may have made."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where there is no CUDA toolkit
