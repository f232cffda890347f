"""The gate: every verdict from injected measurements, and its interval against an independent oracle."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.gate import Candidate, Evidence, helped, judge, overruled, paired_drop, pick, wants_of
from edgekd.profile.causes import slow_causes


def evidence(**changes: object) -> Evidence:
    base = {
        "before_bytes": 1000,
        "after_bytes": 500,
        "ratio": 0.5,
        "ratio_ci": (0.48, 0.52),
        "drop": 0.0,
        "drop_ci": (-0.01, 0.01),
        "allowed": 0.03,
    }
    return Evidence(**(base | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ({}, "kept", "2.00x faster, 2.00x smaller"),
        ({"ratio": 1.0, "ratio_ci": (0.99, 1.01)}, "kept", "latency unchanged"),
        ({"ratio": 1.2, "ratio_ci": (1.15, 1.25)}, "rolled back", "it made latency worse"),
        ({"ratio": 1.2, "ratio_ci": (1.15, 1.25), "wants": frozenset({"size"}), "unmet": frozenset({"size"})}, "kept", "1.20x the latency"),
        ({"ratio": 1.2, "ratio_ci": (1.15, 1.25), "wants": frozenset({"size"})}, "rolled back", "it made latency worse"),  # met without it
        ({"ratio": 1.2, "ratio_ci": (1.15, 1.25), "wants": frozenset({"latency"})}, "rolled back", "it made latency worse"),
        ({"after_bytes": 1000, "ratio": 1.0, "ratio_ci": (0.97, 1.03)}, "neutral", "no certain gain"),
        ({"ratio": 1.0, "ratio_ci": (0.97, 1.03), "wants": frozenset({"latency"})}, "neutral", "no certain gain in latency"),
        ({"after_bytes": 1500}, "rolled back", "it made size worse"),
        ({"after_bytes": 1500, "wants": frozenset({"latency"}), "unmet": frozenset({"latency"})}, "kept", "2.00x faster"),
        ({"after_bytes": 1500, "wants": frozenset({"latency"})}, "rolled back", "it made size worse"),
        ({"drop": 0.05, "drop_ci": (0.04, 0.06)}, "rolled back", "loses more than the 3.00 points"),
        ({"drop": 0.02, "drop_ci": (0.00, 0.04)}, "neutral", "may exceed the 3.00 points"),
        ({"drop": 0.035, "drop_ci": (0.00, 0.07)}, "rolled back", "may exceed"),
        ({"ratio": None, "ratio_ci": None, "untimed": "no device"}, "kept", "latency not judged (no device)"),
        ({"ratio": None, "ratio_ci": None, "after_bytes": 1000}, "neutral", "no certain gain"),
        ({"allowed": -0.02}, "rolled back", "accuracy is 2.00 points beyond the limit already where it starts"),
        ({"same": True}, "neutral", "changed nothing"),
    ],
)
def test_the_verdict_follows_from_the_measurements(changes: dict[str, object], verdict: str, words: str) -> None:
    found = judge(evidence(**changes))
    assert found.verdict == verdict
    assert words in found.reason
    assert found.chosen == ("after" if verdict == "kept" else "before")


def test_causes_are_read_from_the_graphs_that_lie_beside_engines_and_from_nothing_else(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    def engine(name: str, *ops: str) -> Path:
        names = ["x", *(f"t{i}" for i in range(len(ops)))]
        nodes = [helper.make_node(op, [names[i], *(["s"] if "Linear" in op else [])], [names[i + 1]]) for i, op in enumerate(ops)]
        values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, 4)) for n in ("x", names[-1])]
        scale = onnx.numpy_helper.from_array(np.float32(0.1), "s")
        (tmp_path / name).mkdir()
        onnx.save(helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], [scale])), tmp_path / name / "model.onnx")
        return tmp_path / name / "model.ort"

    before, after = engine("before", "Relu"), engine("after", "QuantizeLinear", "DequantizeLinear", "Relu")
    assert slow_causes(before, after, 1) == ["1 quantize and 1 dequantize nodes were added"]
    assert slow_causes(before, tmp_path / "elsewhere" / "model.engine", 1) == []


def test_causes_are_named_where_a_step_did_not_get_faster() -> None:
    slow = judge(evidence(ratio=1.2, ratio_ci=(1.15, 1.25), causes=("43 quantize nodes were added",)))
    assert "43 quantize nodes were added" in slow.reason


def test_a_verdict_always_has_a_reason_whatever_the_evidence() -> None:
    ratios = [(0.5, (0.4, 0.6)), (1.0, (0.9, 1.1)), (1.5, (1.4, 1.6)), (None, None)]
    drops = [(0.0, (-0.01, 0.01)), (0.02, (0.0, 0.05)), (0.1, (0.08, 0.12))]
    for (ratio, ci), size, (drop, drop_ci), wants in itertools.product(
        ratios, (500, 1000, 2000), drops, (frozenset(), {"latency"}, {"size"})
    ):
        found = judge(evidence(ratio=ratio, ratio_ci=ci, after_bytes=size, drop=drop, drop_ci=drop_ci, wants=frozenset(wants)))
        assert found.verdict in ("kept", "rolled back", "neutral")
        assert len(found.reason) > 20
        if found.verdict == "kept":
            assert drop_ci[1] <= 0.03


def test_the_paired_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng, n, truth, hits = np.random.default_rng(0), 270, 0.02, 0
    for _ in range(1500):
        before = (rng.random(n) < 0.95).astype(float)
        lost = (rng.random(n) < 0.03) & (before == 1)
        won = (rng.random(n) < (0.03 * 0.95 - truth) / 0.05) & (before == 0)
        after = before - lost + won
        low, high = paired_drop(before.tolist(), after.tolist())[1]
        hits += low <= truth <= high
    assert 0.93 <= hits / 1500 <= 0.985


def test_the_interval_of_continuous_scores_is_the_normal_one() -> None:
    rng = np.random.default_rng(1)
    before, after = rng.random(400), rng.random(400)
    drop, (low, high) = paired_drop(before.tolist(), after.tolist())
    d = before - after
    half = 1.959964 * d.std(ddof=1) / math.sqrt(400)
    assert drop == pytest.approx(d.mean(), rel=1e-9)
    assert (low, high) == pytest.approx((d.mean() - half, d.mean() + half), rel=1e-6)


def test_an_identical_pair_is_not_certain_for_few_samples() -> None:
    drop, (low, high) = paired_drop([1.0] * 20, [1.0] * 20)
    assert drop == 0
    assert low < 0 < high


def test_what_a_budget_names() -> None:
    assert wants_of({"p50_ms": None, "p95_ms": 3.0, "size_mb": None}) == {"latency"}
    assert wants_of({"size_mb": 1.0}) == {"size"}
    assert wants_of({}) == frozenset()


# ------------------------------------------------------------------------------------------------------------ races
def candidate(name: str, ratio: float | None, size: int = 1000, drop: float = 0.0, missed: int = 0) -> Candidate:
    ci = None if ratio is None else (ratio * 0.99, ratio * 1.01)
    return Candidate(name, size, ratio, ci, drop, (drop - 0.005, drop + 0.005), rounded="int8" in name, missed=missed)


FIRST = candidate("ort fp32", 1.0)


@pytest.mark.parametrize(
    ("others", "chosen", "words"),
    [
        ([candidate("ort int8", 0.5, 250), candidate("ov int8", 0.4, 250)], "ov int8", "2.50x faster, 4.00x smaller"),
        ([candidate("ov fp32", 0.7), candidate("ov int8", 0.4, 250, drop=0.02)], "ov fp32", "'ov int8' is faster (0.40x) and loses more"),
        ([candidate("ov int8", 0.4, 250, drop=0.008)], "ort fp32", "may lose more than the 1.00 points that are left"),
        ([candidate("ort int8", 1.01, 250)], "ort int8", "1.01x the latency, 4.00x smaller"),  # as fast, within tolerance, and smaller
        ([candidate("ort int8", 1.1, 250)], "ort fp32", "'ort fp32' ships"),
        ([candidate("ov fp32", None), candidate("ort int8", None, 250)], "ort fp32", "'ort fp32' ships"),  # what was not timed cannot win
        (
            [candidate("ov fp32", 0.5, drop=0.3)],
            "ort fp32",
            "'ov fp32' is faster (0.50x) and loses more",
        ),  # a runtime that computes wrongly
    ],
)
def test_a_race_ships_the_fastest_inside_the_limit(others: list[Candidate], chosen: str, words: str) -> None:
    found, reason = pick([FIRST, *others], 0.01)
    assert found.name == chosen
    assert words in reason


def test_a_race_meets_the_budget_before_it_is_fast() -> None:
    first = candidate("ort fp32", 1.0, missed=1)
    found, reason = pick([first, candidate("ort int8", 1.2, 250)], 0.01)
    assert found.name == "ort int8"
    assert "'ort fp32' is faster (1.00x) and misses more of the budget" in reason


def test_what_came_in_beyond_the_limit_still_races_in_fp32_and_not_rounded() -> None:
    found, _ = pick([FIRST, candidate("ov fp32", 0.5), candidate("ov int8", 0.1, 250)], -0.02)
    assert found.name == "ov fp32"


def test_without_a_gate_the_fastest_rounded_graph_ships_whatever_it_loses() -> None:
    found, reason = pick([FIRST, candidate("ov int8", 1.5, 250, drop=0.4)], 0.01, enabled=False)
    assert found.name == "ov int8"
    assert "is not rounded" in reason
    assert pick([FIRST, candidate("ov fp32", 0.5)], 0.01, enabled=False)[0].name == "ov fp32"


@given(st.data())
def test_what_ships_is_never_beaten_by_another_that_was_allowed(data: st.DataObject) -> None:
    names = ["ort fp32", "ov fp32", "ort int8", "ov int8"]
    rest = [
        candidate(n, data.draw(st.floats(0.1, 3)), data.draw(st.integers(1, 2000)), data.draw(st.floats(-0.05, 0.05))) for n in names[1:]
    ]
    chosen, _ = pick([FIRST, *rest], 0.01)
    for other in (FIRST, *rest):
        allowed = other.drop_ci[1] <= 0.01 if other.rounded else other.drop_ci[0] <= 0.01
        assert not (allowed and other.ratio < 0.98 * chosen.ratio), (chosen, other)  # type: ignore[operator]


# ------------------------------------------------------------------------------------------------------------ an assistant
@pytest.mark.parametrize(
    ("interval", "verdict", "words"),
    [
        ((-0.03, -0.01), "kept", "accuracy +2.00 points on val (95 % +1.00 to +3.00)"),
        ((-0.05, 0.01), "neutral", "no certain gain"),
        ((-0.04, 0.0), "neutral", "no certain gain"),
        ((0.01, 0.03), "rolled back", "the assistant did not help"),
    ],
)
def test_an_assistant_stays_where_the_student_is_certainly_better(interval: tuple[float, float], verdict: str, words: str) -> None:
    found = helped(sum(interval) / 2, interval, "accuracy")
    assert found.verdict == verdict
    assert words in found.reason
    assert found.chosen == ("after" if verdict == "kept" else "before")
    off = overruled(found)
    assert off.chosen == "after"
    assert f"it would say '{verdict}'" in off.reason
