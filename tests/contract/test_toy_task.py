"""The promise that a task is one file: a second task, given by --code, goes through the whole chain without an edit of edgekd."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgekd import api, registry
from edgekd.artifact import Artifact
from edgekd.errors import RecipeError
from tests.support import artifacts, short_measurements

TASK = '''
"""Is the label odd? One output decides; the others are there and unused."""

import numpy as np
from timm.models import register_model
from torch import nn

import edgekd


@edgekd.register("task", "toy_parity_of_label")
class ParityOfLabel:
    metric_name = "parity"

    def collate(self, labels, classes):
        import torch

        return torch.from_numpy(labels % 2).float()

    def mix(self, first, second, share, classes):
        return share * first + (1 - share) * second

    def label_loss(self, outputs, target, smoothing):
        from torch.nn import functional as F

        return F.binary_cross_entropy_with_logits(outputs[:, 0], target * (1 - smoothing) + smoothing / 2)

    def scores(self, outputs, labels):
        return ((outputs[:, 0] > 0) == (labels % 2 == 1)).astype(np.float32)

    def metrics(self, outputs, labels, teacher):
        found = {"parity": float(self.scores(outputs, labels).mean())}
        return found | ({} if teacher is None else {"agreement": self.agreement(outputs, teacher)})

    def agreement(self, a, b):
        return float(((a[:, 0] > 0) == (b[:, 0] > 0)).mean())

    def confusion(self, outputs, labels, classes):
        return None

    def postprocess(self):
        return {"kind": "sign", "answer": "odd"}


@register_model
def toy_net(pretrained=False, num_classes=10, width=8, **_):
    def conv(a, b):
        return [nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

    return nn.Sequential(*conv(3, width), *conv(width, 4 * width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, num_classes))
'''
RECIPE = """
version: 1
task: toy_parity_of_label
data: {format: digits, image_size: 16, max_per_class: 12}
teacher:
  arch: toy_net
  args: {width: 16}
  train: {epochs: 1, batch_size: 32, autocast: 'off', channels_last: 'off', augment: {mixup: 0.5}}
model: {arch: toy_net}
stages:
  - distill: {epochs: 12, batch_size: 20, lr: 5e-3, label_weight: 1, weight: 0.0, label_smoothing: 0.1, autocast: 'off', channels_last: 'off'}
  - prune: {criterion: taylor, target: {params: 0.6}, quantum: 4}
  - train: {name: recover, epochs: 1, autocast: 'off', channels_last: 'off'}
  - quantize: {samples: 32}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], dict[str, Artifact], Path]]:
    """One run; the task's name is free again afterwards."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.py").write_text(TASK)
    (folder / "toy.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch, short_measurements():
        patch.setenv("EDGEKD_HOME", str(folder / "home"))
        patch.setattr(registry, "_user", {})
        options = api.Options(code=folder / "toy.py", out=folder / "run", gate=False)
        run = api.compress(str(folder / "toy.yaml"), options)
        yield run, artifacts(folder / "home"), folder


def test_the_chain_runs_with_the_users_task_and_its_metric(finished: tuple[dict[str, Any], dict[str, Artifact], Path]) -> None:
    run, _, folder = finished
    assert [s["name"] for s in run["stages"]]
    assert {s["metric_name"] for s in run["stages"] if s["metric_name"]} == {"parity"}
    assert (folder / "run" / "report.html").read_text().count("parity") > 2
    assert not {"top1", "ece"} & set(json.dumps(run).replace('"', " ").split())


def test_metrics_are_the_tasks_own_arithmetic_on_the_shipped_engines_outputs(
    finished: tuple[dict[str, Any], dict[str, Artifact], Path],
) -> None:
    import numpy as np

    run, steps, _ = finished
    found = steps["host.test"]
    outputs, labels = np.load(found.path / "outputs.npy"), np.load(found.path / "labels.npy")
    assert outputs.shape == (len(labels), 10)
    parity = float(((outputs[:, 0] > 0) == (labels % 2 == 1)).mean())
    assert found.json("metrics.json")["metrics"]["parity"] == pytest.approx(parity)
    assert run["targets"][0]["metric"] == pytest.approx(parity)


def test_the_loss_was_the_tasks_and_was_learned(finished: tuple[dict[str, Any], dict[str, Artifact], Path]) -> None:
    curves = finished[1]["distill"].json("curves.json")
    assert curves[0]["terms"]["label"] < 2  # a ten-class cross-entropy starts at 2.3
    assert curves[-1]["terms"]["label"] < curves[0]["terms"]["label"]


def test_the_bundle_carries_the_tasks_postprocessing(finished: tuple[dict[str, Any], dict[str, Artifact], Path]) -> None:
    bundle = finished[2] / "run" / "host"
    body = json.loads((bundle / "bundle.json").read_text())
    assert body["task"] == "toy_parity_of_label"
    assert body["postprocess"] == {"kind": "sign", "answer": "odd"}
    assert "sample images give the stored label" in api.verify(bundle)["samples"]


def test_predict_py_does_not_guess_at_the_answer_of_a_task_it_does_not_know(
    finished: tuple[dict[str, Any], dict[str, Artifact], Path],
) -> None:
    bundle = finished[2] / "run" / "host"
    done = subprocess.run([sys.executable, "predict.py", "."], cwd=bundle, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert '{"answer": "odd", "kind": "sign"}' in done.stderr


def test_without_the_file_the_recipe_is_refused(
    finished: tuple[dict[str, Any], dict[str, Artifact], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_user", {})
    with pytest.raises(RecipeError, match=r"toy\.yaml:3:1: task: unknown task 'toy_parity_of_label'"):
        api.check(str(finished[2] / "toy.yaml"))
