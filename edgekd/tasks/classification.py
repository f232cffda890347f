"""Image classification: one label an image, logits (samples, classes)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekd.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from edgekd.tasks._task import Bools, Floats, Ints

_ECE_BINS = 15


@register("task")
class Classification:
    """Cross-entropy, top-1 and top-5, expected calibration error."""

    metric_name = "top1"
    measures = "accuracy"

    def without_labels(self) -> Classification:
        imitating = Classification()
        imitating.metric_name, imitating.measures = "agreement", "agreement with the teacher"
        return imitating

    def collate(self, labels: Ints, classes: int) -> Tensor:
        import torch  # the CLI lists tasks without torch

        return torch.from_numpy(labels)

    def mix(self, first: Tensor, second: Tensor, share: Tensor, classes: int) -> Tensor:
        from torch.nn import functional as F

        part = share.unsqueeze(1)
        return part * F.one_hot(first, classes) + (1 - part) * F.one_hot(second, classes)

    def label_loss(self, outputs: Tensor, target: Tensor, smoothing: float) -> Tensor:
        """Cross-entropy with class ids (batch,) or soft targets (batch, classes)."""
        from torch.nn import functional as F

        return F.cross_entropy(outputs, target, label_smoothing=smoothing)

    def misfit(self, outputs: Floats, classes: int) -> str | None:
        if outputs.ndim == 2 and outputs.shape[1] == classes:
            return None
        return f"the model gives outputs of shape {outputs.shape[1:]}, the data have {classes} classes"

    def chance(self, labels: Ints) -> float:
        """The share of the most frequent class."""
        import numpy as np

        return float(np.bincount(labels).max() / len(labels))

    def order(self, outputs: Floats, labels: Ints) -> list[int] | None:
        """Which class each output stands for: found on every other sample, and believed where the rest are mostly right in that order and not in the given one."""
        import numpy as np

        from edgekd.gate import paired_drop

        said, counts = outputs.argmax(1), np.zeros((outputs.shape[1],) * 2)
        np.add.at(counts, (said[::2], labels[::2]), 1)
        order = counts.argmax(1)
        if len(set(order.tolist())) < len(order) or not len(labels[1::2]):
            return None
        other, given = ((answers == labels[1::2]).astype(float) for answers in (order[said[1::2]], said[1::2]))
        chance = self.chance(labels)
        clear = other.mean() >= chance + (1 - chance) / 2 and paired_drop(other.tolist(), given.tolist())[1][0] > 0
        return list(map(int, order)) if clear else None

    def scores(self, outputs: Floats, labels: Ints) -> Floats:
        """1 where the most likely class is the label, else 0."""
        correct: Floats = (outputs.argmax(1) == labels).astype("float32")
        return correct

    def metrics(self, outputs: Floats, labels: Ints, teacher: Floats | None) -> dict[str, float]:
        """top1, top5 (where there are more than five classes), ece, and agreement with the teacher, which is all that can be said without labels."""
        if self.metric_name == "agreement":
            return {"agreement": float(self.scores(outputs, labels).mean())}
        found = {"top1": float(self.scores(outputs, labels).mean()), "ece": calibration_error(outputs, labels)}
        if outputs.shape[1] > 5:
            best = outputs.argsort(1)[:, -5:]
            found["top5"] = float((best == labels[:, None]).any(1).mean())
        if teacher is not None:
            found["agreement"] = self.agreement(outputs, teacher)
        return found

    def agreement(self, a: Floats, b: Floats) -> float:
        return float((a.argmax(1) == b.argmax(1)).mean())

    def clear(self, outputs: Floats, room: float) -> Bools:
        """Where the most likely class leads the next by more than twice `room`."""
        import numpy as np

        first, second = np.sort(outputs, axis=1)[:, :-3:-1].T if outputs.shape[1] > 1 else (outputs[:, 0], -np.inf)
        ahead: Bools = first - second > 2 * room
        return ahead

    def confusion(self, outputs: Floats, labels: Ints, classes: int) -> list[list[int]]:
        import numpy as np

        table = np.zeros((classes, classes), dtype=np.int64)
        np.add.at(table, (labels, outputs.argmax(1)), 1)
        return [[int(n) for n in row] for row in table]

    def postprocess(self) -> dict[str, Any]:
        return {"kind": "softmax", "answer": "argmax"}


def calibration_error(logits: Floats, labels: Ints) -> float:
    """Expected calibration error over 15 equal bins of confidence; an answer that is not finite has none. Source: Guo et al. 2017, equation 3."""
    import numpy as np

    z = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
    p = np.nan_to_num(p, nan=0.0)
    confidence, correct = p.max(1), p.argmax(1) == labels
    bins = np.minimum((confidence * _ECE_BINS).astype(int), _ECE_BINS - 1)
    gaps = [
        abs(correct[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in range(_ECE_BINS) if (bins == b).any()
    ]
    return float(sum(gaps))
