"""Metrics of nodes against loops."""

from __future__ import annotations

import numpy as np
import pytest

from edgekd import registry
from edgekd.tasks.node_classification import macro_f1, pr_auc, rarest_recall

TASK = registry.load("task", "node_classification")()


def unbalanced(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of 60, 30 and 10 samples."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    return (rng.standard_normal((100, 3)) + 1.2 * np.eye(3)[labels]).astype(np.float32), labels


def test_the_area_under_precision_and_recall_is_the_mean_precision_at_each_sample_of_a_class() -> None:
    outputs, labels = unbalanced()
    shares = np.exp(outputs.astype(float)) / np.exp(outputs.astype(float)).sum(1, keepdims=True)
    areas = []
    for c in range(3):
        order = np.argsort(-shares[:, c])
        right, precisions = 0, []
        for place, sample in enumerate(order, 1):
            if labels[sample] == c:
                right += 1
                precisions.append(right / place)
        areas.append(np.mean(precisions))
    assert pr_auc(outputs, labels) == pytest.approx(np.mean(areas))
    assert pr_auc(10 * np.eye(3)[labels].astype(np.float32), labels) == 1


def test_recall_of_the_rarest_class_counts_it_among_as_many_as_it_has() -> None:
    outputs, labels = unbalanced(1)
    shares = np.exp(outputs.astype(float)) / np.exp(outputs.astype(float)).sum(1, keepdims=True)
    first = sorted(range(100), key=lambda i: -shares[i, 2])[:10]
    assert rarest_recall(outputs, labels) == sum(labels[i] == 2 for i in first) / 10
    assert rarest_recall(outputs[:90], labels[:90]) <= 1  # a class that is not there is not the rarest


def test_macro_f1_is_the_mean_over_classes() -> None:
    said, labels = np.array([0, 0, 1, 2, 2]), np.array([0, 1, 1, 2, 0])
    want = [2 * 1 / (2 * 1 + 1 + 1), 2 * 1 / (2 * 1 + 0 + 1), 2 * 1 / (2 * 1 + 1 + 0)]
    assert macro_f1(said, labels) == pytest.approx(np.mean(want))


def test_the_metric_of_a_training_is_the_mean_of_the_scores_and_answers_that_are_not_finite_harm_nothing_else() -> None:
    outputs, labels = unbalanced()
    found = TASK.metrics(outputs, labels, outputs)
    assert found["accuracy"] == pytest.approx(float(TASK.scores(outputs, labels).mean()))
    assert found["agreement"] == 1
    outputs[3] = np.nan
    assert all(np.isfinite(v) for v in TASK.metrics(outputs, labels, None).values())
