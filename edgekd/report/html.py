"""`report.html`: one self-contained page about a run, in the order in which a reader asks.

A section whose data the run does not hold says so in one sentence. Every string of the run is escaped on its way in, by `_e` here or
by `plots._label`.
"""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Callable, Iterable
from typing import Any

from edgekd.report import plots, text
from edgekd.report.page import page
from edgekd.report.summary import (
    StageRow,
    TargetRow,
    acceptance,
    candidate_rows,
    latencies,
    metrics,
    next_steps,
    outcome,
    ratio,
    stage_rows,
    target_rows,
    title,
)

_MAX_OPERATORS = 15
_MAX_CONFUSIONS = 20
_CHART_NOTE = (
    "Up and left is better; a larger marker is a larger file. "
    "Stages are judged on validation data, teacher, baselines and the shipped model on test data."
)
_LATENCY_NOTE = (
    "Each model has its own axis. One narrow peak is a steady measurement; "
    "several peaks or a long tail mean a machine that is shared or throttles."
)
_CANDIDATE_NOTE = (
    "Measured together on this machine, interleaved; the fastest inside the accuracy limit that meets the budget ships, "
    "and of equals the smallest file. Points on val are against the graph that all of them were made from."
)
_GRAPH_NOTE = (
    "Measured together, interleaved. The gain is the price of the neighbours, whatever the method: large where nodes have many and the model looks far, "
    "small on sparse graphs, and smaller still for a whole graph at once, where a graph model fetches nothing."
)
_MEASURES = {
    "auc": "area under the curve",
    "mrr": "mean reciprocal rank",
    "hits@10": "hits@10",
    "hits@20": "hits@20",
    "hits@50": "hits@50",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "pr_auc": "PR-AUC, mean over classes",
    "rarest_recall": "recall at k of the rarest class",
    "ece": "calibration error",
    "agreement": "agreement with the teacher",
}
_MARKS = {  # a word and a sign beside each colour
    "accepted": ("good", "✓"),
    "not accepted": ("bad", "✗"),
    "kept": ("good", "✓"),
    "met": ("good", "✓"),
    "holds": ("good", "✓"),
    "rolled back": ("bad", "✗"),
    "missed": ("bad", "✗"),
    "broken": ("bad", "✗"),
    "neutral": ("so-so", "="),
    "unknown": ("so-so", "?"),
}

Run = dict[str, Any]
Figures = dict[str, plots.Figure]


def render(run: dict[str, Any]) -> str:
    """The page as text (UTF-8 when written); it loads nothing and opens from a file, offline."""
    figures: Figures = {}
    body = [f"<header>\n{_top(run)}\n</header>"]
    for heading, build, missing in _SECTIONS:
        content = build(run, figures)
        if not content and not missing:  # a section of some runs only
            continue
        content = content or f'<p class="missing">{_e(missing)}</p>'
        body.append(f"<section>\n<h2>{_e(heading)}</h2>\n{content}\n</section>")
    return page(f"{title(run)}: edgekd report", "\n".join(body), figures)


def _e(value: Any) -> str:
    return html.escape(text.clean(str(value)))


# ------------------------------------------------------------------------------------------------- building blocks
def _table(headers: list[str], rows: Iterable[list[str]]) -> str:
    """`rows` hold whole `<td>` cells; each repeats its header for the stacked form on narrow screens."""
    head = "".join(f"<th>{_e(h)}</th>" for h in headers)
    body = "\n".join(f"<tr>{''.join(map(_labelled, row, headers))}</tr>" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _labelled(cell: str, header: str) -> str:
    return cell.replace("<td", f'<td data-label="{_e(header)}"', 1)


def _td(value: Any, kind: str = "") -> str:
    return f'<td class="{kind}">{_e(value)}</td>' if kind else f"<td>{_e(value)}</td>"


def _mark(word: str) -> str:
    kind, sign = _MARKS.get(word, ("", ""))
    return f'<td class="num"><span class="{kind}">{sign} {_e(word)}</span></td>' if kind else _td(word)


def _note(words: str) -> str:
    return f'<p class="note">{_e(words)}</p>'


def _plot(figures: Figures, figure: plots.Figure, says: str) -> str:
    name = f"figure-{len(figures) + 1}"
    figures[name] = figure
    return f'<div class="plot" id="{name}" role="img" aria-label="{_e(says)}" style="min-height:{int(figure["layout"]["height"])}px"></div>'


# ------------------------------------------------------------------------------------------------- headline
def _top(run: Run) -> str:
    words = outcome(run)
    sentence = f"<p>{_e(words[:1].upper() + words[1:])}</p>" + "".join(
        _note(f"{name[:1].upper()}{name[1:]}: {said}") for name, said in next_steps(run)
    )
    return f'<h1><bdi>{_e(title(run))}</bdi></h1>\n{sentence}\n<div class="tiles">{"".join(_tiles(run))}</div>'


def _tiles(run: Run) -> list[str]:
    """Latency, size, metric and verdict; a figure that was not measured has no tile."""
    teacher, target = run.get("teacher") or {}, (run.get("targets") or [{}])[0]
    p50s = latencies(run)
    sizes = text.number(teacher.get("size_bytes")), text.number(target.get("size_bytes"))
    metric = text.percent(target.get("metric"))
    name = teacher.get("metric_name") or target.get("metric_name") or "metric"
    tiles = [
        _tile("latency, p50", ratio(*p50s, "faster", "slower"), *map(text.ms, p50s)),
        _tile("file size", ratio(*sizes, "smaller", "larger"), *map(text.size, sizes)),
        _tile(f"{name} on test", metric, text.percent(teacher.get("metric")), metric),
    ]
    return [*filter(None, tiles), _verdict_tile(run)]


def _tile(name: str, figure: str, before: str, after: str) -> str:
    if after == text.NONE:
        return ""
    change = f"{before} → {after}" if before != text.NONE else after if figure not in ("", after) else ""
    return f'<div class="tile"><small>{_e(name)}</small><b>{_e(figure or after)}</b><small>{_e(change)}</small></div>'


def _verdict_tile(run: Run) -> str:
    word = acceptance(run).split(" (")[0]
    kind, sign = _MARKS.get(word, ("", ""))
    limit = (run.get("accept") or {}).get("accuracy_drop_max")
    note = "no limit was set" if text.number(limit) is None else f"at most {text.points(limit)} points may be lost"
    return f'<div class="tile"><small>verdict</small><b class="{kind}">{sign} {_e(word)}</b><small>{_e(note)}</small></div>'


# ------------------------------------------------------------------------------------------------- sections, in order
def _chart(run: Run, figures: Figures) -> str:
    figure = plots.tradeoff(run)
    if figure is None:
        return ""
    left_out = plots.unplaced(run)
    notes = [_CHART_NOTE]
    notes += [f"Not drawn, because its metric or latency was not measured: {', '.join(left_out)}."] if left_out else []
    return _plot(figures, figure, "Accuracy against latency; the same figures are in the tables below") + "".join(map(_note, notes))


def _stages(run: Run, _: Figures) -> str:
    rows = stage_rows(run)
    name, values = metrics(rows)
    headers = ["stage", "kind", "method", name, "size", "p50 [95 %]", "verdict", "reason", "time", "cached"]
    return _table(headers, map(_stage_cells, rows, values)) if rows else ""


def _stage_cells(row: StageRow, metric: str) -> list[str]:
    numbers = [_td(value, "num") for value in (metric, row.size, row.latency)]
    took = [_td(row.seconds, "num"), _td(row.cached)]
    return [_td(row.name), _td(row.kind), _td(row.method), *numbers, _mark(row.verdict), _td(row.reason, "wide"), *took]


def _targets(run: Run, _: Figures) -> str:
    rows = target_rows(run)
    name, values = metrics(rows)
    headers = ["device", "backend", "precision", "p50 [95 %]", "p95", name, "size", "budget", "budget is", "reason", "bundle"]
    guesses = [(t.get("device"), t.get("predicted_ms") or {}) for t in run.get("targets") or [] if not t.get("measured")]
    notes = [
        _note(f"Hatched figures are predicted, not measured. Basis for {device}: {p['basis']}.") for device, p in guesses if p.get("basis")
    ]
    return _table(headers, map(_target_cells, rows, values)) + "".join(notes) if rows else ""


def _target_cells(row: TargetRow, metric: str) -> list[str]:
    shown = row.source if row.latency == text.NONE else row.latency
    latency = _td(shown, "predicted" if row.source == "predicted" else "num")
    figures = [latency, _td(row.p95, "num"), _td(metric, "num"), _td(row.size, "num")]
    judged = [_td(row.budget), _mark(row.verdict), _td(row.reason), _td(row.bundle)]
    return [_td(row.device), _td(row.backend), _td(row.precision), *figures, *judged]


def _candidates(run: Run, _: Figures) -> str:
    headers = ["candidate", "precision", "p50 [95 %]", "latency against the first", "points on val", "size", "", "note"]
    parts = []
    for device, rows in candidate_rows(run).items():
        cells = [
            [
                _td(r.name),
                _td(r.precision),
                *(_td(v, "num") for v in (r.latency, r.against, r.change, r.size)),
                _td(r.word),
                _td(r.note, "wide"),
            ]
            for r in rows
        ]
        parts.append(f"<h3>{_e(device)}</h3>" + _table(headers, cells))
    return "".join(parts) + (_note(_CANDIDATE_NOTE) if parts else "")


def _curves(run: Run, figures: Figures) -> str:
    drawn = [(name, plots.curves(rows)) for name, rows in (run.get("curves") or {}).items() if rows]
    return "".join(f"<h3>{_e(name)}</h3>" + _plot(figures, figure, f"Loss curves of {name}") for name, figure in drawn)


def _latencies(run: Run, figures: Figures) -> str:
    figure = plots.latencies(run.get("latency_samples") or {})
    if figure is None:
        return ""
    return _plot(figures, figure, "Distribution of measured latencies") + _percentiles(run) + _note(_LATENCY_NOTE)


def _percentiles(run: Run) -> str:
    first = (run.get("targets") or [{}])[0]
    named = {"teacher": (run.get("teacher") or {}).get("latency_ms"), "shipped": first.get("latency_ms") if first.get("measured") else None}
    rows = [_percentile_cells(name, latency) for name, latency in named.items() if isinstance(latency, dict)]
    return _table(["model", "p50 [95 %]", "p95", "p99", "samples"], rows) if rows else ""


def _percentile_cells(name: str, latency: dict[str, Any]) -> list[str]:
    tails = [_td(text.ms(text.quantile(latency, q)), "num") for q in ("p95", "p99")]
    return [_td(name), _td(text.latency(latency), "num"), *tails, _td(text.plain(latency.get("n")), "num")]


def _confusion(run: Run, figures: Figures) -> str:
    found = run.get("confusion") or {}
    labels, matrix = [str(label) for label in found.get("labels") or []], found.get("matrix") or []
    if not labels or [len(row) for row in matrix] != [len(labels)] * len(labels):
        return ""
    if len(labels) <= plots.MAX_CONFUSION_CLASSES:
        return _plot(figures, plots.confusion(labels, matrix), "Confusion matrix") + _confusions(labels, matrix, 5)
    words = f"{len(labels)} classes are too many to draw; these are the most frequent confusions."
    return _note(words) + _confusions(labels, matrix, _MAX_CONFUSIONS)


def _confusions(labels: list[str], matrix: list[list[float]], limit: int) -> str:
    """The most frequent mistakes as a table."""
    wrong = [(text.number(v) or 0.0, i, j) for i, row in enumerate(matrix) for j, v in enumerate(row) if i != j]
    worst = sorted((w for w in wrong if w[0] > 0), key=lambda w: -w[0])[:limit]
    rows = ([_td(labels[i]), _td(labels[j]), _td(text.plain(count), "num")] for count, i, j in worst)
    return _table(["true class", "predicted as", "samples"], rows) if worst else _note("Nothing was classified wrongly.")


def _graph(run: Run, _: Figures) -> str:
    """Where on the graph the student loses, and what looking at neighbours costs."""
    graph = run.get("graph") or {}
    who = [n for n in ("teacher", "alone", "student") if any(n in row for row in graph.get("groups") or [])]
    names = {"teacher": "teacher", "alone": "student alone", "student": "student"}
    rows = (
        [_td(r.get("by")), _td(r.get("group")), _td(text.plain(r.get("nodes")), "num"), *(_td(text.percent(r.get(n)), "num") for n in who)]
        for r in graph.get("groups") or []
    )
    found = _measures(run)
    pairs = any("auc" in (t.get("metrics") or {}) for t in run.get("targets") or [])
    heads = ["links of test by", "", "links"] if pairs else ["test nodes by", "", "nodes"]
    found += _table([*heads, *(f"{names[n]}, {'area under the curve' if pairs else 'accuracy'}" for n in who)], rows) if who else ""
    served = graph.get("served") or {}
    ways = {"fetched": "graph model, neighbours fetched and propagated", "cached": "graph model, its first product cached for all nodes"}
    ways |= {"student": "student, its rows fetched"}
    times = [
        [_td(words), _td(text.latency(served["latency_ms"].get(way)), "num"), _td(_times(served["ratios"].get(way)), "num")]
        for way, words in ways.items()
        if served.get("latency_ms", {}).get(way)
    ]
    found += (
        _table([f"one random {'pair' if pairs else 'node'}, one thread", "p50 [95 %]", "against the student"], times) + _note(_GRAPH_NOTE)
        if times
        else ""
    )
    if whole := served.get("whole_us_per_node"):
        gain = whole["teacher"] / whole["student"]
        found += _note(
            f"The whole graph at once: {whole['teacher']:.3g} µs a node by the graph model, {whole['student']:.3g} µs by the student, {gain:.2g} times."
        )
    assumed = "".join(f"<li>{_e(words)}</li>" for words in graph.get("assumed") or [])
    return found + (f"<h3>Assumed of the files</h3><ul>{assumed}</ul>" if assumed else "")


def _measures(run: Run) -> str:
    """Everything that was measured on test, of the teacher, the student alone and what ships."""
    sides = [("teacher", run.get("teacher") or {}), *((b.get("name"), b) for b in run.get("baselines") or [])]
    sides += [(f"shipped to {t.get('device')}", t) for t in run.get("targets") or []]
    names = [n for n in _MEASURES if any(n in (side.get("metrics") or {}) for _, side in sides)]
    if "accuracy" not in names:  # images have one metric, which the tables above show
        return ""
    rows = [
        [_td(who), *(_td(text.percent((side.get("metrics") or {}).get(n)), "num") for n in names)]
        for who, side in sides
        if side.get("metrics")
    ]
    return _table(["on test", *(_MEASURES[n] for n in names)], rows) if names and rows else ""


def _times(ratio: Any) -> str:
    value, ends = text.number((ratio or {}).get("ratio")), text.interval((ratio or {}).get("ci95"))
    return text.NONE if value is None else f"{value:.1f}x" + (f" [{ends[0]:.1f}, {ends[1]:.1f}]" if ends else "")


def _operators(run: Run, _: Figures) -> str:
    ops = sorted(run.get("operators") or [], key=lambda op: -(text.number(op.get("share")) or 0.0))
    if not ops:
        return ""
    more = _note(f"The {_MAX_OPERATORS} costliest of {len(ops)} operators.") if len(ops) > _MAX_OPERATORS else ""
    said = [
        n for n in ("precision", "format") if any(op.get(n) for op in ops)
    ]  # TensorRT's builder chooses them; elsewhere the graph says them
    rows = ([*_operator_cells(op), *(_td(op.get(n) or "") for n in said)] for op in ops[:_MAX_OPERATORS])
    return _table(["operator", "type", "share of time", "mean", "calls", *said], rows) + more


def _operator_cells(op: dict[str, Any]) -> list[str]:
    numbers = text.percent(op.get("share")), f"{text.plain(op.get('mean_us'))} µs", text.plain(op.get("calls"))
    return [_td(op.get("name")), _td(op.get("op_type")), *(_td(n, "num") for n in numbers)]


def _sensitivity(run: Run, _: Figures) -> str:
    headers = ["operator", "latency against fp32 [95 %]", "points on val", "error of the outputs", "in what was found"]
    parts = []
    for found in run.get("sensitivity") or []:
        rows = sorted(found.get("operators") or [], key=lambda row: text.number(row.get("ratio")) or 0.0)
        words = f"{found.get('search')}: {len(rows)} of {found.get('candidates')} operators, each quantized alone. {found.get('reason')}."
        parts.append(f"<details><summary>{_e(words)}</summary>{_table(headers, map(_sensitivity_cells, rows))}</details>")
    return "".join(parts)


def _sensitivity_cells(row: dict[str, Any]) -> list[str]:
    ratio, ends, drop, error = (
        text.number(row.get("ratio")),
        text.interval(row.get("ci95")),
        text.number(row.get("drop")),
        text.number(row.get("error")),
    )
    latency = text.NONE if ratio is None else f"{ratio:.3f}x" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")
    cells = [latency, text.NONE if drop is None else f"{0.0 - drop * 100:+.2f}", text.percent(error)]
    return [_td(row.get("node")), *(_td(c, "num") for c in cells), _td("int8" if row.get("quantized") else "fp32")]


def _parity(run: Run, _: Figures) -> str:
    rows = [_parity_cells(rung) for rung in run.get("parity") or []]
    measured = ["max error", "cosine", "agreement", "of clear answers", "metric change, points"]
    return _table(["rung", *measured, "threshold", "parity", "breaks first at"], rows) if rows else ""


def _parity_cells(rung: dict[str, Any]) -> list[str]:
    error, cosine = text.number(rung.get("max_abs")), text.number(rung.get("cosine"))
    numbers = [
        text.NONE if error is None else f"{error:.2e}",
        text.NONE if cosine is None else f"{cosine:.7g}",
        text.percent(rung.get("agreement")),
        text.percent(rung.get("clear_agreement")),
    ]
    word = {True: "holds", False: "broken"}.get(rung.get("ok"), "unknown")  # type: ignore[arg-type]
    cells = [_td(n, "num") for n in [*numbers, text.points(rung.get("metric_delta"))]]
    return [_td(rung.get("rung")), *cells, _td(_flat(rung.get("threshold"))), _mark(word), _td(rung.get("first_break") or text.NONE)]


def _flat(value: Any) -> str:
    """A value of unknown shape on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_flat(v)}" for k, v in value.items())
    return text.NONE if value is None else value if isinstance(value, str) else json.dumps(value, default=str)


def _warnings(run: Run, _: Figures) -> str:
    items = "".join(f"<li>{_e(_flat(w))}</li>" for w in run.get("warnings") or [])
    return f"<ul>{items}</ul>" if items else _note("There were none.") if "warnings" in run else ""


def _environment(run: Run, _: Figures) -> str:
    rows = ([_td(key), _td(_flat(value))] for key, value in (run.get("environment") or {}).items())
    return _table(["what", "value"], rows) if run.get("environment") else ""


def _reproduce(run: Run, _: Figures) -> str:
    if not run.get("command"):
        return ""
    decided, took = run.get("decisions"), text.seconds(run.get("seconds"))
    where = f"recorded in {decided}" if decided else "not recorded"
    notes = [f"What was decided from measurements (verdicts, widths, calibration) is {where}."]
    notes += [f"The run took {took}."] if took != text.NONE else []
    return f"<pre>{_e(shlex.join(map(str, run['command'])))}</pre>" + _note(" ".join(notes))


def _recipe(run: Run, _: Figures) -> str:
    recipe = run.get("recipe") or {}
    rows = [[_td(r.get("path")), _td(_flat(r.get("value"))), _td(r.get("source", text.NONE))] for r in recipe.get("resolved") or []]
    if not rows:
        return ""
    words = f"All {len(rows)} values of {recipe.get('file') or 'the recipe'}, and where each came from"
    return f"<details><summary>{_e(words)}</summary>{_table(['field', 'value', 'source'], rows)}</details>"


_SECTIONS: list[tuple[str, Callable[[Run, Figures], str], str]] = [
    ("Accuracy against latency", _chart, "There is no chart: fewer than two models of this run have both a metric and a measured latency."),
    ("Stages", _stages, "This run holds no stages."),
    ("Targets", _targets, "This run holds no targets."),
    ("Runtimes and precisions measured", _candidates, "No target left its runtime open, or only one runtime is installed here."),
    ("Training", _curves, "There are no loss curves: this run recorded no training."),
    ("Latency distribution", _latencies, "There is no distribution: no latency samples were recorded."),
    ("Confusion on test", _confusion, "There is no confusion matrix: none was recorded."),
    ("On the graph", _graph, ""),
    ("Operators of the shipped engine", _operators, "There is no operator table: the engine was not profiled by operator."),
    ("Sensitivity of operators", _sensitivity, "No search for the operators worth quantizing was made."),
    ("Parity", _parity, "There is no parity table: no two forms of the model were compared."),
    ("Warnings", _warnings, "Warnings were not recorded."),
    ("Environment", _environment, "The environment was not recorded."),
    ("How to reproduce", _reproduce, "The command line was not recorded."),
    ("Resolved recipe", _recipe, "The resolved recipe was not recorded."),
]
