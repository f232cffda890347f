"""Link prediction: whether two nodes of a graph are linked; logits (pairs, 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgekd.registry import register
from edgekd.tasks.classification import Classification

if TYPE_CHECKING:
    from edgekd.tasks._task import Floats, Ints

_TOP = (10, 20, 50)


@register("task")
class LinkPrediction(Classification):
    """Area under the curve of hits and false alarms, hits at k, mean reciprocal rank: how links rank among pairs that are none."""

    metric_name = "auc"
    measures = "area under the curve"
    samples = "pairs"
    template = "predict_pairs.py"
    learns: Mapping[str, str] = {"train": "train_links", "distill": "distill_links"}

    def chance(self, labels: Ints) -> float:
        return 0.5

    def scores(self, outputs: Floats, labels: Ints) -> Floats:
        """(links,) the part of the pairs that are none, below each link, equals by half: their mean is the area."""
        import numpy as np

        links, others = _ranked(outputs, labels)
        if not len(others):
            return np.full(len(links), 0.5, np.float32)
        below, upto = (np.searchsorted(others, links, side=side) for side in ("left", "right"))
        found: Floats = ((below + upto) / (2 * len(others))).astype(np.float32)
        return found

    def metrics(self, outputs: Floats, labels: Ints, teacher: Floats | None) -> dict[str, float]:
        """auc; hits@k: links above the k-th best of the pairs that are none; mrr: mean of 1 / (1 + such pairs above a link); accuracy at one half; agreement.

        Source of hits@k: Hu et al., Open Graph Benchmark, NeurIPS 2020, its evaluator for links.
        """
        import numpy as np

        links, others = _ranked(outputs, labels)
        above = len(others) - np.searchsorted(others, links, side="right")
        found = {"auc": float(self.scores(outputs, labels).mean()), "mrr": float((1 / (1 + above)).mean())}
        for k in _TOP:
            found[f"hits@{k}"] = float((links > others[-k]).mean()) if len(others) >= k else 1.0
        found["accuracy"] = float((outputs.argmax(1) == labels).mean())
        return found | ({} if teacher is None else {"agreement": self.agreement(outputs, teacher)})


def _ranked(outputs: Floats, labels: Ints) -> tuple[Floats, Floats]:
    """Scores of the links, and those of the other pairs ascending; what is not finite counts as no link at all."""
    import numpy as np

    z = outputs.astype(np.float64)
    score = np.where(np.isfinite(z).all(1), z[:, 1] - z[:, 0], -np.inf)
    return score[labels == 1], np.sort(score[labels == 0])
