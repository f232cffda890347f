"""A run in a few lines: the headline, a row for each stage and target, and all of it for the console."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from edgekd.report import text
from edgekd.report.text import clean

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

_STYLES = {"kept": "green", "rolled back": "red", "neutral": "yellow", "met": "green", "missed": "red"}
_MAX_NAME_CHARS = 12  # of a metric
_BUDGET_WORDS = {True: "met", False: "missed"}


class StageRow(NamedTuple):
    """One stage in words, ready to show once escaped for the medium."""

    name: str
    kind: str
    method: str
    metric_name: str
    metric: str
    size: str
    latency: str  # p50 and its interval
    verdict: str
    reason: str
    seconds: str
    cached: str


class TargetRow(NamedTuple):
    """One target in words; `source` says whether its latency is measured or predicted."""

    device: str
    backend: str
    precision: str
    source: str  # measured | predicted | not measured
    latency: str
    p95: str
    metric_name: str
    metric: str
    size: str
    budget: str
    verdict: str  # met | missed | unknown | no budget
    reason: str
    bundle: str


class CandidateRow(NamedTuple):
    """One runtime and form of the graph that was measured for a target."""

    name: str
    precision: str
    latency: str
    against: str  # latency relative to the first candidate's
    change: str  # of accuracy on val
    size: str
    word: str  # ships | refused | nothing
    note: str  # why it is refused, or how it was quantized


def summary(run: dict[str, Any]) -> RenderableType:
    """What the console shows at the end of a run: stages, reasons, targets, warnings, headline; for 80 columns and without colour, too."""
    from rich.console import Group  # rich takes 60 ms that --json need not pay

    parts: list[RenderableType] = []
    if stages := stage_rows(run):
        parts += [_stage_table(stages), *_reasons(stages)]
    if targets := target_rows(run):
        parts += [_target_table(targets), *_target_reasons(targets)]
    for rows in candidate_rows(run).values():
        parts += [_candidate_table(rows), *(_line(f"{r.name}: ", r.note, "") for r in rows if r.note)]
    parts += [_line("warning: ", str(w), "yellow") for w in run.get("warnings") or []]
    parts += [_line(f"{name}: ", words, "") for name, words in next_steps(run)]
    parts.append(_line("", headline(run), "bold"))
    if run.get("report"):
        parts.append(_line("report: ", str(run["report"]), ""))
    return Group(*parts)


def next_steps(run: dict[str, Any]) -> list[tuple[str, str]]:
    """After a missed goal: what was measured and is not beaten, and the knob to turn; (name, words)."""
    rows = [
        f"{clean(str(r['name']))} {text.percent(r['metric'])}, {text.ms(r['p50'])}, {text.size(r['size_bytes'])}"
        for r in run.get("front") or []
    ]
    found = [("best trade-offs measured", "; ".join(rows))] if rows else []
    return found + ([("most likely to close the gap", clean(str(run["knob"])))] if run.get("knob") else [])


def headline(run: dict[str, Any]) -> str:
    """One sentence: what was gained, what was lost, and whether it is accepted. The figures are the first target's."""
    return f"{title(run)}: {outcome(run)}"


def title(run: dict[str, Any]) -> str:
    """`quickstart on host`: the recipe and the first target."""
    name = clean(str((run.get("recipe") or {}).get("name") or run.get("run") or "run"))
    device = (run.get("targets") or [{}])[0].get("device")
    return f"{name} on {clean(str(device))}" if device else name


def outcome(run: dict[str, Any]) -> str:
    """The headline without the title."""
    teacher, first = run.get("teacher") or {}, (run.get("targets") or [{}])[0]
    parts = [_speed(run, first), _smaller(teacher, first), _accuracy(run, teacher, first)]
    return f"{', '.join(filter(None, parts)) or 'nothing was measured'}; {acceptance(run)}."


def acceptance(run: dict[str, Any]) -> str:
    """`accepted`, `not accepted`, `not judged`, with the reason where one is given."""
    word = {True: "accepted", False: "not accepted"}.get(run.get("accepted"), "not judged")  # type: ignore[arg-type]
    reason = (run.get("accept") or {}).get("reason")
    return f"{word} ({clean(str(reason)).rstrip('.')})" if reason else word


def stage_rows(run: dict[str, Any]) -> list[StageRow]:
    """The stages in order, every cell a clean string; a value that the run does not hold is `-`."""
    return [_stage_row(stage) for stage in run.get("stages") or []]


def target_rows(run: dict[str, Any]) -> list[TargetRow]:
    """The targets in order, every cell a clean string; measured and predicted latencies never share a row."""
    return [_target_row(target) for target in run.get("targets") or []]


def candidate_rows(run: dict[str, Any]) -> dict[str, list[CandidateRow]]:
    """Device -> what was raced there, fastest first; only devices whose runtime was chosen by measuring."""
    found = {}
    for target in run.get("targets") or []:
        if raced := target.get("candidates"):
            rows = sorted(raced, key=lambda c: (text.number(c.get("ratio")) is None, text.number(c.get("ratio")) or 0.0))
            found[clean(str(target.get("device")))] = [_candidate_row(row) for row in rows]
    return found


def metrics(rows: Sequence[StageRow | TargetRow]) -> tuple[str, list[str]]:
    """The heading of a column of metrics and its cells: the name stands in the heading if there is just one, else in each cell."""
    names = {row.metric_name for row in rows if row.metric != text.NONE} - {text.NONE}
    if len(names) <= 1:
        return next(iter(names), "metric"), [row.metric for row in rows]
    return "metric", [row.metric if row.metric == text.NONE else f"{row.metric_name} {row.metric}" for row in rows]


def ratio(before: float | None, after: float | None, better: str, worse: str) -> str:
    """`14.6x faster` or `1.20x slower`; empty where either is unknown."""
    if not before or not after:
        return ""
    gain = before / after
    times = max(gain, 1 / gain)
    shown = f"{times:.0f}" if times >= 100 else f"{times:#.3g}"
    return f"{shown}x {better if gain >= 1 else worse}"


def latencies(run: dict[str, Any]) -> tuple[float | None, float | None]:
    """p50 in ms of the teacher and of what ships; of a graph's nodes, with neighbours or the row of features fetched, which are measured together."""
    served = ((run.get("graph") or {}).get("served") or {}).get("latency_ms") or {}
    if served.get("fetched") and served.get("student"):
        return text.p50(served["fetched"]), text.p50(served["student"])
    teacher, target = run.get("teacher") or {}, (run.get("targets") or [{}])[0]
    return text.p50(teacher.get("latency_ms")), text.p50(target.get("latency_ms") if target.get("measured") else None)


def _speed(run: dict[str, Any], target: dict[str, Any]) -> str:
    if not target.get("measured"):
        guess = text.predicted(target.get("predicted_ms"))
        return f"latency not measured ({guess})" if guess != text.NONE else ("latency not measured" if target else "")
    now = target.get("latency_ms")
    return ratio(*latencies(run), "faster", "slower") or (f"p50 {text.ms(text.p50(now))}" if text.p50(now) else "")


def _smaller(teacher: dict[str, Any], target: dict[str, Any]) -> str:
    now = text.number(target.get("size_bytes"))
    return ratio(text.number(teacher.get("size_bytes")), now, "smaller", "larger") or (text.size(now) if now else "")


def _accuracy(run: dict[str, Any], teacher: dict[str, Any], target: dict[str, Any]) -> str:
    now, name = (
        text.percent(target.get("metric")),
        text.shorten(str(teacher.get("metric_name") or target.get("metric_name") or "accuracy"), _MAX_NAME_CHARS),
    )
    if now == text.NONE:
        return ""
    before = text.percent(teacher.get("metric"))
    return f"{name} {now}" if before == text.NONE else f"{name} {before} -> {now}{_drop(run.get('accept') or {})}"


def _drop(accept: dict[str, Any]) -> str:
    if text.number(accept.get("drop")) is None:
        return ""
    ends, limit = text.interval(accept.get("interval")), accept.get("accuracy_drop_max")
    words = [f"drop {text.points(accept['drop'])} points"]
    words += [f"95 % interval [{text.points(ends[0])}, {text.points(ends[1])}]"] if ends else []
    words += [f"limit {text.points(limit)}"] if text.number(limit) is not None else []
    return f" ({', '.join(words)})"


def _cell(value: Any) -> str:
    return text.NONE if value is None or value == "" else clean(str(value))


def _stage_row(stage: dict[str, Any]) -> StageRow:
    return StageRow(
        name=_cell(stage.get("name")),
        kind=_cell(stage.get("kind")),
        method=_cell(stage.get("method")),
        metric_name=_metric_name(stage),
        metric=text.percent(stage.get("metric")),
        size=text.size(stage.get("size_bytes")),
        latency=text.latency(stage.get("latency_ms")),
        verdict=_cell(stage.get("verdict")),
        reason=_cell(stage.get("reason")),
        seconds=text.seconds(stage.get("seconds")),
        cached={True: "yes", False: "no"}.get(stage.get("cached"), text.NONE),  # type: ignore[arg-type]
    )


def _metric_name(item: dict[str, Any]) -> str:
    return text.shorten(_cell(item.get("metric_name")), _MAX_NAME_CHARS)


def _candidate_row(row: dict[str, Any]) -> CandidateRow:
    ratio_, drop = text.number(row.get("ratio")), text.number(row.get("drop"))
    return CandidateRow(
        name=_cell(row.get("name")),
        precision=_cell(row.get("precision")),
        latency=text.latency(row.get("latency_ms")),
        against=text.NONE if ratio_ is None else f"{ratio_:.2f}x",
        change=text.NONE if drop is None else f"{0.0 - drop * 100:+.2f}",
        size=text.size(row.get("size_bytes")),
        word="refused" if row.get("refused") else "ships" if row.get("chosen") else "",
        note=clean(str(row.get("refused") or row.get("note") or "")),
    )


def _target_row(target: dict[str, Any]) -> TargetRow:
    measured, guess = bool(target.get("measured")), text.predicted(target.get("predicted_ms"))
    budget = ", ".join(_limit(str(k), v) for k, v in (target.get("budget") or {}).items() if v is not None)
    return TargetRow(
        device=_cell(target.get("device")),
        backend=_cell(target.get("backend")),
        precision=_cell(target.get("precision")),
        source="measured" if measured else "predicted" if guess != text.NONE else "not measured",
        latency=text.latency(target.get("latency_ms")) if measured else guess,
        p95=text.ms(text.quantile(target.get("latency_ms"), "p95")) if measured else text.NONE,
        metric_name=_metric_name(target),
        metric=text.percent(target.get("metric")),
        size=text.size(target.get("size_bytes")),
        budget=budget or text.NONE,
        verdict=_BUDGET_WORDS.get(target.get("budget_met"), "unknown") if budget else "no budget",  # type: ignore[arg-type]
        reason=_cell(target.get("reason")),
        bundle=_cell(target.get("bundle")),
    )


def _limit(key: str, value: Any) -> str:
    """`p95_ms: 40` as `p95 <= 40 ms`."""
    name, _, unit = clean(key).rpartition("_")
    unit = {"mb": "MB", "ms": "ms"}.get(unit, "")
    shown = f"{value:g}" if text.number(value) is not None else clean(str(value))
    return f"{name} <= {shown} {unit}" if name and unit else f"{clean(key)} <= {shown}"


# ------------------------------------------------------------------------------------------------- rich renderables
def _stage_table(rows: list[StageRow]) -> Table:
    name, values = metrics(rows)
    table = _table("stage", "method", name, "size", "p50", "verdict", "time", fold=("stage", "method", "metric"))
    for row, metric in zip(rows, values, strict=True):
        cells = [row.name, row.method, metric, row.size, row.latency.split(" [")[0]]
        took = "cached" if row.cached == "yes" else row.seconds
        table.add_row(*map(_text, cells), _text(row.verdict, _STYLES.get(row.verdict, "")), _text(took))
    return table


def _target_table(rows: list[TargetRow]) -> Table:
    name, values = metrics(rows)
    table = _table(
        "target", "backend", "precision", name, "size", "p50", "budget", fold=("target", "backend", "precision", "metric", "p50")
    )
    for row, metric in zip(rows, values, strict=True):
        cells = [row.device, row.backend, row.precision, metric, row.size]
        shown = row.source if row.latency == text.NONE else row.latency.split(" [")[0]
        style = "" if row.source == "measured" else "italic"
        table.add_row(*map(_text, cells), _text(shown, style), _text(row.verdict, _STYLES.get(row.verdict, "")))
    return table


def _candidate_table(rows: list[CandidateRow]) -> Table:
    table = _table("candidate", "precision", "p50", "latency", "points on val", "size", "", fold=("candidate", "precision", "p50"))
    for row in rows:
        cells = [row.name, row.precision, row.latency.split(" [")[0], row.against, row.change, row.size]
        table.add_row(*map(_text, cells), _text(row.word, _STYLES["kept"] if row.word == "ships" else ""))
    return table


def _table(*headers: str, fold: tuple[str, ...]) -> Table:
    """Only the columns in `fold` wrap when the console is narrow; figures and verdicts stay whole."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for header in headers:
        table.add_column(_text(header), overflow="fold", no_wrap=header not in fold)
    return table


def _reasons(rows: list[StageRow]) -> list[Text]:
    return [_line(f"{r.name} {r.verdict}: ", r.reason, "") for r in rows if r.reason != text.NONE]


def _target_reasons(rows: list[TargetRow]) -> list[Text]:
    return [_line(f"{r.device}: ", r.reason, "") for r in rows if r.reason != text.NONE]


def _text(value: str, style: str = "") -> Text:
    from rich.text import Text  # a Text is never read as markup

    return Text(value, style=style)


def _line(lead: str, words: str, style: str) -> Text:
    from rich.text import Text

    return Text.assemble((clean(lead), "bold"), (clean(words), style), overflow="fold")
