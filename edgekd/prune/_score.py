"""What every criterion shares: member scores -> one score per unit. Higher = keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from pydantic import Field

from edgekd.config import Config
from edgekd.errors import InputRefused, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from edgekd.prune._group import Group

Aggregate = Literal["mean", "sum", "max", "prod", "first"]
Normalize = Literal["mean", "sum", "max", "standard", "gaussian", "none"]
_EPSILON = 1e-8


class CriterionConfig(Config):
    """Settings of every criterion."""

    aggregate: Aggregate = Field("mean", description="how the scores of the tensors of a group are joined")
    normalize: Normalize = Field("mean", description="how the units of a group are scaled; the ranking inside a group stays the same")


class Criterion(Protocol):
    """needs: what must be collected before scoring, out of weights, grads, activations."""

    needs: frozenset[str]

    def score(self, group: Group) -> Tensor | None:
        """(units,); None where the group holds nothing that this criterion looks at."""
        ...


def score_groups(groups: Sequence[Group], criterion: Criterion) -> dict[str, Tensor]:
    """Scores (units,) by group name; groups that the criterion cannot score are left out. Raises UsageError if that leaves none."""
    scores = {group.name: score for group in groups if (score := criterion.score(group)) is not None}
    if not scores:
        name = type(criterion).__module__.rpartition(".")[2]
        raise UsageError(f"criterion '{name}' finds nothing to score in this model", where="prune.criterion", hint="use criterion l1")
    return scores


def combine(members: Sequence[Tensor], config: CriterionConfig, group: str) -> Tensor | None:
    """Joins member scores, each (units,), and scales them; float64. Raises InputRefused if a score is not finite."""
    import torch  # heavy: methods are listed without torch

    if not members:
        return None
    joined = _AGGREGATE[config.aggregate](torch.stack([member.double() for member in members]))
    if not joined.isfinite().all():
        raise InputRefused("the pruning score is not a finite number", where=group, hint="look for NaN in weights and data")
    scaled = _NORMALIZE[config.normalize](joined)
    return scaled if scaled.isfinite().all() else torch.ones_like(joined)  # a group of equal or zero scores has no ranking


_AGGREGATE: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda scores: scores.mean(0),
    "sum": lambda scores: scores.sum(0),
    "max": lambda scores: scores.amax(0),
    "prod": lambda scores: scores.prod(0),
    "first": lambda scores: scores[0],
}
_NORMALIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda scores: scores / scores.mean(),
    "sum": lambda scores: scores / scores.sum(),
    "max": lambda scores: scores / scores.max(),
    "standard": lambda scores: (scores - scores.min()) / (scores.max() - scores.min() + _EPSILON),
    "gaussian": lambda scores: (scores - scores.mean()) / (scores.std() + _EPSILON),
    "none": lambda scores: scores,
}
