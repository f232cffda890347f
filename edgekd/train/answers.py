"""A teacher's answers, computed once for every view of every training image, read back from disk while the student trains.

Where an image has a fixed number of augmented views, its teacher says the same thing each time it sees one of them again. Logits are kept in fp16. For
many classes, a sample of them is kept instead: classes drawn by the teacher's probabilities, so that the share of draws is an unbiased estimate of every
probability. A plain top-k is not: it makes the teacher surer than it is.
Source of the sampling: Anshumann et al. 2025, "Sparse Logit Sampling" (arXiv 2503.16870), section 3; drawn here systematically (one offset for all draws
of a sample), which has the same expectation and less variance.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from edgekd.data.rng import uniform
from edgekd.errors import TrainingDiverged
from edgekd.train.distiller import Outputs

if TYPE_CHECKING:
    from numpy.typing import NDArray

ANSWERS, ABOUT = "answers.npy", "answers.json"


@dataclass(frozen=True)
class About:
    """What is kept of each answer."""

    classes: int
    views: int
    samples: int = 0  # classes drawn of each answer; 0: all logits
    temperature: float = 1.0  # at which they are drawn

    @property
    def width(self) -> int:
        return self.samples or self.classes

    @property
    def dtype(self) -> Any:
        if not self.samples:
            return np.float16
        return np.uint16 if self.classes <= np.iinfo(np.uint16).max + 1 else np.uint32


def draw(logits: NDArray[np.float32], about: About, offsets: NDArray[np.float64]) -> NDArray[Any]:
    """Classes (n, samples), class c in `samples * p_c` places on average, of logits (n, classes) and one offset in [0, 1) each."""
    tempered = logits.astype(np.float64) / about.temperature
    shares = np.exp(tempered - tempered.max(1, keepdims=True))
    steps = np.cumsum(shares, axis=1)
    places = (offsets[:, None] + np.arange(about.samples)) / about.samples * steps[:, -1:]
    found = [np.searchsorted(row, at, side="right") for row, at in zip(steps, places, strict=True)]
    drawn: NDArray[Any] = np.minimum(np.stack(found), about.classes - 1).astype(about.dtype)
    return drawn


def estimate(classes: Tensor, about: About) -> Tensor:
    """Probabilities (n, about.classes) of drawn classes (n, samples): the share of the draws that each class got."""
    shares = torch.zeros(len(classes), about.classes)
    return shares.scatter_add_(1, classes.long(), torch.full(classes.shape, 1 / about.samples))


class Writer:
    """Fills the file of answers view by view; what is there after a kill is not computed again."""

    def __init__(self, folder: Path, about: About, positions: NDArray[np.int64], seed: int):
        self.folder, self.about, self.positions, self.seed = folder, about, positions, seed
        shape = (about.views, len(positions), about.width)
        self._mark = folder / "done"
        going_on = self._mark.is_file() and (folder / ANSWERS).is_file()
        self.done = int(self._mark.read_text()) if going_on else 0
        self.file = np.lib.format.open_memmap(folder / ANSWERS, "r+" if going_on else "w+", about.dtype, shape)
        with (folder / ANSWERS).open("rb+") as file:  # a full disk must be an error here, not a SIGBUS when a page is written
            os.posix_fallocate(file.fileno(), 0, self.file.offset + self.file.nbytes)
        self.total = about.views * len(positions)

    def rest(self) -> tuple[int, NDArray[np.int64]]:
        """The view that is being filled, and the positions that it lacks."""
        view, start = divmod(self.done, len(self.positions))
        return view, self.positions[start:]

    def add(self, logits: NDArray[np.float32]) -> None:
        """Answers to the next images of `rest`; raises TrainingDiverged for one that is not finite."""
        view, start = divmod(self.done, len(self.positions))
        positions = self.positions[start : start + len(logits)]
        if not np.isfinite(logits).all():
            row = int(np.flatnonzero(~np.isfinite(logits).all(1))[0])
            raise TrainingDiverged(
                f"the teacher's outputs for image {int(positions[row])} are not finite",
                where="teacher",
                expected="finite outputs",
                hint="if it answers in bf16: -o distill.autocast=off",
            )
        kept = logits.clip(-65504, 65504)  # the range of fp16
        if self.about.samples:
            kept = draw(logits, self.about, uniform(self.seed, "answers", view, positions, 1)[:, 0])
        self.file[view, start : start + len(logits)] = kept
        self.done += len(logits)

    def save(self) -> None:
        """What is done so far survives a kill."""
        self.file.flush()
        self._mark.write_text(str(self.done))

    def publish(self, out: Path) -> None:
        """Moves the file into the artifact."""
        self.file.flush()
        del self.file
        (self.folder / ANSWERS).replace(out / ANSWERS)
        self._mark.unlink(missing_ok=True)
        (out / ABOUT).write_text(json.dumps(asdict(self.about), sort_keys=True), encoding="utf-8")


class Answers:
    """Reads what a Writer wrote. Called as a teacher is."""

    def __init__(self, folder: Path, positions: NDArray[np.int64], device: str = "cpu"):
        self.about, self.device = About(**json.loads((folder / ABOUT).read_text(encoding="utf-8"))), device
        self.file, self.positions = np.load(folder / ANSWERS, mmap_mode="r"), positions  # ascending

    def __call__(self, images: Tensor, index: Tensor, epoch: int) -> Outputs:
        """The answers to the view of `epoch` of the images at positions `index` (batch,); the pixels are not looked at."""
        rows = np.searchsorted(self.positions, index.numpy())
        found = self.file[epoch % self.about.views][rows]
        kept = torch.from_numpy(found.astype(np.int64 if self.about.samples else np.float32))
        if not self.about.samples:
            return Outputs(kept.to(self.device))
        shares = estimate(kept, self.about).to(self.device)
        return Outputs(shares.log(), probabilities=shares)
