"""The smallest uniform ratio that reaches a goal, in few evaluations; each may cost a cut, an export and a measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Literal

from edgekd.errors import EdgekdError, UsageError

Goal = Literal["macs", "params", "speedup"]

_INNER = 0.1  # a guess stays this share of the bracket away from its ends, else one bad slope stalls the search
_FIRST_STEP = 0.5  # of the way to the largest ratio, while no slope is known


@dataclass(frozen=True)
class Found:
    """What the search ended with. value: of `ratio`; trials: every (ratio, value) evaluated, in order; reason: why it ended."""

    ratio: float
    value: float
    met: bool
    reason: str
    trials: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Limits:
    """evaluations: at most so many; largest: ratio; resolution: of the ratio; slack: overshoot of the goal that is close enough."""

    evaluations: int = 10
    largest: float = 0.9
    resolution: float = 0.01
    slack: float = 0.01


def find_ratio(evaluate: Callable[[float], float], goal: Goal, target: float, *, limits: Limits | None = None) -> Found:
    """The smallest ratio (share of every width removed) found to reach the target.

    goal: `macs` and `params` are the fraction kept, at most `target`; `speedup` is at least `target`. evaluate(ratio) gives that value
    and may be noisy; ratio 0 is 1 by definition and not evaluated. Where even the largest ratio falls short, it is returned with met False.
    """
    _check(goal, target)
    search = _Search(evaluate, 1.0 if goal == "speedup" else -1.0, target, limits or Limits())
    return search.run()


def _check(goal: Goal, target: float) -> None:
    if not isfinite(target) or target <= 0 or (goal != "speedup" and target > 1):
        expected = "a factor above 0" if goal == "speedup" else "a fraction between 0 and 1"
        raise UsageError(f"{goal} cannot become {target}", where="prune.target", expected=expected)


class _Search:
    """A bracket of a ratio that falls short and one that reaches the goal, closed from both sides."""

    def __init__(self, evaluate: Callable[[float], float], sign: float, target: float, limits: Limits):
        self._evaluate, self._sign, self._target, self._limits = evaluate, sign, target, limits
        self._short = (0.0, 1.0)  # ratio and value
        self._enough: tuple[float, float] | None = None
        self._trials: list[tuple[float, float]] = []

    def run(self) -> Found:
        if self._gap(1.0) >= 0:
            return Found(0.0, 1.0, True, "nothing has to be removed", ())
        while (reason := self._done()) is None:
            self._try(self._guess())
        ratio, value = self._enough or max(self._trials, key=lambda trial: self._gap(trial[1]))
        return Found(ratio, value, self._enough is not None, reason, tuple(self._trials))

    def _gap(self, value: float) -> float:
        """How far a value is past the goal; negative where it falls short."""
        return self._sign * (value - self._target)

    def _done(self) -> str | None:
        limits = self._limits
        if self._enough is not None:
            if self._gap(self._enough[1]) <= limits.slack * self._target:
                return "the goal is met closely"
            if self._enough[0] - self._short[0] <= limits.resolution:
                return "a smaller ratio falls short"
        elif self._short[0] >= limits.largest:
            best = max((value for _, value in self._trials), key=self._gap)
            return f"removing {limits.largest:.0%} of every width gives {best:.3g}, the target is {self._target:.3g}"
        if len(self._trials) >= limits.evaluations:
            return f"{limits.evaluations} evaluations are used up"
        return None

    def _try(self, ratio: float) -> None:
        value = self._evaluate(ratio)
        if not isfinite(value):
            raise EdgekdError(f"ratio {ratio:.3f} evaluates to {value}", where="prune.target")
        self._trials.append((ratio, value))
        if self._gap(value) >= 0:
            self._enough = (ratio, value)
        else:
            self._short = (ratio, value)

    def _guess(self) -> float:
        """Where a line through both ends meets the goal; every third time the middle, which a noisy value cannot mislead."""
        low, high = self._short[0], self._enough[0] if self._enough else self._limits.largest
        if self._enough is None and len(self._trials) == self._limits.evaluations - 1:
            return high  # the last chance to meet the goal at all
        if self._enough is None:
            return self._outward(low, high)
        if len(self._trials) % 3 == 2:
            return (low + high) / 2
        below, above = -self._gap(self._short[1]), self._gap(self._enough[1])
        share = below / (below + above)
        return low + (high - low) * min(1 - _INNER, max(_INNER, share))

    def _outward(self, low: float, high: float) -> float:
        """Beyond everything tried so far, along the line from ratio 0."""
        gain = self._gap(self._short[1]) - self._gap(1.0)
        if low == 0 or gain <= 0:
            return high if low > 0 else low + (high - low) * _FIRST_STEP
        ratio = low * -self._gap(1.0) / gain * (1 + _INNER)
        return high if high - ratio < self._limits.resolution else max(ratio, low + self._limits.resolution)
