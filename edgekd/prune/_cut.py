"""Scores -> widths -> kept units -> a smaller model.

All units are chosen on the uncut model and every tensor is cut once: groups that meet in one tensor (concatenation) cannot disturb
each other. Zero equivalence, see tests: cutting an internal unit equals zeroing the weights that read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import floor, lcm
from typing import TYPE_CHECKING

from edgekd.errors import StructureRefused, UsageError, suggest
from edgekd.prune._count import count_macs, count_params, evaluating
from edgekd.prune._groups import Scope, find_groups
from edgekd.prune._score import Criterion, score_groups
from edgekd.prune._tensors import cut

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgekd.prune._group import Group

_ROUNDING = 1e-9  # 0.3 * 40 is a hair above 12
_HINT = "set prune.scope to internal"
_END_WIDTHS = ("num_features", "head_hidden_size", "in_features")


@dataclass(frozen=True)
class PruneReport:
    """What a cut did; JSON through dataclasses.asdict. widths: group -> [before, after]; macs: of one sample."""

    scope: str
    widths: dict[str, list[int]]
    macs: tuple[int, int]
    params: tuple[int, int]
    unscored: list[str] = field(default_factory=list)  # groups that the criterion cannot score: they keep their width


def prune_model(
    model: nn.Module,
    example_input: Tensor,
    criterion: Criterion | Mapping[str, Tensor],
    *,
    keep: float | Mapping[str, int],
    quantum: int = 1,
    scope: Scope = "auto",
) -> PruneReport:
    """Cuts the model in place; example_input: (batch, channels, height, width).

    criterion: what ranks the units, or the scores that `score_model` gave for this very model.
    keep: fraction of every width, or the widths to keep by group name (others stay whole).
    quantum: kept widths are multiples of it. Raises StructureRefused if nothing can be cut, UsageError for impossible widths.
    """
    image = example_input[:1]
    groups, used = find_groups(model, image, scope)
    scores = _checked(groups, criterion) if isinstance(criterion, Mapping) else score_groups(groups, criterion)
    widths, before = _widths(groups, scores, keep, quantum), _facts(model, image)
    kept = {group.name: select(scores[group.name], group, width) for group, width in widths}
    cut(model, groups, kept)
    after = _facts(model, image)
    if after.output != before.output:
        raise StructureRefused("the pruned model has another output shape", where=type(model).__name__, hint=_HINT)
    _follow(model, before.ends, after.ends)
    return PruneReport(
        scope=used,
        widths={group.name: [group.width, len(kept.get(group.name, range(group.width)))] for group in groups},
        macs=(before.macs, after.macs),
        params=(before.params, after.params),
        unscored=[group.name for group in groups if group.name not in scores],
    )


def score_model(model: nn.Module, example_input: Tensor, criterion: Criterion, *, scope: Scope = "auto") -> dict[str, Tensor]:
    """Scores (units,) of every prunable width by group name; search over many cuts needs them only once."""
    return score_groups(find_groups(model, example_input, scope)[0], criterion)


def choose_width(width: int, keep: float, quantum: int = 1) -> int:
    """The multiple of the quantum nearest to width * keep (halves up), at least one quantum and at most the width."""
    steps = floor(width * keep / quantum + 0.5 + _ROUNDING)
    return min(width, max(quantum, steps * quantum))


def select(scores: Tensor, group: Group, width: int) -> list[int]:
    """Indices, ascending, of the best `width` units; the lower index wins a tie, and every block of the group keeps the same ones."""
    part = group.width // group.blocks
    ranked = scores.detach().double().cpu().reshape(group.blocks, part).mean(0).argsort(descending=True, stable=True)
    best = sorted(ranked[: width // group.blocks].tolist())
    return [block * part + unit for block in range(group.blocks) for unit in best]


def _widths(
    groups: Sequence[Group], scores: Mapping[str, Tensor], keep: float | Mapping[str, int], quantum: int
) -> list[tuple[Group, int]]:
    """The groups that shrink, with their new widths."""
    if isinstance(keep, Mapping):
        _check_widths(groups, scores, keep)
        return [(group, keep[group.name]) for group in groups if keep.get(group.name, group.width) < group.width]
    if not 0 < keep <= 1 or quantum < 1:
        raise UsageError(
            f"cannot keep {keep} of every width in multiples of {quantum}", where="prune", expected="0 < keep <= 1 and quantum >= 1"
        )
    chosen = [(group, choose_width(group.width, keep, _step(group, quantum))) for group in groups if group.name in scores]
    return [(group, width) for group, width in chosen if width < group.width]


def _step(group: Group, quantum: int) -> int:
    """The quantum, so that every block loses the same; the blocks alone where both together would leave no choice."""
    step = lcm(quantum, group.blocks)
    return step if step < group.width or group.blocks == 1 else group.blocks


def _check_widths(groups: Sequence[Group], scores: Mapping[str, Tensor], keep: Mapping[str, int]) -> None:
    known = {group.name: group for group in groups if group.name in scores}
    for name, width in keep.items():
        if name not in known:
            raise UsageError(f"no width named '{name}'{suggest(name, known)}", where="prune.keep")
        group = known[name]
        if not 1 <= width <= group.width or width % group.blocks:
            raise UsageError(
                f"width {name} cannot become {width}", where="prune.keep", expected=f"1..{group.width}, a multiple of {group.blocks}"
            )


def _checked(groups: Sequence[Group], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores from elsewhere, for the groups at hand."""
    found = {group.name: scores[group.name] for group in groups if group.name in scores}
    wrong = [group.name for group in groups if group.name in found and tuple(found[group.name].shape) != (group.width,)]
    if wrong or not found:
        raise UsageError(
            "the scores belong to another model", where=wrong[0] if wrong else "prune", expected="what score_model gave for this one"
        )
    return found


@dataclass(frozen=True)
class _Facts:
    """What is compared before and after: multiply-accumulates of one sample, parameters, output shape, widths at the end of the net."""

    macs: int
    params: int
    output: tuple[int, ...]
    ends: tuple[int, ...]


def _facts(model: nn.Module, image: Tensor) -> _Facts:
    """Raises StructureRefused if the model does not run."""
    try:
        with evaluating(model):
            output = tuple(model(image).shape)
        return _Facts(count_macs(model, image), count_params(model), output, _ends(model, image))
    except (RuntimeError, ValueError, IndexError) as error:
        raise StructureRefused(f"the pruned model does not run: {error}", where=type(model).__name__, hint=_HINT) from error


def _ends(model: nn.Module, image: Tensor) -> tuple[int, ...]:
    """Inputs of the classifier, then the shape that timm's `forward_features` returns; 0 or nothing where there is no such thing."""
    classifier, features = getattr(model, "get_classifier", lambda: None)(), getattr(model, "forward_features", None)
    with evaluating(model):
        shape = features(image).shape if features else ()
    return (getattr(classifier, "in_features", getattr(classifier, "in_channels", 0)), *shape)


def _follow(model: nn.Module, before: Sequence[int], after: Sequence[int]) -> None:
    """Brings timm's own notes of its end widths up to date: a new head, taps and projectors read them."""
    changed = {old: new for old, new in zip(reversed(before), reversed(after), strict=True) if old != new}
    for module in [model, getattr(model, "head", model)]:
        for name in _END_WIDTHS:
            if getattr(module, name, None) in changed:
                setattr(module, name, changed[getattr(module, name)])
