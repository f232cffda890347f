"""The trial: which calibration is chosen, and when nodes go back to higher precision."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgekd.context import Stop
from edgekd.stages.quantize import _warn_of_few
from edgekd.stages.trial import Trial, _Trial


def trial(deltas: dict[str, tuple[float, float]], *, ok: bool = True, **config: Any) -> Any:
    """A trial whose graphs change the metric, 0.9 in fp32, and the outputs by these amounts."""
    found = _Trial.__new__(_Trial)
    found.config, found.settings, found.calibration = Trial.Config(**config), SimpleNamespace(name="quantize.trial"), "auto"
    found.ctx = SimpleNamespace(stop=Stop())
    found.task = SimpleNamespace(scores=lambda outputs, labels: np.full(10, 0.9))
    found.wanted = found.labels = None
    found.calls, found.large = [], set()

    def compared(keep: set[str]) -> dict[str, Any]:
        found.calls.append((found.calibration, len(keep)))
        delta, error = deltas[str(found.calibration)]
        return {
            "metric_delta": delta,
            "mean_abs": error,
            "ok": ok,
            "cosine": 1.0,
            "covariation": 1.0,
            "agreement": 1.0,
            "clear_agreement": 1.0,
            "max_relative": 0.0,
            "precision": "int8",
        }

    found._compared = compared
    return found


def test_ranges_that_lose_nothing_are_taken_without_trying_others() -> None:
    t = trial({"minmax": (0.0, 0.2)})
    decision = t.run()
    assert (decision["calibration"], decision["keep"], decision["reason"]) == ("minmax", [], "")
    assert t.calls == [("minmax", 0)]  # what was seen once is not built again


@pytest.mark.parametrize(
    ("deltas", "chosen"),
    [
        ({"minmax": (-0.02, 0.2), "entropy": (-0.05, 0.1), "percentile": (-0.01, 0.3)}, "percentile"),  # accuracy counts first
        ({"minmax": (-0.02, 0.2), "entropy": (-0.02, 0.1), "percentile": (-0.02, 0.3)}, "entropy"),  # then closeness to fp32
        ({"minmax": (-0.01, 0.2), "entropy": (-0.02, 0.1), "percentile": (-0.03, 0.1)}, "minmax"),
    ],
)
def test_where_the_first_loses_something_the_best_on_val_is_taken_and_said(deltas: dict[str, tuple[float, float]], chosen: str) -> None:
    decision = trial(deltas).run()
    assert decision["calibration"] == chosen
    assert [c["calibration"] for c in decision["calibrations"]] == ["minmax", "entropy", "percentile"]
    assert f"ranges calibrated by {chosen}: minmax 8" in decision["reason"]
    assert "fp32 90.00 %" in decision["reason"]


def test_a_calibration_that_was_asked_for_is_not_second_guessed() -> None:
    t = trial({"entropy": (-0.5, 1.0)}, repair=False)
    t.calibration = "entropy"
    assert t.run()["calibration"] == "entropy"
    assert t.calls == []


def test_only_nodes_that_the_quantizer_knows_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd.data import normalise
    from edgekd.export import bisect
    from edgekd.safeio import onnxfile

    t = trial({"minmax": (0.0, 0.1)}, ok=False, rounds=3)
    t.calibration, t.given, t.file = "minmax", (), None
    t.facts, t.positions = {"fixed_batch": None, "input": "x"}, np.arange(4)
    t.dataset = SimpleNamespace(samples=lambda positions: positions)
    t.reference = SimpleNamespace(graph=SimpleNamespace(node=[SimpleNamespace(name=n) for n in ("conv", "folded")]))
    rounded = SimpleNamespace(graph=SimpleNamespace(node=[SimpleNamespace(name="conv")]))
    monkeypatch.setattr(onnxfile, "check_onnx", lambda *_, **__: rounded)
    monkeypatch.setattr(normalise, "normalised", lambda pixels, facts: pixels)
    monkeypatch.setattr(bisect, "compare_tensors", lambda *_: [])
    monkeypatch.setattr(bisect, "steepest", lambda *_: [SimpleNamespace(node="folded")])
    monkeypatch.setattr(bisect, "with_makers", lambda *_: {"conv", "folded"})
    assert t.run()["rounds"][-1]["keep"] == ["conv"]
    assert t.calls == [("minmax", 0), ("minmax", 1)]  # with nothing more to take back it ends


class Told:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.mark.parametrize(
    ("labels", "wanted", "words"),
    [
        ([0, 1, 2] * 4, 256, "only 12 training images to calibrate with"),
        ([0] * 64, 64, "all 64 calibration images are of one class"),
        ([0, 1] * 32, 64, None),
        ([0, 1, 0, 1], 0, None),  # methods that look at no data
        ([0, 1] * 64, 4, None),  # few were asked for
    ],
)
def test_few_images_or_one_class_are_warned_about(labels: list[int], wanted: int, words: str | None) -> None:
    dataset: Any = SimpleNamespace(split=lambda _: np.arange(len(labels)), labels=np.array(labels))
    told = Told()
    context: Any = SimpleNamespace(seed=0, console=told)
    _warn_of_few(dataset, wanted, "quantize", context)
    assert [words in w for w in told.warnings] == [True] if words else told.warnings == []
