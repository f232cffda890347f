"""Classification of the nodes of a graph: one label a node, logits (nodes, classes)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgekd.registry import register
from edgekd.tasks.classification import Classification

if TYPE_CHECKING:
    from edgekd.tasks._task import Floats, Ints


@register("task")
class NodeClassification(Classification):
    """Accuracy, macro-F1, expected calibration error."""

    metric_name = "accuracy"
    measures = "accuracy"
    samples = "nodes"
    template = "predict_rows.py"
    learns: Mapping[str, str] = {"train": "train_nodes", "distill": "distill_nodes"}

    def metrics(self, outputs: Floats, labels: Ints, teacher: Floats | None) -> dict[str, float]:
        """accuracy, macro_f1, ece, and agreement with a teacher."""
        from edgekd.tasks.classification import calibration_error

        found = {
            "accuracy": float(self.scores(outputs, labels).mean()),
            "macro_f1": macro_f1(outputs.argmax(1), labels),
            "ece": calibration_error(outputs, labels),
        }
        return found | ({} if teacher is None else {"agreement": self.agreement(outputs, teacher)})


def macro_f1(said: Ints, labels: Ints) -> float:
    """Mean F1 over the classes that are there or were said."""
    import numpy as np

    scores = []
    for c in np.union1d(said, labels):
        both, either = int(((said == c) & (labels == c)).sum()), int((said == c).sum() + (labels == c).sum())
        scores.append(2 * both / either)
    return float(np.mean(scores))
