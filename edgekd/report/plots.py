"""The report's charts as plotly figures in plain data; nothing here draws or imports plotly.

Every string from a run goes through `_label`: plotly reads a small HTML dialect (links included) in titles, legends, ticks and hover
texts. Shape, dash or a word says whatever a colour says.
"""

from __future__ import annotations

import html
import math
from itertools import pairwise
from typing import Any

from edgekd.report import text

Figure = dict[str, Any]  # {"data": [...], "layout": {...}}

MAX_CONFUSION_CLASSES = 100
_MAX_COUNTED_CLASSES = 20  # beyond this the counts do not fit into their cells
_FLAT = 0.02  # of a metric: least height of the chart's axis
_MAX_CURVE_POINTS = 2000
_MAX_LABEL_CHARS = 40
_BLUE, _ORANGE, _GREEN = "#3b82c4", "#d97706", "#2a9d6f"  # all six can be read on white and on black
_PURPLE, _GREY, _RED = "#a855b5", "#8a8f98", "#d1495b"
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_SERIES = {  # name: colour, marker symbol
    "teacher": (_PURPLE, "diamond"),
    "stage": (_BLUE, "circle"),
    "stage, neutral": (_ORANGE, "circle-open"),
    "stage, rolled back": (_RED, "x-thin-open"),
    "baseline": (_GREY, "square"),
    "shipped": (_GREEN, "star"),
}
_VERDICT_SERIES = {"rolled back": "stage, rolled back", "neutral": "stage, neutral"}


def tradeoff(run: dict[str, Any]) -> Figure | None:
    """Metric against p50 (log axis), marker area by file size, for every model of the run; None without two points."""
    points = [p for p in _candidates(run) if p["x"] and p["y"] is not None]
    if len(points) < 2:
        return None
    floor = _floor(points, run)
    for p in points:
        p["below"], p["drawn"] = p["y"] < floor, max(floor, p["y"])
    traces = [_series(name, [p for p in points if p["series"] == name]) for name in _SERIES]
    low, high = min(math.log10(p["x"]) for p in points) - 0.2, max(math.log10(p["x"]) for p in points) + 0.2
    layout = _layout(480, "p50 latency, ms (log scale)", str(points[0]["unit"]))
    layout["xaxis"] |= {"type": "log", "range": [low, high], "tickvals": _decade_ticks(low, high)}
    layout["yaxis"] |= {"tickformat": ".1%"}
    drawn = [p["drawn"] for p in points]
    if max(drawn) - min(drawn) < _FLAT:  # by itself the axis of one value would reach from -30 to 150 %
        layout["yaxis"] |= {"range": [min(drawn) - _FLAT, max(drawn) + _FLAT]}
    layout["legend"] |= {"y": 1.06}  # above the budget's label
    layout |= {"shapes": [], "annotations": _names(points, (low + high) / 2)}
    _budget_lines(layout, run)
    return {"data": [t for t in traces if t["x"]], "layout": layout}


def unplaced(run: dict[str, Any]) -> list[str]:
    """What the chart leaves out because metric or measured latency is missing, as `name (series)`."""
    return [f"{p['name']} ({p['series']})" for p in _candidates(run) if not (p["x"] and p["y"] is not None)]


def curves(rows: list[dict[str, Any]]) -> Figure:
    """Loss and its terms by step, the learning rate on a second axis, and the validation metric below."""
    rows = _thin(rows)
    steps = [text.number(r.get("step")) for r in rows]
    terms = list(dict.fromkeys(name for r in rows for name in r.get("terms") or {}))
    lines = [_line("loss", steps, [r.get("loss") for r in rows], _BLUE, "solid", width=2.5)]
    for i, name in enumerate(terms):
        values = [(r.get("terms") or {}).get(name) for r in rows]
        lines.append(_line(str(name), steps, values, (_ORANGE, _PURPLE, _RED, _GREY)[i % 4], _DASHES[1 + i % 5]))
    lines.append(_line("learning rate (right axis)", steps, [r.get("lr") for r in rows], _GREY, "dot", width=1, yaxis="y2"))
    lines.append(_val_line([r for r in rows if text.number(r.get("val_metric")) is not None]))
    layout = _layout(420, "step", "loss")
    layout["yaxis"] |= {"domain": [0.42, 1]}
    layout["margin"]["r"] = 60
    layout["yaxis2"] = {"overlaying": "y", "side": "right", "rangemode": "tozero"}
    layout["yaxis2"] |= {"showgrid": False, "tickmode": "auto", "nticks": 5, "exponentformat": "e"}
    layout["yaxis3"] = {"title": {"text": "val metric"}, "domain": [0, 0.3], "tickformat": ".0%", "anchor": "x"}
    layout["xaxis"] |= {"anchor": "y3"}
    return {"data": [line for line in lines if line["x"]], "layout": layout}


def latencies(samples: dict[str, list[float]]) -> Figure | None:
    """One histogram of latencies for each model, each on its own axis: the shape is compared, the ratio is in the headline."""
    named = {name: [v for v in map(text.number, values or []) if v is not None] for name, values in samples.items()}
    named = {name: values for name, values in named.items() if values}
    if not named:
        return None
    layout, data, rows = _layout(90 + 190 * len(named), "", ""), [], len(named)
    for i, (name, values) in enumerate(named.items()):
        n, top = "" if i == 0 else str(i + 1), 1 - i / rows
        data.append(_histogram(name, values, n, i))
        layout[f"xaxis{n}"] = {"title": {"text": f"{_label(name)}: ms for one inference"}, "anchor": f"y{n}"}
        layout[f"yaxis{n}"] = {"title": {"text": "samples"}, "domain": [top - 0.68 / rows, top], "anchor": f"x{n}"}
    layout |= {"showlegend": False, "bargap": 0.04}
    return {"data": data, "layout": layout}


def confusion(labels: list[str], matrix: list[list[float]]) -> Figure:
    """Rows are true classes, columns predicted; shade is the share of the row, and each cell's count is written or shown on hover."""
    names = [_label(name) for name in labels]
    places, counts = list(range(len(names))), [[text.plain(v) for v in row] for row in matrix]
    shares = [[(text.number(v) or 0.0) / (sum(filter(None, map(text.number, row))) or 1.0) for v in row] for row in matrix]
    cells = [[f"true {names[i]}<br>predicted {names[j]}<br>{count} images" for j, count in enumerate(row)] for i, row in enumerate(counts)]
    heat: Figure = {"type": "heatmap", "x": places, "y": places, "z": shares, "zmin": 0, "zmax": 1, "xgap": 1, "ygap": 1}
    heat |= {"hovertext": cells, "hovertemplate": "%{hovertext}<extra></extra>"}
    heat |= {"colorscale": [[0, "#f2f5f9"], [0.02, "#d5e3f0"], [0.2, "#9cc3e2"], [1, "#1f5f99"]]}
    heat |= {"colorbar": {"title": {"text": "share<br>of row"}, "tickformat": ".0%", "thickness": 12}}
    if len(names) <= _MAX_COUNTED_CLASSES:
        heat |= {"text": [["" if c == "0" else c for c in row] for row in counts], "texttemplate": "%{text}"}
    layout = _layout(max(360, min(160 + 28 * len(names), 1000)), "predicted class", "true class")
    ticks = {"tickmode": "array", "tickvals": places, "ticktext": names, "showgrid": False, "zeroline": False, "automargin": True}
    layout["xaxis"] |= ticks
    layout["yaxis"] |= ticks | {"autorange": "reversed"}
    return {"data": [heat], "layout": layout}


def _label(value: Any) -> str:
    return html.escape(text.shorten(str(value), _MAX_LABEL_CHARS))


def _layout(height: int, x: str, y: str) -> Figure:
    axes = {"xaxis": {"title": {"text": _label(x)}}, "yaxis": {"title": {"text": _label(y)}}}
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    return {"height": height, "margin": {"l": 64, "r": 24, "t": 36, "b": 52}, "legend": legend, "hovermode": "closest", **axes}


# ------------------------------------------------------------------------------------------------- accuracy against latency
def _candidates(run: dict[str, Any]) -> list[dict[str, Any]]:
    found = [_point("teacher", "teacher", run["teacher"])] if run.get("teacher") else []
    rows = [s for s in run.get("stages") or [] if not (run.get("teacher") and s.get("name") == "teacher")]  # it is drawn already
    measured = [s for s in rows if text.number(s.get("metric")) is not None or text.p50(s.get("latency_ms")) is not None]
    found += [_point(str(s.get("name")), _VERDICT_SERIES.get(str(s.get("verdict")), "stage"), s) for s in measured]
    found += [_point(str(b.get("name")), "baseline", b) for b in run.get("baselines") or []]
    if first := (run.get("targets") or [None])[0]:
        shipped = first if first.get("measured") else {**first, "latency_ms": None}  # a prediction has no place beside measurements
        found.append(_point("shipped", "shipped", shipped))
    return found


def _point(name: str, series: str, item: dict[str, Any]) -> dict[str, Any]:
    latency, unit = item.get("latency_ms"), str(item.get("metric_name") or "metric")
    lines = [f"<b>{_label(name)}</b> ({series})", f"{_label(unit)} {text.percent(item.get('metric'))}", f"p50 {text.latency(latency)}"]
    hover = "<br>".join([*lines, text.size(item.get("size_bytes"))])
    x, y = max(text.p50(latency) or 0.0, 0.0) or None, text.number(item.get("metric"))  # a log axis has no place for 0
    return {"name": name, "series": series, "x": x, "y": y, "bytes": text.number(item.get("size_bytes")), "unit": unit, "hover": hover}


def _floor(points: list[dict[str, Any]], run: dict[str, Any]) -> float:
    """Where the axis ends: a model between pruning and recovery may be at chance level and would flatten everything else."""
    final = [p["y"] for p in points if p["series"] in ("teacher", "shipped", "baseline")] or [p["y"] for p in points]
    limit = _accuracy_limit(run)
    final += [] if limit is None else [limit]
    return float(min(final) - max(0.02, 0.5 * (max(final) - min(final))))


def _series(name: str, points: list[dict[str, Any]]) -> Figure:
    colour, symbol = _SERIES[name]
    symbols, sizes = ["triangle-down-open" if p["below"] else symbol for p in points], [_diameter(p["bytes"]) for p in points]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [p["x"] for p in points],
        "y": [p["drawn"] for p in points],
        "hovertext": [p["hover"] for p in points],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {"color": colour, "opacity": 0.7, "size": sizes, "symbol": symbols, "line": {"width": 2, "color": colour}},
        "cliponaxis": False,
    }


def _names(points: list[dict[str, Any]], middle: float) -> list[Figure]:
    """A name beside each marker, on the side with more room; the names of close neighbours are listed below each other."""
    spread = max(p["drawn"] for p in points) - min(p["drawn"] for p in points) or 1.0
    notes: list[Figure] = []
    ordered = sorted(points, key=lambda p: -p["drawn"])
    for i, p in enumerate(ordered):
        before = sum(abs(math.log10(p["x"] / q["x"])) < 0.15 and q["drawn"] - p["drawn"] < 0.2 * spread for q in ordered[:i])
        side = 1 if math.log10(p["x"]) < middle else -1
        words = _label(p["name"]) + (f" ({text.percent(p['y'])}, below this axis)" if p["below"] else "")
        line = {"showarrow": True, "arrowhead": 0, "arrowwidth": 1, "arrowcolor": _GREY, "ax": 34 * side, "ay": 18 * before - 18}
        notes.append(_note(words, x=math.log10(p["x"]), y=p["drawn"], xanchor="left" if side > 0 else "right") | line)
    return notes


def _decade_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between 10**low and 10**high: plotly's own labels drop the power."""
    ticks = [float(f"{m}e{e}") for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    return [t for t in ticks if 10**low <= t <= 10**high]


def _diameter(size_bytes: float | None) -> float:
    """Pixels: area grows with the file, from 9 px for small ones to 44 px at 100 MB and beyond."""
    return 9 + 35 * min(1.0, math.sqrt((size_bytes or 0) / 1e8))


def _accuracy_limit(run: dict[str, Any]) -> float | None:
    best, drop = text.number((run.get("teacher") or {}).get("metric")), text.number((run.get("accept") or {}).get("accuracy_drop_max"))
    return None if best is None or drop is None else best - drop


def _budget_lines(layout: Figure, run: dict[str, Any]) -> None:
    limit, budget = _accuracy_limit(run), ((run.get("targets") or [{}])[0].get("budget")) or {}
    if limit is not None:
        layout["shapes"].append(_rule(x0=0, x1=1, xref="paper", y0=limit, y1=limit))
        layout["annotations"].append(
            _note(f"accuracy limit {text.percent(limit)}", x=1, xref="paper", y=limit, xanchor="right", yanchor="top")
        )
    for key in ("p50_ms", "p95_ms", "p99_ms"):
        if (value := text.number(budget.get(key))) is not None and value > 0:
            layout["shapes"].append(_rule(x0=value, x1=value, y0=0, y1=1, yref="paper"))
            words = f"budget {key[:3]} {text.ms(value)}"
            layout["annotations"].append(_note(words, x=math.log10(value), y=1, yref="paper", yanchor="bottom"))


def _rule(**where: Any) -> Figure:
    return {"type": "line", "line": {"color": _GREY, "width": 1.5, "dash": "dash"}, "layer": "below", **where}


def _note(words: str, **where: Any) -> Figure:
    return {"text": words, "showarrow": False, "font": {"size": 11}, **where}


# ------------------------------------------------------------------------------------------------- curves and histograms
def _thin(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most about _MAX_CURVE_POINTS rows, evenly, and always the validated and the last ones."""
    stride = math.ceil(len(rows) / _MAX_CURVE_POINTS) or 1
    return [r for i, r in enumerate(rows) if i % stride == 0 or i == len(rows) - 1 or r.get("val_metric") is not None]


def _line(name: str, x: list[float | None], y: list[Any], colour: str, dash: str, **options: Any) -> Figure:
    values, width = [text.number(v) for v in y], options.pop("width", 1.5)
    known = any(v is not None for v in values)
    line = {"type": "scatter", "mode": "lines", "name": _label(name), "x": x if known else [], "y": values, **options}
    return line | {"line": {"color": colour, "dash": dash, "width": width}}


def _val_line(rows: list[dict[str, Any]]) -> Figure:
    steps, values = [text.number(r.get("step")) for r in rows], [r["val_metric"] for r in rows]
    return _line("val metric", steps, values, _GREEN, "solid", yaxis="y3") | {"mode": "lines+markers"}


def _histogram(name: str, values: list[float], axis: str, i: int) -> Figure:
    """Bars computed here: up to 60 equal bins from the least to the greatest sample."""
    low, high = min(values), max(values)
    bins = min(60, max(1, len(values) // 4)) if high > low else 1
    width = (high - low) / bins or 0.01 * low or 1.0
    counts = [0] * bins
    for v in values:
        counts[min(bins - 1, int((v - low) / width))] += 1
    edges = [low + k * width for k in range(bins + 1)]
    centres = [(a + b) / 2 for a, b in pairwise(edges)]
    bar = {"type": "bar", "name": _label(name), "x": centres, "y": counts, "xaxis": f"x{axis}", "yaxis": f"y{axis}"}
    look = {"width": [width] * bins, "marker": {"color": (_PURPLE, _GREEN, _BLUE, _GREY)[i % 4]}}
    return bar | look | {"hovertemplate": "%{y} samples near %{x:.4g} ms<extra></extra>"}
