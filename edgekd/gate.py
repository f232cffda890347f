"""The rule that keeps, rolls back or calls neutral: pure functions of measurements, so that every verdict can be tested and replayed.

Kept: lower latency (the interval of the interleaved ratio lies below 1) or a smaller file, whichever the budget names, neither made worse beyond
tolerance, and the drop's interval inside what is left of the accuracy that may be lost. Neutral where nothing is certain. Always with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

TOLERANCE = 0.02  # relative; smaller changes of latency or size are no change
_Z = 1.959964  # two-sided 95 %


@dataclass(frozen=True)
class Evidence:
    """What was measured of a segment. Sizes in bytes, accuracies and drops as fractions."""

    before_bytes: int
    after_bytes: int
    ratio: float | None  # latency after / before; None: not judged
    ratio_ci: tuple[float, float] | None
    drop: float  # metric before - after
    drop_ci: tuple[float, float]
    allowed: float  # what is left of accuracy_drop_max
    wants: frozenset[str] = field(default_factory=frozenset)  # {"latency", "size"} as the budget names them; empty: either
    unmet: frozenset[str] = field(default_factory=frozenset)  # those of `wants` that the start of the segment misses
    untimed: str = ""  # why latency was not judged
    causes: tuple[str, ...] = ()  # why it did not get faster
    same: bool = False  # nothing changed
    measures: str = "accuracy"  # what the metric counts, in words


@dataclass(frozen=True)
class Verdict:
    """kept | rolled back | neutral, with the reason in words."""

    verdict: str
    reason: str

    @property
    def chosen(self) -> str:
        return "after" if self.verdict == "kept" else "before"


def judge(e: Evidence) -> Verdict:
    """The verdict on a segment."""
    if e.same:
        return Verdict("neutral", "the step changed nothing")
    said = f"{_latency_words(e)}, {_size_words(e)}, {_accuracy_words(e)}"
    if e.drop_ci[1] > e.allowed:
        certain = e.drop_ci[0] > e.allowed
        if e.allowed < 0:
            why = f"{e.measures} is {-e.allowed * 100:.2f} points beyond the limit already where it starts"
        else:
            why = f"{'it loses more than' if certain else 'its loss may exceed'} the {e.allowed * 100:.2f} points that are left"
        return Verdict("rolled back" if certain or e.drop > e.allowed else "neutral", f"{why}: {said}")
    faster, slower = _change(e.ratio_ci)
    size = e.after_bytes / e.before_bytes
    smaller, larger = size < 1 - TOLERANCE, size > 1 + TOLERANCE
    gains = [name for name, yes in (("latency", faster), ("size", smaller)) if yes and (not e.wants or name in e.wants)]
    losses = [name for name, yes in (("latency", slower), ("size", larger)) if yes]
    if losses and not _needed(gains, losses, e):
        hint = f" ({'; '.join(e.causes)})" if e.causes and "latency" in losses else ""
        return Verdict("rolled back", f"it made {' and '.join(losses)} worse: {said}{hint}")
    if gains:
        hint = f" (not faster: {'; '.join(e.causes)})" if e.causes and "latency" not in gains and e.ratio is not None else ""
        return Verdict("kept", f"{said}{hint}")
    hint = f" ({'; '.join(e.causes)})" if e.causes else ""
    return Verdict("neutral", f"no certain gain in {' or '.join(sorted(e.wants)) or 'latency or size'}: {said}{hint}")


def helped(drop: float, interval: tuple[float, float], measures: str) -> Verdict:
    """The verdict on another way of training the same model, which costs nothing where it runs: kept where the metric is certainly better."""
    said = f"{measures} {_drop_words(drop, interval)} against the student that the teacher taught directly"
    if interval[1] < 0:
        return Verdict("kept", said)
    if interval[0] > 0:
        return Verdict("rolled back", f"the assistant did not help: {said}")
    return Verdict("neutral", f"no certain gain: {said}")


def overruled(verdict: Verdict) -> Verdict:
    """What goes on where gates are off."""
    return Verdict("kept", f"the gate is off; it would say '{verdict.verdict}': {verdict.reason}")


@dataclass(frozen=True)
class Candidate:
    """One runtime and graph of a race. Size in bytes; the drop is against the graph that the race started from."""

    name: str
    size_bytes: int
    ratio: float | None  # latency / the first candidate's; None: it could not be measured
    ratio_ci: tuple[float, float] | None
    drop: float
    drop_ci: tuple[float, float]
    rounded: bool  # False: the graph as the chain gave it
    missed: int = 0  # limits of the budget that it does not meet


def pick(candidates: Sequence[Candidate], allowed: float, *, enabled: bool = True, measures: str = "accuracy") -> tuple[Candidate, str]:
    """What ships, and why: inside the accuracy limit the fewest missed limits, then the lowest latency, and of equals the smallest file.

    `allowed` is what is left of accuracy_drop_max. A graph in fp32 is out only where its runtime certainly loses more than that. `enabled=False`: any
    rounded graph will do, whatever it loses.
    """
    first = candidates[0]
    if enabled:
        inside = [c for c in candidates if (c.drop_ci[1] <= allowed if c.rounded else c.drop_ci[0] <= max(allowed, 0))] or [first]
    else:
        inside = [c for c in candidates if c.rounded] or list(candidates)
    fewest = min(c.missed for c in inside)
    fitting = [c for c in inside if c.missed == fewest]
    best = min((c.ratio for c in fitting if c.ratio is not None), default=None)
    equal = fitting if best is None else [c for c in fitting if c.ratio is not None and c.ratio <= best * (1 + TOLERANCE)]
    chosen = min(equal, key=lambda c: c.size_bytes)
    words = [f"'{chosen.name}' ships"]
    if chosen is not first:
        words.append(f"against '{first.name}': {_race_words(chosen, first, measures)}")
    faster = [c for c in candidates if c.ratio is not None and chosen.ratio is not None and c.ratio < chosen.ratio * (1 - TOLERANCE)]
    if faster:
        fastest = min(faster, key=lambda c: c.ratio or 0.0)
        why = (
            "misses more of the budget"
            if fastest in inside and fastest.missed > fewest
            else f"{'loses' if fastest.drop_ci[0] > allowed else 'may lose'} more than the {max(allowed, 0) * 100:.2f} points that are left"
            f" ({_drop_words(fastest.drop, fastest.drop_ci)})"
            if fastest not in inside and enabled
            else "is not rounded"
        )
        words.append(f"'{fastest.name}' is faster ({fastest.ratio:.2f}x) and {why}")
    return chosen, "; ".join(words)


def _race_words(c: Candidate, first: Candidate, measures: str) -> str:
    latency = "not timed" if c.ratio is None else f"{1 / c.ratio:.2f}x faster" if c.ratio < 1 else f"{c.ratio:.2f}x the latency"
    size = first.size_bytes / c.size_bytes
    weight = f"{size:.2f}x smaller" if size > 1 + TOLERANCE else f"{1 / size:.2f}x the size" if size < 1 - TOLERANCE else "of the same size"
    return f"{latency}, {weight}, {measures} {_drop_words(c.drop, c.drop_ci)}"


def _needed(gains: list[str], losses: list[str], e: Evidence) -> bool:
    """A loss is accepted only where the budget names what was gained, was not met without it, and does not name what was lost."""
    return bool(set(gains) & e.unmet) and not (set(losses) & e.wants)


def _change(ci: tuple[float, float] | None) -> tuple[bool, bool]:
    return (False, False) if ci is None else (ci[1] < 1, ci[0] > 1 + TOLERANCE)


def paired_drop(before: list[float], after: list[float]) -> tuple[float, tuple[float, float]]:
    """Mean of before - after over the same samples, with its 95 % interval.

    For scores of 0 and 1: the adjusted Wald interval of a paired difference (Agresti and Min 2005), honest for few samples; for other scores the
    normal interval of the mean difference.
    """
    n, diffs = len(before), [b - a for b, a in zip(before, after, strict=True)]
    drop = sum(diffs) / n
    if all(v in (0.0, 1.0) for v in (*before, *after)):
        lost, won = sum(d > 0 for d in diffs) + 0.5, sum(d < 0 for d in diffs) + 0.5
        m = n + 2
        middle, spread = (lost - won) / m, math.sqrt(max((lost + won) - (lost - won) ** 2 / m, 0)) / m
    else:
        middle, spread = drop, math.sqrt(sum((d - drop) ** 2 for d in diffs) / max(n - 1, 1) / n)
    return drop, (middle - _Z * spread, middle + _Z * spread)


def wants_of(budget: dict[str, Any]) -> frozenset[str]:
    """What a budget names: latency, size, both or nothing."""
    names = set()
    if budget.get("p50_ms") is not None or budget.get("p95_ms") is not None:
        names.add("latency")
    if budget.get("size_mb") is not None:
        names.add("size")
    return frozenset(names)


def _latency_words(e: Evidence) -> str:
    if e.ratio is None or e.ratio_ci is None:
        return f"latency not judged ({e.untimed})"
    if e.ratio_ci[1] < 1:
        return f"{1 / e.ratio:.2f}x faster"
    return (
        f"{e.ratio:.2f}x the latency"
        if e.ratio_ci[0] > 1 + TOLERANCE
        else f"latency unchanged ({e.ratio:.2f}x, 95 % {e.ratio_ci[0]:.2f} to {e.ratio_ci[1]:.2f})"
    )


def _size_words(e: Evidence) -> str:
    size = e.before_bytes / e.after_bytes
    return f"{size:.2f}x smaller" if size > 1 + TOLERANCE else f"{1 / size:.2f}x the size" if size < 1 - TOLERANCE else "size unchanged"


def _accuracy_words(e: Evidence) -> str:
    return f"{e.measures} {_drop_words(e.drop, e.drop_ci)}"


def _drop_words(drop: float, interval: tuple[float, float]) -> str:
    low, high = (v * 100 for v in interval)
    return f"{0.0 - drop * 100:+.2f} points on val (95 % {0.0 - high:+.2f} to {0.0 - low:+.2f})"  # 0 minus: no negative zero
