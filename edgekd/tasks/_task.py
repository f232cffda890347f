"""What a task is: how targets, the label loss, metrics, post-processing and parity look. The loop, the gate and the bundle never name one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]


class Task(Protocol):
    """One file of this folder, registered with `@register("task")`. Arrays are numpy on the way out, torch inside training."""

    metric_name: str  # the key of `metrics` that gates and reports read; a fraction, higher is better

    def collate(self, labels: Ints, classes: int) -> Tensor:
        """Stored labels of a batch as the target of `label_loss`."""

    def mix(self, first: Tensor, second: Tensor, share: Tensor, classes: int) -> Tensor:
        """The target of a mixed image: `share` (batch,) of the first and the rest of the second."""

    def label_loss(self, outputs: Tensor, target: Tensor, smoothing: float) -> Tensor:
        """Scalar loss against the labels."""

    def scores(self, outputs: Floats, labels: Ints) -> Floats:
        """One score a sample whose mean is the metric; paired tests compare them."""

    def metrics(self, outputs: Floats, labels: Ints, teacher: Floats | None) -> dict[str, float]:
        """All metrics of a split, and the agreement with a teacher's outputs where given."""

    def agreement(self, a: Floats, b: Floats) -> float:
        """Share of samples on which two forms of one model decide alike: the parity metric."""

    def confusion(self, outputs: Floats, labels: Ints, classes: int) -> list[list[int]] | None:
        """Counts by true row and decided column, or None where the task has none."""

    # Nine more, which a task may leave out:
    #   samples: what its samples are called; default: images
    #   template: the file of edgekd/templates that a bundle gets as its predict.py; default: predict.py
    #   learns: stage of a recipe -> the stage that does it for these samples; default: the same
    #   measures: what `metric_name` counts, in words; default: accuracy
    #   without_labels() -> Task: the same task where labels are a teacher's decisions, so that the metric is agreement with it
    #   clear(outputs, room) -> (n,) bool: the samples whose answer stays when every output is off by `room`; agreement is judged on these
    #   misfit(outputs, classes) -> str | None: why these outputs cannot belong to data of so many classes, in a sentence
    #   order(outputs, labels) -> list[int] | None: which class each output stands for, where that is clearly not the class of its number
    #   chance(labels) -> float: the metric of a model that knows nothing but how often each answer is right

    def postprocess(self) -> dict[str, Any]:
        """How a bundle turns outputs into an answer, for predict.py."""
