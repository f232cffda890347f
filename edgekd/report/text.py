"""How words and numbers look wherever a person reads them: console, HTML page, plots.

Labels, reasons and class names come from data sets and files of others. `clean` takes away what could act on a terminal or reorder a
line; markup is the business of whoever renders (reliability.md T18).
"""

from __future__ import annotations

import math
from typing import Any

NONE = "-"  # shown where a run holds no value
_JOINERS = "\u200c\u200d"  # invisible, but part of correct spelling in Persian and in emoji
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))  # decimal, as budgets are


def clean(s: str) -> str:
    """`s` on one line, with every control, bidi, invisible or unassigned character and lone surrogate written as its escape code."""
    return s if s.isprintable() else "".join(map(_visible, s))


def shorten(s: str, limit: int) -> str:
    """`s` cleaned and cut to at most `limit` characters, the cut marked."""
    s = clean(s)
    return s if len(s) <= limit else f"{s[: limit - 3]}..."


def number(x: Any) -> float | None:
    """`x` where it is a finite number, else None."""
    return float(x) if isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) else None


def p50(latency: Any) -> float | None:
    """The median in ms of a latency given as a number or as a dict with `p50`."""
    return quantile(latency, "p50") if isinstance(latency, dict) else number(latency)


def quantile(latency: Any, name: str) -> float | None:
    """`p50`, `p95` or `p99` in ms, where a latency holds it."""
    return number(latency.get(name)) if isinstance(latency, dict) else None


def interval(pair: Any) -> tuple[float, float] | None:
    """Both ends of a confidence interval, where both are finite."""
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        return None
    low, high = number(pair[0]), number(pair[1])
    return None if low is None or high is None else (low, high)


def plain(x: Any) -> str:
    """Three significant digits: 0.0812, 1.23, 1234."""
    value = number(x)
    if value is None:
        return NONE
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ms(x: Any) -> str:
    """A latency in ms."""
    return NONE if number(x) is None else f"{plain(x)} ms"


def latency(x: Any) -> str:
    """The median and, where known, its confidence interval: `1.23 ms [1.20, 1.27]`."""
    ends = interval(x.get("ci95")) if isinstance(x, dict) else None
    return ms(p50(x)) + (f" [{plain(ends[0])}, {plain(ends[1])}]" if ends else "")


def predicted(x: Any) -> str:
    """A predicted latency, always with the word: `predicted 23 ms (12 to 40)`."""
    if not isinstance(x, dict) or p50(x) is None:
        return NONE
    ends = interval((x.get("low"), x.get("high")))
    return f"predicted {ms(p50(x))}" + (f" ({plain(ends[0])} to {plain(ends[1])})" if ends else "")


def size(x: Any) -> str:
    """Bytes in decimal units: `344 kB`."""
    value = number(x)
    if value is None:
        return NONE
    scale, unit = next(((scale, unit) for scale, unit in _UNITS if abs(value) >= scale), (1.0, "bytes"))
    return f"{plain(value / scale)} {unit}"


def percent(x: Any) -> str:
    """A fraction as a percentage: `98.89 %`."""
    value = number(x)
    return NONE if value is None else f"{100 * value:.2f} %"


def points(x: Any) -> str:
    """A difference of fractions in percentage points, without the word: `0.28`."""
    value = number(x)
    return NONE if value is None else f"{100 * value + 0.0:.2f}"


def seconds(x: Any) -> str:
    """A duration: `0.41 s`, `12.3 s`, `3 min 5 s`."""
    value = number(x)
    if value is None:
        return NONE
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes else f"{plain(value)} s"


def _visible(c: str) -> str:
    if c.isspace():
        return " "
    return c if c.isprintable() or c in _JOINERS else c.encode("unicode_escape").decode("ascii")
