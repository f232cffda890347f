"""What a distiller is to the training loop: its settings, what it needs computed, its projectors and its loss terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import Field

from edgekd.config import Config

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgekd.models.taps import Tap


# What a method may ask to have computed. taps: the student's features by stage; teacher_taps: the teacher's; embedding: what both classifiers read;
# class_means: the teacher's mean embedding of each class; modules: layers of the teacher that the method runs itself; labels: `Batch.target`.
NEEDS = frozenset({"logits", "taps", "teacher_taps", "embedding", "class_means", "modules", "labels"})
OUTPUTS_ALONE = frozenset({"logits", "taps", "labels"})  # what can be had with a teacher of which only the outputs are known


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
    classifier: str | None = None  # name of the layer that gives the logits, where the embedding is asked for
    embedding: int = 0  # width of what it reads
    positions: Tensor | None = None  # of the training images, ascending: what `Batch.index` is among
    class_means: Tensor | None = None  # (classes, embedding) of the teacher, where asked for; zeros for a class without images


@dataclass
class Outputs:
    """What one model gave for a batch: logits (batch, classes) and, where asked for, the features at its taps and (batch, width) embeddings."""

    logits: Tensor
    taps: tuple[Tensor, ...] = ()
    embedding: Tensor | None = None  # what the classifier reads
    probabilities: Tensor | None = None  # an unbiased estimate of the tempered softmax, where that is all that was kept of an answer

    @classmethod
    def of(cls, logits: Tensor, taps: tuple[Tensor, ...] = (), embedding: Tensor | None = None, *, copy: bool = False) -> Outputs:
        """What a model gave, in fp32; `copy`: in memory of its own."""

        def plain(tensor: Tensor) -> Tensor:
            return tensor.float().clone() if copy else tensor.float()

        return cls(plain(logits), tuple(plain(t) for t in taps), None if embedding is None else plain(embedding))


@dataclass
class Batch:
    """One training batch: both models' outputs, the label targets, and where training stands."""

    student: Outputs
    teacher: Outputs
    target: Tensor  # (batch,) class ids, or (batch, classes) soft targets
    index: Tensor  # (batch,) sample positions in the dataset
    progress: float  # 0 at the first step, 1 at the last

    @property
    def hard_target(self) -> Tensor:
        """(batch,) class ids; mixed labels count as their larger part, as in the sources."""
        return self.target if self.target.ndim == 1 else self.target.argmax(1)

    @property
    def embeddings(self) -> tuple[Tensor, Tensor]:
        """(student's, teacher's), for a method that needs them."""
        mine, its = self.student.embedding, self.teacher.embedding
        if mine is None or its is None:
            raise ValueError("the distiller reads embeddings and does not name them in `needs`")
        return mine, its


def black_box_lack(distiller: Any) -> str:
    """What a distiller (or its class) asks of a teacher beyond its outputs, in words; empty where the outputs are enough."""
    if more := sorted(distiller.needs - OUTPUTS_ALONE):
        return " and ".join(more)
    return "the teacher's family" if getattr(distiller, "pairs", None) else ""


class Distiller(Protocol):
    """A distillation method: one file of `edgekd/distill`, registered with `@register("distill")`."""

    Config: ClassVar[type[DistillConfig]]
    needs: ClassVar[frozenset[str]]  # subset of NEEDS
    co_trains: ClassVar[bool]  # True: updates the teacher or peers as well

    config: Any  # an instance of Config
    # Four more, which a method may leave out. `pairs: ClassVar[frozenset[tuple[str, str]]]`: the families of (teacher, student) that it is made for, out of
    # cnn, vit, swin and mlp; without it, any. `linear_at: float`, the temperature at which it uses nothing of the teacher but its probabilities, and
    # these linearly, so that an unbiased sample of them (`Outputs.probabilities`) gives the same gradient on average. `explicit: Config`, after setup the
    # settings with what setup chose written out. `relational: ClassVar[bool]`: it compares images with each other, which differs between families.

    def __init__(self, config: Any) -> None: ...

    def setup(self, student: Side, teacher: Side) -> nn.Module | None:
        """Projectors: trained with the student, dropped before export."""

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Named, weighted loss terms; the loop adds them to the label loss."""
