"""A teacher whose answers are kept: asked once for every view, by whatever number of stages, and taught alike."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import run_here

pytestmark = pytest.mark.usefixtures("quick", "stored")
RECIPE = """version: 1
data: {format: digits, image_size: 16, max_per_class: 30}
teacher: {arch: resnet10t, train: {epochs: 2, batch_size: 32}}
model: {arch: resnet10t, args: {zero_init_last: false}}
stages:
  - distill: {epochs: 4, views: 2, batch_size: 32, augment: {policy: shift, pad: 1}}
  - quantize: {}
targets: {host: {backend: onnxruntime}}
"""


def built(folder: Path, *more: str) -> set[str]:
    """The steps that ran, and were not cached."""
    (folder / "r.yaml").write_text(RECIPE)
    result = run_here("compress", folder / "r.yaml", "--no-gate", "--json", "--out", folder / f"run{len(list(folder.iterdir()))}", *more)
    assert result.code in (0, 4), result.err
    return set(re.findall(r"^\[\d+/\d+\] (.+)$", result.err, re.MULTILINE))


def planned(folder: Path, *more: str) -> set[str]:
    return {s["step"] for s in run_here("plan", folder / "r.yaml", "--json", *more).json()}


def test_the_teacher_answers_each_view_once_for_all_that_learn_from_it(tmp_path: Path) -> None:
    assert {"distill.answers", "distill"} <= built(tmp_path)
    again = built(tmp_path, "-o", "distill.lr=0.002", "-o", "distill.epochs=3")
    assert "distill" in again
    assert "distill.answers" not in again
    assert "distill.answers" in planned(tmp_path, "-o", "distill.epochs=3")
    assert "distill.answers" in built(tmp_path, "-o", "distill.views=3")
    assert "distill.answers" not in planned(tmp_path, "-o", "distill.views=4")  # as many as epochs: nothing is asked twice


def test_a_sample_of_the_classes_is_for_methods_that_can_use_it(tmp_path: Path) -> None:
    assert "distill.answers" in built(tmp_path, "-o", "distill.sampled_classes=4")
    (tmp_path / "r.yaml").write_text(RECIPE)
    result = run_here("check", tmp_path / "r.yaml", "-o", "distill.method=ofa", "-o", "distill.sampled_classes=4")
    assert (result.code, "ofa needs all of the teacher's logits" in result.err) == (2, True), result.text
    result = run_here("check", tmp_path / "r.yaml", "-o", "distill.views=0", "-o", "distill.sampled_classes=4")
    assert (result.code, "set views" in result.err) == (2, True), result.text
