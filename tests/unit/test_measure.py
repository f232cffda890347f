"""The measuring protocol on synthetic clocks: series told apart (G15), intervals against an oracle, interleaving, warm-up, budgets."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgekd.errors import UsageError
from edgekd.profile.measure import Samples, measure, ratio
from edgekd.profile.series import classify

N = 400


def _noise(seed: int, base: float = 5.0, sigma: float = 0.02, n: int = N) -> np.ndarray:
    return base * np.exp(np.random.default_rng(seed).normal(0, sigma, n))


def _stable(i: int) -> np.ndarray:
    return _noise(i, base=(0.05, 1.0, 5.0, 40.0, 900.0)[i], sigma=(0.003, 0.01, 0.02, 0.04, 0.05)[i])


def _drifting(i: int) -> np.ndarray:
    rise = (0.2, 0.4, 0.8, -0.15, -0.4)[i]
    return _noise(i) * (1 + rise * np.arange(N) / N)


def _throttled(i: int) -> np.ndarray:
    at, factor = ((0.3, 1.2), (0.5, 1.5), (0.7, 2.0), (0.4, 3.0), (0.6, 1.3))[i]
    return _noise(i) * np.where(np.arange(N) >= at * N, factor, 1.0)


def _bimodal(i: int) -> np.ndarray:
    share, factor = ((0.5, 1.3), (0.3, 1.5), (0.25, 1.7), (0.6, 1.4), (0.4, 1.35))[i]
    return _noise(i) * np.where(np.random.default_rng(100 + i).random(N) < share, factor, 1.0)


def _spiky(i: int) -> np.ndarray:
    share, factor = ((0.02, 3.0), (0.03, 10.0), (0.05, 2.5), (0.02, 40.0), (0.06, 4.0))[i]
    spikes = np.zeros(N, dtype=bool)
    spikes[np.random.default_rng(200 + i).permutation(N)[: round(share * N)]] = True  # collections, interrupts
    return _noise(i) * np.where(spikes, factor, 1.0)


TRACES: dict[str, Callable[[int], np.ndarray]] = {
    "stable": _stable, "drifting": _drifting, "throttled": _throttled, "bimodal": _bimodal, "spiky": _spiky,
}  # fmt: skip


@pytest.mark.parametrize("i", range(5))
@pytest.mark.parametrize("kind", TRACES)
def test_synthetic_trace_is_classified(kind: str, i: int) -> None:
    assert classify(TRACES[kind](i).tolist()) == kind


@pytest.mark.parametrize("i", range(5))
@pytest.mark.parametrize("kind", ["drifting", "throttled", "bimodal"])
def test_unstable_trace_is_never_trusted_with_a_budget(kind: str, i: int) -> None:
    assert not Samples(tuple(TRACES[kind](i))).trustworthy


@pytest.mark.parametrize("i", range(5))
def test_spikes_leave_the_median_trustworthy_and_show_in_p99(i: int) -> None:
    spiky, calm = Samples(tuple(_spiky(i))), Samples(tuple(_noise(i)))
    assert spiky.trustworthy
    assert spiky.summary()["p50"] == pytest.approx(calm.summary()["p50"], rel=0.01)
    assert spiky.summary()["p99"] > 1.5 * calm.summary()["p99"]


def test_slow_switching_between_two_speeds_is_not_stable() -> None:
    states = np.repeat([0, 1, 0, 1, 1, 0, 1, 0], N // 8)
    assert classify((_noise(1) * (1 + 0.4 * states)).tolist()) == "bimodal"


def test_incomplete_series_prints_no_number_and_is_not_trusted() -> None:
    cut = Samples(tuple(_noise(0)[:20]), incomplete=True)
    assert not cut.trustworthy
    assert {k: cut.summary()[k] for k in ("p50", "p95", "p99", "mean", "ci95", "series")} == {
        "p50": None, "p95": None, "p99": None, "mean": None, "ci95": None, "series": "incomplete",
    }  # fmt: skip
    assert ratio(cut, cut) == {"ratio": None, "ci95": None}


def _oracle(rounds: list[list[list[float]]], seed: int) -> np.ndarray:
    """Percentile interval of the median (or ratio of medians), one resample of rounds at a time, in plain Python."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(4000):
        picked = rng.integers(0, len(rounds[0]), len(rounds[0]))
        medians = [np.median([t for r in picked for t in series[r]]) for series in rounds]
        found.append(medians[0] if len(medians) == 1 else medians[0] / medians[1])
    return np.percentile(found, (2.5, 97.5))


def _by_round(seed: int, base: float) -> list[list[float]]:
    """Rounds that share a disturbance, as blocks on a shared machine do."""
    level = np.exp(np.random.default_rng(1).normal(0, 0.05, 30))
    return (base * level[:, None] * np.exp(np.random.default_rng(seed).normal(0, 0.01, (30, 7)))).tolist()


def _samples(rounds: list[list[float]]) -> Samples:
    return Samples(tuple(t for r in rounds for t in r), len(rounds[0]))


def test_interval_of_the_median_agrees_with_a_plain_bootstrap_over_rounds() -> None:
    rounds = _by_round(2, 10.0)
    low, high = _oracle([rounds], seed=9)
    summary = _samples(rounds).summary()
    assert summary["ci95"] == pytest.approx([low, high], abs=0.15 * (high - low))  # two sets of 1000 and 4000 draws
    assert summary["p50"] == pytest.approx(np.median(rounds))


def test_interval_over_rounds_is_wider_than_one_that_takes_samples_for_independent() -> None:
    rounds = _by_round(2, 10.0)
    one_by_one = Samples(_samples(rounds).ms, block=1).summary()["ci95"]
    by_round = _samples(rounds).summary()["ci95"]
    assert np.diff(by_round) > 1.3 * np.diff(one_by_one)


def test_ratio_is_paired_by_round_and_agrees_with_a_plain_bootstrap() -> None:
    a, b = _by_round(3, 8.0), _by_round(4, 10.0)
    low, high = _oracle([a, b], seed=5)
    found = ratio(_samples(a), _samples(b))
    assert found["ratio"] == pytest.approx(np.median(a) / np.median(b))
    assert found["ci95"] == pytest.approx([low, high], abs=0.15 * (high - low))
    alone = _samples(a).summary()["ci95"]
    assert found["ci95"][1] - found["ci95"][0] < 0.5 * (alone[1] - alone[0]) / 10.0  # what both rounds share cancels


def test_percentiles_are_numpys() -> None:
    ms = _noise(7)
    summary = Samples(tuple(ms)).summary()
    assert [summary["p50"], summary["p95"], summary["p99"]] == pytest.approx(np.percentile(ms, (50, 95, 99)).tolist())
    assert (summary["mean"], summary["n"]) == (pytest.approx(ms.mean()), N)


class Bench:
    """A clock that only sessions move, and what ran when."""

    def __init__(self) -> None:
        self.now, self.log = 0, list[str]()

    def clock(self) -> int:
        return self.now

    def session(self, name: str, cost_ms: Callable[[int], float]) -> Any:
        bench, calls = self, iter(range(10**9))

        class Fake:
            input_names = output_names = ["x"]

            def run(self, feeds: Any) -> list[Any]:
                bench.log.append(name)
                bench.now += round(cost_ms(next(calls)) * 1e6)
                return []

            def close(self) -> None: ...

        return Fake()


def _measure(bench: Bench, costs: dict[str, Callable[[int], float]], **options: Any) -> dict[str, Samples]:
    sessions = {name: bench.session(name, cost) for name, cost in costs.items()}
    return measure(sessions, {name: {} for name in costs}, clock=bench.clock, **options)


def _jitter(seed: int, base: float) -> Callable[[int], float]:
    values = _noise(seed, base, 0.02, 5000).tolist()
    return lambda i: values[i % 5000]


def test_blocks_are_interleaved_and_every_first_run_after_a_switch_is_discarded() -> None:
    bench = Bench()

    def cold(name: str) -> Callable[[int], float]:
        def cost(_: int) -> float:
            switched = len(bench.log) < 2 or bench.log[-2] != name
            return 50.0 if switched else 2.0

        return cost

    found = _measure(bench, {"a": cold("a"), "b": cold("b")}, budget_s=2.0)
    assert set(found["a"].ms) == {2.0}
    assert set(found["b"].ms) == {2.0}
    switches = sum(x != y for x, y in zip(bench.log, bench.log[1:], strict=False))
    assert switches >= 10


def test_both_sessions_get_the_same_rounds_and_their_order_is_shuffled() -> None:
    bench = Bench()
    found = _measure(bench, {"a": _jitter(1, 1.0), "b": _jitter(2, 4.0)}, budget_s=1.0)
    assert len(found["a"].ms) // found["a"].block == len(found["b"].ms) // found["b"].block
    assert found["a"].block > found["b"].block  # about equal time
    firsts = {tuple(bench.log[i : i + 2]) for i in range(len(bench.log) - 1)}
    assert {("a", "b"), ("b", "a")} <= firsts


def test_warm_up_lasts_until_the_rolling_median_settles() -> None:
    slow_start = lambda i: 10.0 if i < 40 else (10.0 - 0.5 * (i - 40) if i < 52 else 4.0)  # noqa: E731
    always = lambda i: 4.0  # noqa: E731
    ramp = lambda i: max(4.0, 20.0 * 0.9**i)  # noqa: E731
    assert _measure(Bench(), {"a": always})["a"].warmup == 10
    warm = _measure(Bench(), {"a": ramp}, budget_s=60.0)["a"]
    assert warm.warmup >= 15
    assert warm.summary()["p50"] == 4.0
    assert _measure(Bench(), {"a": slow_start}, budget_s=60.0)["a"].summary()["p50"] == 4.0


def test_a_session_that_never_settles_warms_up_for_a_bounded_time() -> None:
    bench = Bench()
    found = _measure(bench, {"a": lambda i: 1.0 + i}, budget_s=1.0)
    assert found["a"].warmup < 60
    assert not found["a"].trustworthy


def test_measuring_stops_early_once_the_median_is_known() -> None:
    bench = Bench()
    _measure(bench, {"a": _jitter(3, 1.0)}, budget_s=1000.0)
    assert bench.now < 5e9


def test_rounds_beyond_the_hard_limit_are_given_up_as_incomplete() -> None:
    bench = Bench()
    found = _measure(bench, {"a": lambda i: 3000.0}, budget_s=1.0, min_rounds=10)
    assert found["a"].incomplete
    assert found["a"].summary()["p50"] is None
    assert bench.now < 60e9


def test_slow_sessions_still_get_their_minimum_of_rounds() -> None:
    found = _measure(Bench(), {"a": _jitter(4, 60.0)}, budget_s=1.0, min_rounds=10)
    assert not found["a"].incomplete
    assert len(found["a"].ms) >= 10


def test_an_unsteady_first_half_counts_as_warm_up_if_the_rest_is_steady() -> None:
    rng = np.random.default_rng(0)

    def settles(i: int) -> float:
        return (6.0 if i < 35 else 4.0) * float(np.exp(rng.normal(0, 0.01)))

    found = _measure(Bench(), {"a": settles}, budget_s=8.0, max_rounds=60, min_rounds=10)
    samples = found["a"]
    assert samples.series == "stable"
    assert samples.warmup >= 100
    assert samples.summary()["p50"] == pytest.approx(4.0, rel=0.02)


def test_no_garbage_is_collected_while_measuring_and_the_collector_is_put_back() -> None:
    seen: list[bool] = []
    _measure(Bench(), {"a": lambda i: seen.append(gc.isenabled()) or 1.0}, budget_s=0.1)  # type: ignore[func-returns-value]
    assert not any(seen)
    assert gc.isenabled()


@pytest.mark.parametrize("feeds", [{}, {"b": {}}])
def test_sessions_without_feeds_are_a_usage_error(feeds: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="feeds for each"):
        measure({"a": Bench().session("a", lambda i: 1.0)}, feeds)
    with pytest.raises(UsageError, match="at least one session"):
        measure({}, {})
