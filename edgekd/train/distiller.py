"""What a distiller is to the training loop: its settings, what it needs computed, its projectors and its loss terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import Field

from edgekd.config import Config

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgekd.models.taps import Tap


# What a method may ask to have computed: both models' logits; the student's features, or the teacher's too, at their taps; the models themselves; the mean of
# the teacher's last features over each class of the training images.
NEEDS = frozenset({"logits", "taps", "teacher_taps", "modules", "class_means"})


class DistillConfig(Config):
    """What every distiller has: the weight of the label loss beside its own terms."""

    label_weight: float = Field(1.0, ge=0, description="weight of the label loss")


@dataclass(frozen=True)
class Side:
    """One model of the pair as a distiller sees it before training."""

    model: nn.Module
    taps: tuple[Tap, ...]  # features by stage, shallow to deep
    num_features: int  # width of the last features
    num_classes: int
    positions: Tensor | None = None  # of the training images, ascending: what `Batch.index` is among
    class_means: Tensor | None = None  # (classes, width) of the teacher's pooled last features, where asked for


@dataclass
class Outputs:
    """What one model gave for a batch: logits (batch, classes) and, where asked for, the features at its taps."""

    logits: Tensor
    taps: tuple[Tensor, ...] = ()
    probabilities: Tensor | None = None  # an unbiased estimate of the tempered softmax, where that is all that was kept of an answer


@dataclass
class Batch:
    """One training batch: both models' outputs, the label targets, and where training stands."""

    student: Outputs
    teacher: Outputs
    target: Tensor  # (batch,) class ids, or (batch, classes) soft targets
    index: Tensor  # (batch,) sample positions in the dataset
    progress: float  # 0 at the first step, 1 at the last


class Distiller(Protocol):
    """A distillation method: one file of `edgekd/distill`, registered with `@register("distill")`."""

    Config: ClassVar[type[DistillConfig]]
    needs: ClassVar[frozenset[str]]  # subset of NEEDS
    co_trains: ClassVar[bool]  # True: updates the teacher or peers as well

    config: Any  # an instance of Config
    # One more, which a method may leave out: `linear_at: float`, the temperature at which it uses nothing of the teacher but its probabilities, and
    # these linearly, so that an unbiased sample of them (`Outputs.probabilities`) gives the same gradient on average.

    def __init__(self, config: Any) -> None: ...

    def setup(self, student: Side, teacher: Side) -> nn.Module | None:
        """Projectors: trained with the student, dropped before export."""

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Named, weighted loss terms; the loop adds them to the label loss."""
