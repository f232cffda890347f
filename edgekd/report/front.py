"""After a missed goal: which of the measured candidates are worth having, and which knob is most likely to close the gap (design 5.6)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from edgekd.report.text import number, p50

_MARGIN = 1.1  # ask for a tenth more than the gap


def front(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of name, metric, p50 in ms and bytes of the stages that no other one beats in all three, best metric first."""
    found = [
        {"name": s["name"], "metric": number(s.get("metric")), "p50": p50(s.get("latency_ms")), "size_bytes": number(s.get("size_bytes"))}
        for s in run["stages"]
    ]
    known = [r for r in found if None not in r.values()]
    return sorted((r for r in known if not any(_beats(other, r) for other in known)), key=lambda r: -float(r["metric"] or 0))


def knob(run: dict[str, Any]) -> str:
    """The next thing to try, as an option of the same command; empty where nothing was missed."""
    target = next((t for t in run["targets"] if t["budget_met"] is False), None)
    if target is not None:
        return _smaller_or_faster(run["stages"], target)
    if run["accept"]["met"] is False:
        return _more_accurate(run["stages"])
    return ""


def _beats(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """At least as good in all three, better in one."""
    gains = (a["metric"] - b["metric"], b["p50"] - a["p50"], b["size_bytes"] - a["size_bytes"])
    return bool(min(gains) >= 0 and max(gains) > 0)


def _smaller_or_faster(stages: list[dict[str, Any]], target: dict[str, Any]) -> str:
    budget, latency = target["budget"], target["latency_ms"] or {}
    over = {
        "size": target["size_bytes"] / 1e6 / budget["size_mb"] if "size_mb" in budget else 0,
        "latency": max((latency[n] / budget[f"{n}_ms"] for n in ("p50", "p95") if f"{n}_ms" in budget and n in latency), default=0),
    }
    worst = max(over, key=lambda name: over[name])
    quantize = next((s for s in stages if s["kind"] == "quantize"), None)
    if worst == "size" and quantize is None and over[worst] < 3.5:
        return "add a stage `- quantize: {method: ptq}`: int8 makes a file nearly four times smaller"
    if (prune := next((s for s in stages if s["kind"] == "prune"), None)) is not None:
        before = stages[stages.index(prune) - 1] if stages.index(prune) else None
        now, was = p50(prune.get("latency_ms")), p50((before or {}).get("latency_ms"))
        reached = was / now if now and was and now < was else 1.0
        return f"prune further: -o {prune['name']}.target={{speedup: {reached * over[worst] * _MARGIN:.2g}}}"
    return (
        f"add a stage `- prune: {{target: {{speedup: {over[worst] * _MARGIN:.2g}}}}}`, and one that recovers, or take a smaller model.arch"
    )


def _more_accurate(stages: list[dict[str, Any]]) -> str:
    """The stage after which most was lost says what to change."""
    kept = [s for s in stages if s["metric"] is not None and s["verdict"] not in ("rolled back", "neutral")]
    drops = {s["name"]: (before["metric"] - s["metric"], s) for before, s in pairwise(kept)}
    if not drops:
        return "train longer, or take a larger model.arch"
    lost, stage = max(drops.values(), key=lambda d: float(d[0]))
    if lost > 0 and stage["kind"] == "quantize":
        return "leave int8 out: -o targets.DEVICE.precision=fp32"
    if lost > 0 and stage["kind"] == "prune":
        return f"prune less: -o {stage['name']}.target={{speedup: 1.5}}, or recover for more epochs"
    return f"train longer: -o {next(s['name'] for s in reversed(kept) if s['kind'] in ('distill', 'train'))}.epochs=N"
