"""The parity ladder's arithmetic: how far two forms of one model are apart, and how far each rung allows.

Thresholds and why: torch and ONNX compute the same fp32 operations in another order, so they differ by rounding only (1e-3 of the largest output is
already generous). fp16 keeps 11 bits of each value: decisions change only where two classes are nearly equal. An int8 graph rounds every activation,
and runtimes fuse it differently: single outputs may be off by a good part of a logit while decisions agree, so it is judged by direction (cosine) and
by how often it decides alike. Answers that the rounding of a rung may change anyway say nothing about what is broken: agreement is judged on the clear
ones, which no error of `ROOM` (of the usual largest output) can change. A good int8 ResNet-20 moves single logits by 2 % on the mean and 5 to 8 % at most.
Where few answers are clear, two more limits hold: what certainly changes from image to image changes alike (`covariation`; a dead graph answers every
image the same), and the metric certainly loses (95 %) no more than clear answers may.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekd.gate import paired_drop
from edgekd.profile.precision import COARSEST_FIRST

if TYPE_CHECKING:
    from edgekd.tasks._task import Floats, Ints, Task

LIMITS: dict[str, dict[str, float]] = {  # at least, but for these that say how far: at most
    "fp32": {"max_relative": 1e-3, "clear_agreement": 0.995, "metric_lost": 0.005},
    "codebook": {"max_relative": 1e-3, "clear_agreement": 0.995, "metric_lost": 0.005},
    "int8_weights": {"cosine": 0.99, "covariation": 0.5, "clear_agreement": 0.98, "metric_lost": 0.02},
    "fp16": {"cosine": 0.999, "covariation": 0.5, "clear_agreement": 0.99, "metric_lost": 0.01},
    "int8": {"cosine": 0.95, "covariation": 0.5, "clear_agreement": 0.95, "metric_lost": 0.05},
}
_AT_MOST = ("max_relative", "metric_lost")
ROOM = {"fp32": 1e-3, "codebook": 1e-3, "int8_weights": 0.02, "fp16": 5e-3, "int8": 0.05}
_STILL = 0.1  # outputs that change less than this share of their room from image to image: rounding alone may change them differently


def coarser(a: str, b: str) -> str:
    """Of two precisions the one that rounds more: what limits and tolerances go by."""
    return min(a, b, key=COARSEST_FIRST.index)


def compare(rung: str, limits: str, reference: Floats, found: Floats, labels: Ints | None, task: Task) -> dict[str, Any]:
    """One rung: errors, cosine, covariation, agreement (of all, and of clear answers and their share), change of the metric, and what missed a limit.

    Without labels nothing is said of the metric.
    """
    import numpy as np

    a, b = reference.astype(np.float64).reshape(len(reference), -1), found.astype(np.float64).reshape(len(found), -1)
    error, scale = np.abs(a - b), max(float(np.abs(a).max()), 1e-12)
    usual = float(np.median(np.abs(a).max(1)))  # one image with large outputs must not make the others unclear
    with np.errstate(invalid="ignore"):  # what is not finite is said below
        alike = _cosine(a, b, axis=1)
        covariation = _covariation(a, b, ROOM[limits] * usual)
    clear = task.clear(reference, ROOM[limits] * usual) if hasattr(task, "clear") else np.ones(len(reference), bool)
    row: dict[str, Any] = {
        "max_abs": float(error.max()),
        "mean_abs": float(error.mean()),
        "max_relative": float(error.max()) / scale,
        "cosine": float(np.mean(alike)),
        "covariation": covariation,
        "agreement": task.agreement(reference, found),
        "clear": float(clear.mean()),
        "clear_agreement": task.agreement(reference[clear], found[clear]) if clear.any() else 1.0,
    }
    if labels is not None:
        scores = [task.scores(outputs, labels).astype(float).tolist() for outputs in (reference, found)]
        drop, (low, _) = paired_drop(*scores)
        row |= {"metric_delta": -drop, "metric_lost": max(low, 0.0)}
    judged = {name: limit for name, limit in LIMITS[limits].items() if name in row}
    bad = [name for name, limit in judged.items() if not (row[name] <= limit if name in _AT_MOST else row[name] >= limit)]
    if not np.isfinite(b).all():
        bad, row = ["finite"], {name: value if np.isfinite(value) else 0.0 for name, value in row.items()} | {"finite": False}
    words = ", ".join(f"{name} {'<=' if name in _AT_MOST else '>='} {limit:g}" for name, limit in judged.items())
    return {"rung": rung, **row, "threshold": words, "ok": not bad, "failed": bad}


def _cosine(a: Any, b: Any, axis: int | None = None) -> Any:
    import numpy as np

    return (a * b).sum(axis) / np.maximum(np.sqrt((a * a).sum(axis) * (b * b).sum(axis)), 1e-12)


def _covariation(a: Any, b: Any, room: float) -> float:
    """Cosine of what differs from image to image, outputs (n, k); 1 where that is less than rounding may change."""
    import numpy as np

    apart = a - a.mean(0)
    return 1.0 if np.sqrt((apart**2).mean()) <= _STILL * room else float(_cosine(apart, b - b.mean(0)))
