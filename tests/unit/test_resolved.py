"""run.json's resolved recipe: one row a value, with what was measured in place of what was left open, and where it came from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgekd.backends.openvino import OpenVino
from edgekd.plan import build_plan
from edgekd.recipe import load
from edgekd.run import Done
from edgekd.summary import _Summary

HEAD = "version: 1\ndata: {format: digits, image_size: 32}\nmodel: {arch: resnet10t}\n"
TRIAL: dict[str, Any] = {"keep": ["last"], "calibration": "percentile"}
MIX: dict[str, Any] = {"keep": ["first", "second"]}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(OpenVino, "available", lambda self: "not installed")


def resolved(stage: str, decisions: dict[str, dict[str, Any]], *overrides: str, targets: str = "host: {}") -> dict[str, tuple[Any, str]]:
    """Path -> (value, source), once the steps' decisions are these."""
    Path("r.yaml").write_text(f"{HEAD}stages: [{{quantize: {{{stage}}}}}]\ntargets: {{{targets}}}\n")
    summary, done = _Summary.__new__(_Summary), Done()
    summary.plan, summary.done = build_plan(load("r.yaml", overrides)), done
    everything = {"quantize.gate": {"chosen": "after"}} | decisions
    done.artifacts.update({name: SimpleNamespace(json=lambda _, body=body: body) for name, body in everything.items()})
    rows = summary._resolved()
    assert len({r["path"] for r in rows}) == len(rows)
    return {r["path"]: (r["value"], r["source"]) for r in rows}


def test_what_was_found_takes_the_place_of_what_was_left_open_with_the_step_that_found_it() -> None:
    rows = resolved("search: 4", {"quantize.mix": MIX, "quantize.trial": TRIAL})
    assert rows["quantize.calibration"] == ("percentile", "measured by quantize.trial")
    assert rows["quantize.keep_nodes"] == (["first", "last", "second"], "measured by quantize.mix, measured by quantize.trial")
    assert rows["quantize.search"] == (4, "r.yaml:4:22")


def test_what_the_user_gave_keeps_its_origin() -> None:
    rows = resolved("calibration: entropy", {"quantize.trial": TRIAL | {"calibration": "entropy"}}, "quantize.keep_nodes=[stem]")
    assert rows["quantize.calibration"] == ("entropy", "r.yaml:4:22")
    assert rows["quantize.keep_nodes"] == (["stem", "last"], "-o quantize.keep_nodes=[stem], measured by quantize.trial")


def test_a_decision_that_keeps_no_node_is_no_origin_of_any() -> None:
    rows = resolved("search: 4", {"quantize.mix": MIX | {"keep": []}, "quantize.trial": TRIAL})
    assert rows["quantize.keep_nodes"] == (["last"], "measured by quantize.trial")


def test_what_did_not_ship_changes_nothing_in_the_recipe() -> None:
    rows = resolved("", {"quantize.gate": {"chosen": "before"}, "quantize.trial": TRIAL})
    assert rows["quantize.calibration"] == ("auto", "default")
    assert rows["quantize.keep_nodes"] == ([], "default")


def test_of_several_targets_each_has_what_was_found_for_it() -> None:
    decisions: dict[str, dict[str, Any]] = {
        "quantize.trial": TRIAL,
        "quantize@rpi5.trial": TRIAL | {"calibration": "minmax"},
        "quantize@rpi5.gate": {"chosen": "after"},
    }
    rows = resolved("", decisions, targets="host: {}, rpi5: {}")
    assert rows["quantize.calibration"] == ("auto", "default")
    assert rows["quantize (host).calibration"] == ("percentile", "measured by quantize.trial")
    assert rows["quantize (rpi5).calibration"] == ("minmax", "measured by quantize@rpi5.trial")
