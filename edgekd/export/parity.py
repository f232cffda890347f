"""The parity ladder's arithmetic: how far two forms of one model are apart, and how far each rung allows.

Thresholds and why: torch and ONNX compute the same fp32 operations in another order, so they differ by rounding only (1e-3 of the largest output is
already generous). fp16 keeps 11 bits of each value: decisions change only where two classes are nearly equal. An int8 graph rounds every activation,
and runtimes fuse it differently: single outputs may be off by a good part of a logit while decisions agree, so it is judged by direction (cosine) and
by how often it decides alike. Answers that the rounding of a rung may change anyway say nothing about what is broken: agreement is judged on the clear
ones, which no error of `ROOM` (of the largest output) can change. A good int8 ResNet-20 moves single logits by 2 % on the mean and 5 to 8 % at most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgekd.tasks._task import Floats, Ints, Task

LIMITS: dict[str, dict[str, float]] = {
    "fp32": {"max_relative": 1e-3, "clear_agreement": 0.995},
    "codebook": {"max_relative": 1e-3, "clear_agreement": 0.995},
    "int8_weights": {"cosine": 0.99, "clear_agreement": 0.98},
    "fp16": {"cosine": 0.999, "clear_agreement": 0.99},
    "int8": {"cosine": 0.95, "clear_agreement": 0.95},
}
ROOM = {"fp32": 1e-3, "codebook": 1e-3, "int8_weights": 0.02, "fp16": 5e-3, "int8": 0.05}


def coarser(a: str, b: str) -> str:
    """Of two precisions the one that rounds more: what limits and tolerances go by."""
    return min(a, b, key=("int8", "int8_weights", "fp16", "codebook", "fp32").index)


def compare(rung: str, limits: str, reference: Floats, found: Floats, labels: Ints, task: Task) -> dict[str, Any]:
    """One rung: max and mean error, cosine, agreement (of all, and of clear answers and their share), difference of the metric, and what missed a limit."""
    import numpy as np

    a, b = reference.astype(np.float64).reshape(len(reference), -1), found.astype(np.float64).reshape(len(found), -1)
    error, scale = np.abs(a - b), max(float(np.abs(a).max()), 1e-12)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    with np.errstate(invalid="ignore"):  # what is not finite is said below
        alike = (a * b).sum(1) / np.maximum(norms, 1e-12)
    clear = task.clear(reference, ROOM[limits] * scale) if hasattr(task, "clear") else np.ones(len(reference), bool)
    row = {
        "max_abs": float(error.max()),
        "mean_abs": float(error.mean()),
        "max_relative": float(error.max()) / scale,
        "cosine": float(np.mean(alike)),
        "agreement": task.agreement(reference, found),
        "clear": float(clear.mean()),
        "clear_agreement": task.agreement(reference[clear], found[clear]) if clear.any() else 1.0,
        "metric_delta": float(task.scores(found, labels).mean() - task.scores(reference, labels).mean()),
    }
    bad = [name for name, limit in LIMITS[limits].items() if not (row[name] <= limit if name == "max_relative" else row[name] >= limit)]
    if not np.isfinite(b).all():
        bad, row = ["finite"], {name: value if np.isfinite(value) else 0.0 for name, value in row.items()} | {"finite": False}
    words = ", ".join(f"{name} {'<=' if name == 'max_relative' else '>='} {limit:g}" for name, limit in LIMITS[limits].items())
    return {"rung": rung, **row, "threshold": words, "ok": not bad, "failed": bad}
