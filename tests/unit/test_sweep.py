"""Sweeps: which combinations there are, how they are compared, and what of a plan they run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from edgekd.errors import InputRefused, UsageError
from edgekd.plan import build_plan
from edgekd.recipe import load
from edgekd.sweep import ALONE, Cell, cells, compare, distinct, failed_row, measured_part, models_of, write_table
from tests.support import QUICKSTART


def row(variant: str, seed: int, value: float, **more: Any) -> dict[str, Any]:
    return {"variant": variant, "seed": seed, "metric_name": "top1", "val_top1": value, "error": ""} | more


def test_combinations_are_all_products_seed_by_seed_and_commas_in_brackets_belong_to_a_value() -> None:
    found = cells(["distill.method=kd,[kd, {nd: {weight: 2}}]", "distill.lr=0.1,0.2"], range(2))
    assert len(found) == 8
    assert [c.seed for c in found] == [0] * 4 + [1] * 4
    assert found[2] == Cell(("distill.method=[kd, {nd: {weight: 2}}]", "distill.lr=0.1"), 0)
    assert found[2].overrides[-1] == "seed=0"
    assert found[1].variant == "kd, 0.2"
    assert cells([], [3]) == [Cell((), 3)]
    assert cells([], [3])[0].variant == "as written"


@pytest.mark.parametrize("text", ["distill.method", "=kd", "distill.method=", "distill.method=,"])
def test_what_varies_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="varies nothing") as caught:
        cells([text], [0])
    assert caught.value.exit_code == 2


def test_a_comparison_is_paired_by_seed_with_the_t_interval_of_a_hand_calculation() -> None:
    rows = [row("kd", s, v) for s, v in enumerate((0.50, 0.60, 0.70))] + [row("ofa", s, v) for s, v in enumerate((0.53, 0.61, 0.75))]
    [kd, ofa] = compare(rows)
    assert (kd["seeds"], kd["metric"]) == (3, "val top1")
    assert kd["mean"] == pytest.approx(0.6)
    assert kd["standard_error"] == pytest.approx(0.1 / 3**0.5)
    assert "difference" not in kd
    assert ofa["difference"] == pytest.approx(0.03)
    half = 4.302652729911275 * 0.02 / 3**0.5  # t of 2 degrees of freedom; the differences 0.03, 0.01, 0.05 deviate by 0.02
    assert ofa["ci95"] == pytest.approx([0.03 - half, 0.03 + half])


def test_the_student_alone_comes_first_and_is_what_others_are_compared_with_unless_said_otherwise() -> None:
    rows = [row("kd", 0, 0.5), row(ALONE, 0, 0.4), row("ofa", 0, 0.7)]
    assert [(r["variant"], r.get("against")) for r in compare(rows)] == [(ALONE, None), ("kd", ALONE), ("ofa", ALONE)]
    assert compare(rows)[1]["ci95"] is None  # one seed says nothing of spread
    assert {r["variant"]: r.get("difference") for r in compare(rows, "kd")}["ofa"] == pytest.approx(0.2)
    with pytest.raises(UsageError, match="no variant 'dkd'"):
        compare(rows, "dkd")


def test_seeds_that_failed_are_left_out_of_the_pairs() -> None:
    rows = [row("kd", 0, 0.5), row("kd", 1, 0.9), row("ofa", 0, 0.6), failed_row(Cell(("distill.method=ofa",), 1), InputRefused("broken"))]
    ofa = compare(rows)[1]
    assert (ofa["seeds"], ofa["difference"]) == (1, pytest.approx(0.1))
    assert compare([rows[3]]) == []


def test_test_is_compared_only_where_every_row_has_it() -> None:
    rows = [row("kd", 0, 0.5, test_top1=0.4, test_ece=0.1), row("ofa", 0, 0.6, test_top1=0.7, test_ece=0.3)]
    assert [(r["metric"], r["mean"], r["ece"]) for r in compare(rows)] == [("test top1", 0.4, 0.1), ("test top1", 0.7, 0.3)]
    assert compare([rows[0], row("ofa", 0, 0.6)])[0]["metric"] == "val top1"


def test_the_table_is_whole_csv_with_every_column_and_each_model_once(tmp_path: Path) -> None:
    rows = distinct([row("kd", 0, 0.5), row(ALONE, 0, 0.4), row("ofa, x", 0, 0.6, test_top1=0.1), row(ALONE, 0, 0.4)])
    with write_table(rows, tmp_path).open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [r["variant"] for r in read] == ["kd", ALONE, "ofa, x"]
    assert [r["test_top1"] for r in read] == ["", "", "0.1"]


def test_only_what_trains_and_measures_the_model_is_run_and_test_only_where_asked(tmp_path: Path) -> None:
    plan = build_plan(load(QUICKSTART, ["baselines=[student]"]), cache_dir=tmp_path)
    names = models_of(plan, None)
    assert names == ["distill", ALONE]
    part = [s.name for s in measured_part(plan, names, test=False).steps]
    assert {"data", "teacher", "teacher.val", "distill", "distill.val", ALONE, f"{ALONE}.val"} <= set(part)
    assert not [n for n in part if n.startswith(("prune", "recover", "quantize", "host", "preflight")) or n.endswith(".test")]
    tested = measured_part(plan, names, test=True)
    assert {"distill.test", f"{ALONE}.test", "teacher.test"} == {s.name for s in tested.steps if s.name.endswith(".test")}
    assert tested.step("distill.test").inputs["teacher?"] == "teacher.test"
    assert tested.step("distill.test").settings.config.split == "test"  # type: ignore[union-attr]
    order = [s.name for s in tested.steps]
    for step in tested.steps:
        assert all(order.index(ref) < order.index(step.name) for ref in step.inputs.values() if isinstance(ref, str))


def test_a_model_behind_gates_brings_the_gates_along(tmp_path: Path) -> None:
    plan = build_plan(load(QUICKSTART, []), cache_dir=tmp_path)
    assert models_of(plan, "recover") == ["recover"]
    assert {"prune.widths", "prune", "recover", "recover.val"} <= {s.name for s in measured_part(plan, ["recover"], test=False).steps}
    with pytest.raises(UsageError, match="'nothing' is not measured") as caught:
        models_of(plan, "nothing")
    assert "distill" in str(caught.value.expected)
