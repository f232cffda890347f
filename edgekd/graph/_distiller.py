"""What a distiller of graphs is to the training: its settings, what it needs beside logits, and its loss terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import Field

from edgekd.config import Config

if TYPE_CHECKING:
    from torch import Tensor, nn

# edges: those of the batch's nodes; ends: what the student says of the nodes at their other end; decisions: what the student, in eval mode, says of all
# seen nodes at the start of an epoch; inside: what the student's last hidden layer gives; features: the batch's own, and the student to ask about others;
# of the teacher, noise: its entropies with noise on the features; hidden: what its last hidden layer gives; tokens: its codebook, and how near nodes are to it.
NEEDS = frozenset({"edges", "ends", "decisions", "inside", "features", "noise", "hidden", "tokens"})
OF_TEACHER = frozenset({"noise", "hidden", "tokens"})  # what a file of answers does not hold


class GraphDistillConfig(Config):
    """What every distiller of graphs has: how the loss is shared between the labels and the method."""

    label_weight: float = Field(0.0, ge=0, le=1, description="share of the label loss (lambda of the papers); the method has the rest")


@dataclass(frozen=True)
class Teaching:
    """What there is to learn from, before training."""

    logits: Tensor  # (seen nodes, classes) of the teacher, calibrated
    noisy_entropy: Tensor | None = None  # (seen nodes,) of its answers to noisy features, where asked for
    hidden: Tensor | None = None  # (seen nodes, width) of its last hidden layer, where asked for
    nearness: Tensor | None = None  # (seen nodes, codes) to each code, where asked for
    codebook: Tensor | None = None  # (codes, width), where asked for
    student_width: int = 0  # of the student's last hidden layer
    student_dropout: float = 0.0


@dataclass
class NodeBatch:
    """One training batch. Nodes are counted among the seen ones."""

    student: Tensor  # (own nodes and, where asked for, ends of edges; classes)
    nodes: Tensor  # (rows of `student`,) which node each row is; the first `own` are the batch's own
    own: int
    teacher: Tensor  # (seen nodes, classes) logits
    edges: Tensor | None  # (2, edges): row of the node in `student`, and the node that it reads from; without loops
    ends: Tensor | None  # (edges,) row of the other end in `student`, where asked for
    decisions: Tensor | None  # (seen nodes, classes) what the student says in eval mode, at the start of an epoch that is not the first
    epoch: int
    progress: float  # 0 at the first step, 1 at the last
    hidden: Tensor | None = None  # (rows of `student`, width) of its last hidden layer before norm and ReLU, where `inside` is asked for
    embedding: Tensor | None = None  # (rows of `student`, width) what its classifier reads, where `inside` is asked for
    features: Tensor | None = None  # (own nodes, features), dense, where asked for
    ask: Callable[[Tensor], Tensor] | None = (
        None  # (rows, features) -> (rows, classes) of the student as it trains, where `features` is asked for
    )


@dataclass
class LinkBatch:
    """Probabilities of a link between each node and the members of its context, (nodes, members)."""

    student: Tensor
    teacher: Tensor


class GraphDistiller(Protocol):
    """A method: one file of `edgekd/graph`, registered with `@register("graph_distill")`. One for links says `of_pairs = True` and gets a `LinkBatch`."""

    Config: ClassVar[type[GraphDistillConfig]]
    needs: ClassVar[frozenset[str]]  # subset of NEEDS

    config: Any

    def __init__(self, config: Any) -> None: ...

    def setup(self, teaching: Teaching) -> nn.Module | None:
        """What is kept, and perhaps trained, beside the student; dropped before export."""

    def terms(self, batch: NodeBatch) -> dict[str, Tensor]:
        """Named, weighted loss terms; the training adds them to the label loss."""
