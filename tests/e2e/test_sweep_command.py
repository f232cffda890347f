"""`edgekd sweep` as a user runs it: methods and seeds compared, failures as rows, nothing trained twice."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.support import QUICKSTART, TINY, run_here

pytestmark = pytest.mark.usefixtures("stored")
SWEEP = ("sweep", QUICKSTART, *TINY, "-o", "baselines=[student]", "--no-gate", "--vary", "distill.method=kd,fitnet", "--json")


def test_methods_are_compared_what_fails_is_a_row_and_a_second_sweep_trains_only_what_is_new(tmp_path: Path) -> None:
    first = run_here(*SWEEP, "--out", tmp_path / "one")
    found = first.json()
    assert (first.code, found["failed"]) == (2, 1)  # fitnet is not made for a ViT teacher
    by_variant = {r["variant"]: r for r in found["rows"]}
    assert set(by_variant) == {"kd", "fitnet", "student alone"}
    assert "not made for the pair ViT teacher, CNN student" in by_variant["fitnet"]["error"]
    assert 0 <= by_variant["kd"]["val_top1"] <= 1
    assert "test_top1" not in by_variant["kd"]
    assert [r["variant"] for r in found["comparison"]] == ["student alone", "kd"]
    with (tmp_path / "one" / "sweep.csv").open(newline="") as file:
        assert [r["variant"] for r in csv.DictReader(file)] == ["kd", "student alone", "fitnet"]

    again = run_here(*SWEEP[:-3], "--vary", "distill.method=kd", "--test", "--against", "kd", "--out", tmp_path / "two")
    assert again.code == 0
    assert "] distill\n" not in again.err  # the same model, from the store
    assert "] distill.test\n" in again.err
    table = again.out.splitlines()
    assert table[0].split()[:3] == ["variant", "seeds", "metric"]
    assert "test top1" in table[1]
    auto = run_here(*SWEEP[:-3], "--vary", "distill.method=auto", "--json", "--out", tmp_path / "three")
    assert auto.code == 0, auto.err
    assert {r["variant"] for r in auto.json()["rows"]} == {"auto", "student alone"}


def test_a_sweep_in_which_everything_fails_ends_as_the_failure_does(tmp_path: Path) -> None:
    said = run_here(*SWEEP[:-3], "--vary", "distill.method=fitnet", "--out", tmp_path / "none")
    assert said.code == 2
    assert "not made for the pair" in said.text
    unknown = run_here(*SWEEP[:-3], "--vary", "distill.method=kd,offa", "--out", tmp_path / "bad")
    assert unknown.code == 2
    assert "ofa" in unknown.text  # did you mean
    assert not (tmp_path / "bad").exists()  # before anything was trained
