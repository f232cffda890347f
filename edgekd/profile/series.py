"""What a series of latencies looks like in time: stable, drifting, throttled, bimodal or spiky.

Spikes are told apart first and clipped. Trends are then judged on the medians of consecutive chunks, which single outliers cannot move; two
modes are judged on the distribution. The thresholds are relative to the median: 10 % is what separates the devices and widths that a user
compares, and three times what a quiet shared machine shows within ten seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

Series = Literal["stable", "drifting", "throttled", "bimodal", "spiky"]

_CHUNKS, _MIN_CHUNK = 20, 3
_TREND = 0.10  # change over the series, or height of a step, that matters
_FIT = 0.6  # share of the chunks' variance that a line or step must explain to be called one
_SPIKE, _SPIKE_SHARE = 1.75, 0.01  # times the median; share of samples
_MODE_GAP, _MODE_SHARE, _MODE_SEPARATION = 0.15, 0.15, 4.0  # relative distance, smaller cluster's share, Ashman's D


def classify(ms: Sequence[float]) -> Series:
    """The shape of a series of positive times in order of measurement; a step down or a slope is drifting, a lasting step up throttled."""
    import numpy as np

    values = np.asarray(ms, dtype=np.float64)
    if len(values) < 2 * _MIN_CHUNK:
        return "stable"  # too few to say otherwise
    medians = _chunk_medians(values)
    trend = _trend(medians)
    if trend is not None:
        return trend
    middle = float(np.median(values))
    if _two_modes(np.minimum(values, _SPIKE * middle)):
        return "bimodal"
    return "spiky" if float(np.mean(values > _SPIKE * middle)) >= _SPIKE_SHARE else "stable"


def _chunk_medians(values: Any) -> Any:
    import numpy as np

    chunks = np.array_split(values, min(_CHUNKS, len(values) // _MIN_CHUNK))
    return np.array([np.median(chunk) for chunk in chunks])


def _trend(medians: Any) -> Series | None:
    """The better of the best line and the best step through the chunk medians, if it explains them and is high enough."""
    import numpy as np

    total, scale, x = float(np.sum((medians - medians.mean()) ** 2)), float(np.median(medians)), np.arange(len(medians))
    if total == 0:
        return None
    slope, offset = np.polyfit(x, medians, 1)
    line_rest = float(np.sum((medians - slope * x - offset) ** 2))
    step_rest, height = min(_step(medians, cut) for cut in range(1, len(medians)))
    if step_rest <= line_rest:
        if abs(height) < _TREND * scale or step_rest > (1 - _FIT) * total:
            return None
        return "throttled" if height > 0 else "drifting"
    rise = abs(float(slope)) * (len(medians) - 1)
    return "drifting" if rise >= _TREND * scale and line_rest <= (1 - _FIT) * total else None


def _step(medians: Any, cut: int) -> tuple[float, float]:
    """(what a step at `cut` leaves unexplained, its height)."""
    before, after = medians[:cut], medians[cut:]
    rest = ((before - before.mean()) ** 2).sum() + ((after - after.mean()) ** 2).sum()
    return float(rest), float(after.mean() - before.mean())


def _two_modes(values: Any) -> bool:
    """Best split of the sorted values into two clusters (least squares), judged by share, distance and Ashman's D."""
    import numpy as np

    ordered, n = np.sort(values), len(values)
    sums, squares, left = np.cumsum(ordered), np.cumsum(ordered**2), np.arange(1, n)
    right = n - left
    low_rest = squares[:-1] - sums[:-1] ** 2 / left
    high_rest = (squares[-1] - squares[:-1]) - (sums[-1] - sums[:-1]) ** 2 / right
    cut = int(np.argmin(low_rest + high_rest)) + 1
    low, high = ordered[:cut], ordered[cut:]
    gap, spread = float(high.mean() - low.mean()), float(np.sqrt((low.var() + high.var()) / 2))
    return min(cut, n - cut) >= _MODE_SHARE * n and gap >= _MODE_GAP * float(low.mean()) and gap >= _MODE_SEPARATION * spread
