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
    """Accuracy; for classes of unequal size macro-F1, area under precision and recall, and recall of the rarest; expected calibration error."""

    metric_name = "accuracy"
    measures = "accuracy"
    samples = "nodes"
    template = "predict_rows.py"
    learns: Mapping[str, str] = {"train": "train_nodes", "distill": "distill_nodes"}

    def metrics(self, outputs: Floats, labels: Ints, teacher: Floats | None) -> dict[str, float]:
        """accuracy, macro_f1, pr_auc, rarest_recall, ece, and agreement with a teacher."""
        from edgekd.tasks.classification import calibration_error

        found = {
            "accuracy": float(self.scores(outputs, labels).mean()),
            "macro_f1": macro_f1(outputs.argmax(1), labels),
            "pr_auc": pr_auc(outputs, labels),
            "rarest_recall": rarest_recall(outputs, labels),
            "ece": calibration_error(outputs, labels),
        }
        return found | ({} if teacher is None else {"agreement": self.agreement(outputs, teacher)})


def pr_auc(outputs: Floats, labels: Ints) -> float:
    """Area under precision and recall of each class against the others, as average precision, and of these the mean over the classes that are there."""
    import numpy as np
    from sklearn.metrics import average_precision_score

    shares = _shares(outputs)
    return float(np.mean([average_precision_score(labels == c, shares[:, c]) for c in np.unique(labels)]))


def rarest_recall(outputs: Floats, labels: Ints) -> float:
    """Recall at k of the rarest class that is there: of its k samples, the share among the k that are likeliest to be of it. Of equals, the first."""
    import numpy as np

    found, counts = np.unique(labels, return_counts=True)
    rarest, k = int(found[counts.argmin()]), int(counts.min())
    likeliest = np.argsort(-_shares(outputs)[:, rarest], kind="stable")[:k]
    return float((labels[likeliest] == rarest).mean())


def _shares(outputs: Floats) -> Floats:
    """Softmax in float64; an answer that is not finite counts as 0 everywhere."""
    import numpy as np

    z = outputs.astype(np.float64)
    with np.errstate(invalid="ignore"):
        e = np.exp(z - z.max(1, keepdims=True))
        e /= e.sum(1, keepdims=True)
    found: Floats = np.nan_to_num(e, nan=0.0)
    return found


def macro_f1(said: Ints, labels: Ints) -> float:
    """Mean F1 over the classes that are there or were said."""
    import numpy as np

    scores = []
    for c in np.union1d(said, labels):
        both, either = int(((said == c) & (labels == c)).sum()), int((said == c).sum() + (labels == c).sum())
        scores.append(2 * both / either)
    return float(np.mean(scores))
