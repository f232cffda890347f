"""Protocol edgekd.measure/1: warm, interleaved, in blocks; medians with intervals, and series that are not steady marked as such.

Every session warms up until its rolling median settles. Then rounds follow: in each, every session in shuffled order runs one short block,
whose first run is discarded (it finds the other sessions' data in the caches). Rounds are the unit of resampling, so that what disturbs a
whole block does not count as many independent observations. Times are milliseconds.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd.errors import UsageError
from edgekd.profile.series import Series, classify

if TYPE_CHECKING:
    from edgekd.backends import Feeds, Session

PROTOCOL = "edgekd.measure/1"
Clock = Callable[[], int]  # monotonic, nanoseconds

_WARM_WINDOW, _WARM_CHANGE = 5, 0.03  # runs per window; settled when two windows' medians differ by less
_WARM_MAX_RUNS, _WARM_BUDGET_SHARE = 200, 0.2  # the share is of the budget, for all sessions together
_BLOCK_NS, _BLOCK_MIN, _BLOCK_MAX = 20_000_000, 3, 50  # a block lasts about 20 ms
_ENOUGH = 0.01  # stop when the interval of every median is this narrow on both sides
_HARD_LIMIT = 20  # times the budget: the end even for fewer than min_rounds; a slow model (0.5 s an image) still gets them
_RESAMPLES = 1000


@dataclass(frozen=True)
class Samples:
    """Kept times of one session in order: `ms[i]` belongs to round `i // block`; `incomplete` if they were cut off."""

    ms: tuple[float, ...]
    block: int = 1
    warmup: int = 0
    incomplete: bool = False
    seed: int = 0

    @property
    def series(self) -> Series:
        """What the samples look like in time."""
        return classify(self.ms)

    @property
    def trustworthy(self) -> bool:
        """True if a budget may be judged: complete, and steady; spikes only ever make p95 and p99 worse, so they may stay."""
        return not self.incomplete and self.series in ("stable", "spiky")

    def summary(self) -> dict[str, Any]:
        """`p50`, `p95`, `p99`, `mean`, `ci95` of the median, `n`, `series`; no number at all for an incomplete series."""
        import numpy as np

        if self.incomplete or not self.ms:
            return {"p50": None, "p95": None, "p99": None, "mean": None, "ci95": None, "n": len(self.ms), "series": "incomplete"}
        p50, p95, p99 = (float(v) for v in np.percentile(self.ms, (50, 95, 99)))
        low, high = np.percentile(_medians(_rounds(self), _draws(len(self.ms) // self.block, self.seed)), (2.5, 97.5))
        spread = {"p50": p50, "p95": p95, "p99": p99, "mean": float(np.mean(self.ms)), "ci95": [float(low), float(high)]}
        return {**spread, "n": len(self.ms), "series": self.series}


def measure(
    sessions: Mapping[str, Session],
    feeds: Mapping[str, Feeds],
    *,
    budget_s: float = 10.0,
    min_rounds: int = 10,
    max_rounds: int = 200,
    seed: int = 0,
    clock: Clock = time.perf_counter_ns,
) -> dict[str, Samples]:
    """Times of all sessions, interleaved; stops when every median is known within 1 % or the budget is spent.

    `min_rounds` are made even beyond the budget, up to twenty times it; fewer than that is `incomplete`. Raises UsageError for no session,
    and whatever a session raises.
    """
    if not sessions or set(sessions) != set(feeds):
        raise UsageError("a measurement needs at least one session, and feeds for each of them")
    runs = {name: _runner(session, feeds[name], clock) for name, session in sessions.items()}
    start, budget_ns = clock(), round(budget_s * 1e9)
    with _no_gc():
        warm = {name: _warm_up(run, clock, budget_ns * _WARM_BUDGET_SHARE / len(runs)) for name, run in runs.items()}
        blocks = {name: _block(last_ns) for name, (_, last_ns) in warm.items()}
        times = _interleave(runs, blocks, _Stop(start, budget_ns, min_rounds, max_rounds, clock), seed)
    done = len(next(iter(times.values())))
    skip = _unsettled(times, done, min_rounds)
    return {
        name: Samples(
            tuple(t for r in rounds[skip:] for t in r), blocks[name], warm[name][0] + skip * blocks[name], done < min_rounds, seed
        )
        for name, rounds in times.items()
    }


def ratio(a: Samples, b: Samples, *, seed: int = 0) -> dict[str, Any]:
    """`ratio` of the medians a / b and its `ci95`, resampling the same rounds of both; below 1 where `a` is faster."""
    import numpy as np

    rounds = min(len(a.ms) // a.block, len(b.ms) // b.block)
    if rounds == 0 or a.incomplete or b.incomplete:
        return {"ratio": None, "ci95": None}
    left, right, draws = _rounds(a)[:rounds], _rounds(b)[:rounds], _draws(rounds, seed)
    low, high = np.percentile(_medians(left, draws) / _medians(right, draws), (2.5, 97.5))
    return {"ratio": float(np.median(left) / np.median(right)), "ci95": [float(low), float(high)]}


@dataclass(frozen=True)
class _Stop:
    """When the rounds end."""

    start: int
    budget_ns: int
    min_rounds: int
    max_rounds: int
    clock: Clock

    def __call__(self, times: Mapping[str, Sequence[Sequence[float]]], done: int) -> bool:
        spent = self.clock() - self.start
        if done >= self.max_rounds or spent > _HARD_LIMIT * self.budget_ns:
            return True
        if done < self.min_rounds:
            return False
        return spent > self.budget_ns or (done % self.min_rounds == 0 and all(_known(rounds) for rounds in times.values()))


def _runner(session: Session, feeds: Feeds, clock: Clock) -> Callable[[], int]:
    def run() -> int:
        start = clock()
        session.run(feeds)
        return clock() - start

    return run


def _warm_up(run: Callable[[], int], clock: Clock, budget_ns: float) -> tuple[int, float]:
    """(runs made, last window's median in nanoseconds)."""
    import numpy as np

    start, count, before = clock(), 0, 0.0
    while True:
        now = float(np.median([run() for _ in range(_WARM_WINDOW)]))
        count += _WARM_WINDOW
        settled = before > 0 and abs(now - before) < _WARM_CHANGE * before
        if settled or count >= _WARM_MAX_RUNS or clock() - start > budget_ns:
            return count, now
        before = now


def _block(run_ns: float) -> int:
    return int(min(max(_BLOCK_NS // max(run_ns, 1.0), _BLOCK_MIN), _BLOCK_MAX))


def _interleave(runs: Mapping[str, Callable[[], int]], blocks: Mapping[str, int], stop: _Stop, seed: int) -> dict[str, list[list[float]]]:
    """Milliseconds by session and round; every session has the same number of rounds."""
    import numpy as np

    order, rng = list(runs), np.random.default_rng(seed)
    times: dict[str, list[list[float]]] = {name: [] for name in runs}
    done = 0
    while not stop(times, done):
        for name in rng.permutation(order):  # no session always follows the same one
            runs[name]()  # the first run after a switch finds cold caches
            times[name].append([runs[name]() / 1e6 for _ in range(blocks[name])])
        done += 1
    return times


def _known(rounds: Sequence[Sequence[float]]) -> bool:
    """True if the series is steady and its median known within 1 %."""
    samples = Samples(tuple(t for r in rounds for t in r), len(rounds[0]))
    summary = samples.summary()
    low, high = summary["ci95"]
    return samples.trustworthy and max(high - summary["p50"], summary["p50"] - low) <= _ENOUGH * float(summary["p50"])


def _unsettled(times: Mapping[str, Sequence[Sequence[float]]], done: int, min_rounds: int) -> int:
    """Leading rounds to count as warm-up: the first half, if a session is unsteady over all of them and steady over the rest."""
    half = done // 2
    if done - half < min_rounds or _all_steady(times, 0) or not _all_steady(times, half):
        return 0
    return half


def _all_steady(times: Mapping[str, Sequence[Sequence[float]]], skip: int) -> bool:
    return all(classify([t for r in rounds[skip:] for t in r]) in ("stable", "spiky") for rounds in times.values())


def _rounds(samples: Samples) -> Any:
    """(rounds, block) array."""
    import numpy as np

    return np.asarray(samples.ms, dtype=np.float64).reshape(-1, samples.block)


def _draws(rounds: int, seed: int) -> Any:
    """(resamples, rounds) indices of rounds, drawn with replacement."""
    import numpy as np

    return np.random.default_rng(seed).integers(0, rounds, (_RESAMPLES, rounds))


def _medians(rounds: Any, draws: Any) -> Any:
    """Median of each resample, (resamples,)."""
    import numpy as np

    return np.median(rounds[draws].reshape(len(draws), -1), axis=1)


@contextmanager
def _no_gc() -> Iterator[None]:
    """No collection inside a timed run; one before, so that none is due."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
