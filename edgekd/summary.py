"""Plan and finished steps -> run.json: the numbers of the contract (design section 6), each read from an artifact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgekd import registry
from edgekd.artifact import Artifact, Kind
from edgekd.gate import paired_drop
from edgekd.plan import Plan, Ref, Step, Target
from edgekd.recipe import resolved
from edgekd.report.front import front, knob
from edgekd.run import Done
from edgekd.stages._stage import read_decision
from edgekd.stages.compile import engine_bytes


def summarise(
    plan: Plan, done: Done, folder: Path, *, command: list[str], seconds: float, warnings: list[str], environment: dict[str, Any]
) -> dict[str, Any]:
    """The object of run.json. Paths in it are as given: relative to where the command ran."""
    return _Summary(plan, done, folder).body() | {
        "run": str(folder),
        "report": str(folder / "report.html"),
        "command": command,
        "seconds": round(seconds, 1),
        "warnings": warnings,
        "environment": environment,
    }


class _Summary:
    """Reads what the steps made."""

    def __init__(self, plan: Plan, done: Done, folder: Path):
        self.plan, self.done, self.folder, self.recipe = plan, done, folder, plan.loaded.recipe
        self.first = plan.targets[0]
        self.trace = done.artifacts[f"{self.first.name}.profile"].json("trace.json")

    def body(self) -> dict[str, Any]:
        teacher, targets = self._teacher(), [self._target(t) for t in self.plan.targets]
        accept, parity = self._accept(), self._parity()
        failed = self._failed(targets, accept, parity)
        if failed:
            accept["reason"] = "; ".join(failed)
        body = {
            "recipe": {"name": self.plan.loaded.name, "resolved": self._resolved()},
            "decisions": str(self.folder / "decisions.json"),
            "teacher": teacher,
            "stages": self._stages(),
            "baselines": [self._reference(name) for name in self.plan.baselines],
            "targets": targets,
            "accepted": not failed,
            "accept": accept,
            "curves": self._curves(),
            "latency_samples": {n: r["samples"] for n, r in self.trace["latency"].items() if n in ("teacher", "shipped")},
            "confusion": self._confusion(),
            "operators": [
                {"name": o["name"], "op_type": o["op_type"], "share": o["share"], "mean_us": o["total_us"], "calls": o["calls"]}
                | {n: o[n] for n in ("precision", "format") if o.get(n)}
                for o in self.trace["operators"]
            ],
            "sensitivity": self._sensitivity(),
            "parity": parity,
            "footprint": self.trace["footprint"],
        }
        if {"test.groups", "teacher.served"} & self.done.artifacts.keys():
            body["graph"] = self._graph()
        return body | ({"front": front(body), "knob": knob(body)} if failed else {})

    def _failed(self, targets: list[dict[str, Any]], accept: dict[str, Any], parity: list[dict[str, Any]]) -> list[str]:
        """Why the result is not accepted, in words; empty where it is."""
        found = [f"{t['device']}: {t['reason']}" for t in targets if t["budget_met"] is False]
        asked = {t.name: t.config.precision for t in self.plan.targets}
        found += [
            f"{t['device']}: {asked[t['device']]} was asked for, {t['precision']} is what passed the gate"
            for t in targets
            if asked[t["device"]] not in ("auto", t["precision"])
        ]
        found += [
            f"{row['target']}: parity is broken at '{row['rung']}' ({', '.join(row['failed'])}), first at {row['first_break']}"
            for row in parity
            if not row["ok"]
        ]
        return found + ([accept["reason"]] if accept["met"] is False else [])

    # ------------------------------------------------------------------------------------------------ rows
    def _latency(self, name: str) -> dict[str, Any] | None:
        row = self.trace["latency"].get(name)
        return {k: row[k] for k in ("p50", "p95", "p99", "ci95", "n", "series")} if row and row["p50"] is not None else None

    def _teacher(self) -> dict[str, Any] | None:
        if "teacher" not in self.plan.metrics:
            return None
        found = {"arch": self.recipe.teacher.name if self.recipe.teacher else None} | self._reference("teacher")
        return found | ({"latency_ms": self._served("fetched")} if "teacher.served" in self.done.artifacts else {})

    def _served(self, way: str) -> dict[str, Any] | None:
        """The latency of a graph model that fetches neighbours, or of what was measured beside it."""
        row = self.done.artifacts["teacher.served"].json("trace.json")["latency"].get(way)
        return {k: row[k] for k in ("p50", "p95", "p99", "ci95", "n", "series")} if row and row["p50"] is not None else None

    def _graph(self) -> dict[str, Any]:
        """Where on the graph the student loses; what looking at neighbours costs: each way to run the graph model, the engine with its row fetched,
        and ratios to it."""
        data, done = self.done.artifacts["data"].meta, self.done.artifacts
        found: dict[str, Any] = {n: data.get(n, 0) for n in ("nodes", "edges", "features", "unseen", "assumed")}
        found |= done["test.groups"].json("groups.json") if "test.groups" in done else {}
        if "teacher.answers" in done and "temperature" in done["teacher.answers"].meta:
            found["temperature"] = done["teacher.answers"].meta["temperature"]
        if "teacher.served" in self.done.artifacts:
            body = self.done.artifacts["teacher.served"].json("trace.json")
            found["served"] = {"latency_ms": {n: self._served(n) for n in body["latency"]}, "ratios": body["ratios"]}
            if body["whole_us_per_node"]:
                found["served"]["whole_us_per_node"] = body["whole_us_per_node"]
        return found

    def _reference(self, name: str) -> dict[str, Any]:
        """What the result is compared with (the teacher, a baseline): metrics on test, as for what ships."""
        test = self.done.artifacts[f"{name}.test"].json("metrics.json")
        return {
            "name": name,
            **_metric(test),
            "metrics": test["metrics"],
            "latency_ms": self._latency(name),
            "size_bytes": engine_bytes(self.done.artifacts[self.plan.engines[name]]) if name in self.plan.engines else None,
        }

    def _stages(self) -> list[dict[str, Any]]:
        """What a person asked for, in order: the teacher, the listed stages, and the chain's end."""
        rows = []
        for step in self.plan.steps:
            name = step.name
            listed = step.user and step.gives in (Kind.MODEL, Kind.GRAPH) and step.stage not in ("init",)
            if listed and step.name in self.plan.engines:
                rows.append(self._stage_row(step.name, step.stage, step.settings.method, name))
        shipped = self._last_export()
        rows.append(self._plain_row("export", "export", self._steps_of("export"), shipped))
        return rows + [self._plain_row(kind, kind, self._steps_of(kind), None) for kind in ("compile", "profile", "bundle")]

    def _stage_row(self, step: str, kind: str, method: str | None, name: str) -> dict[str, Any]:
        artifact = self.done.artifacts[step]
        verdict = self._verdict(step)
        skipped = step in self.done.skipped
        row = {
            "name": name,
            "kind": kind,
            "method": method,
            "key": artifact.key,
            "cached": step not in self.done.seconds,
            "seconds": self._seconds(step),
        }
        return row | self._measured_row(name, step) | verdict | ({"skipped": True} if skipped else {})

    def _plain_row(self, name: str, kind: str, steps: list[str], artifact: Artifact | None) -> dict[str, Any]:
        seconds = round(sum(self.done.seconds.get(s, 0.0) for s in steps), 3)
        row: dict[str, Any] = {
            "name": name,
            "kind": kind,
            "method": None,
            "key": artifact.key if artifact else None,
            "cached": not any(s in self.done.seconds for s in steps),
        }
        return row | {
            "seconds": seconds,
            "metric": None,
            "metric_name": None,
            "size_bytes": None,
            "latency_ms": None,
            "verdict": None,
            "reason": None,
        }

    def _measured_row(self, name: str, step: str) -> dict[str, Any]:
        body = self._metrics_of(self.plan.metrics.get(step))
        return {
            "name": name,
            **_metric(body),
            "metrics": body["metrics"],
            "size_bytes": engine_bytes(self.done.artifacts[self.plan.engines[step]]),
            "latency_ms": self._latency(step),
        }

    def _metrics_of(self, step: str | None) -> dict[str, Any]:
        """What a step of `evaluate` measured; nothing where there was none, for want of data."""
        found = self.done.artifacts.get(step or "")
        return dict(found.json("metrics.json")) if found else {"metric_name": None, "metrics": {}, "confusion": None}

    def _verdict(self, step: str) -> dict[str, Any]:
        for segment in self.plan.segments:
            if segment.stages and segment.stages[0] == step:
                decision = read_decision(self.done.artifacts[segment.gate])
                return {"verdict": decision["verdict"], "reason": "; ".join(filter(None, (decision["reason"], self._tried(step))))}
            if step in segment.stages:
                return {"verdict": None, "reason": f"judged with '{segment.stages[0]}'"}
        return {"verdict": None, "reason": None}

    def _tried(self, step: Ref) -> str:
        """What the trial said of a quantized graph: its calibration, and nodes in higher precision; empty where there was nothing to say."""
        trial = self.done.artifacts.get(f"{step}.trial")
        return str(read_decision(trial)["reason"]) if trial else ""

    def _seconds(self, step: str) -> float:
        """This run's time, or the time it took when it was built; a quantizer's with that of its training."""
        steps = [s for s in (f"{step}.train", step) if s in self.done.artifacts]
        return round(sum(float(self.done.seconds.get(s, self.done.artifacts[s].meta.get("seconds", 0.0))) for s in steps), 3)

    def _steps_of(self, stage: str) -> list[str]:
        return [s.name for s in self.plan.steps if s.stage == stage]

    def _last_export(self) -> Artifact:
        return self.done.resolve(self.plan.shipped[self.first.name])

    # ------------------------------------------------------------------------------------------------ targets
    def _target(self, target: Target) -> dict[str, Any]:
        name = target.name
        bundle, test = self.done.artifacts[f"{name}.bundle"], self._metrics_of(f"{name}.test")
        trace = self.done.artifacts[f"{name}.profile"].json("trace.json")["latency"]["shipped"]
        graph = self.done.resolve(self.plan.shipped[name])
        measured, race = target.runs_here, self.plan.races.get(name)
        latency = {k: trace[k] for k in ("p50", "p95", "p99", "ci95", "n", "series")} if measured and trace["p50"] is not None else None
        size = int(bundle.meta["size_bytes"])
        missed, reason = self._budget(target, latency, size)
        row: dict[str, Any] = {
            "device": name,
            "backend": self.done.resolve(race.engine).json("engine.json")["backend"] if race else target.backend,
            "precision": graph.json("graph.json")["precision"],
            "measured": measured,
            "latency_ms": latency,
            **_metric(test),
            "metrics": test["metrics"],
            "size_bytes": size,
            "model_file": bundle.meta["model_file"],
            "budget": {k: v for k, v in target.config.budget.model_dump().items() if v is not None},
            "budget_met": None if missed is None else not missed,
            "reason": reason,
            "bundle": str(self.folder / name),
            "threads": target.threads,
            "batch": graph.json("graph.json")["fixed_batch"] or target.config.batch,
        }
        if race:
            decision = read_decision(self.done.artifacts[race.decision])
            row["candidates"] = [
                c | {"chosen": c["name"] == decision["chosen"], "note": self._tried(race.graphs[c["name"]])} for c in decision["rows"]
            ]
        if not measured:
            row |= {
                "budget_met": None,
                "predicted_ms": _predicted(bundle, target),
                "reason": f"{name} is not this machine: latency was not measured"
                + (", accuracy and size were judged here on onnxruntime" if self.recipe.data is not None else "")
                + (f"; {reason}" if missed else ""),
            }
        return row

    def _budget(self, target: Target, latency: dict[str, Any] | None, size: int) -> tuple[bool | None, str]:
        missed, reason = target.config.budget.missed(latency, size)
        if (
            missed is False
            and latency
            and latency["series"] not in ("stable", "spiky")
            and {"p50_ms", "p95_ms"} & {k for k, v in target.config.budget.model_dump().items() if v}
        ):
            return None, f"the latency series is {latency['series']}: measure again on a quiet machine"
        return missed, reason

    def _accept(self) -> dict[str, Any]:
        """The drop of what ships against the reference on test, paired, with its interval; of several targets the worst."""
        import numpy as np

        limit = self.recipe.accept.accuracy_drop_max
        reference = self.done.artifacts.get("teacher.test")
        if reference is None:
            return {
                "accuracy_drop_max": limit,
                "drop": None,
                "interval": None,
                "met": None,
                "reference": None,
                "reason": "there is no teacher to compare with on test; gates compared on val"
                if self.recipe.data is not None
                else "there are no data: accuracy was not measured",
            }
        task = registry.load("task", self.recipe.task)()
        labels = np.load(reference.path / "labels.npy")
        shipped = [self.done.artifacts[f"{t.name}.test"] for t in self.plan.targets]
        before, *after = (task.scores(np.load(a.path / "outputs.npy"), labels).tolist() for a in (reference, *shipped))
        drop, interval = max((paired_drop(before, scores) for scores in after), key=lambda found: found[0])
        met = drop <= limit
        name = reference.json("metrics.json")["metric_name"]
        if name == task.metric_name:
            reason = f"test accuracy {'within' if met else 'beyond'} {limit * 100:g} points of the teacher's"
        else:
            reason = f"{name} with the teacher on test {'within' if met else 'beyond'} {limit * 100:g} points of all images"
        return {"accuracy_drop_max": limit, "drop": drop, "interval": list(interval), "met": met, "reference": "teacher", "reason": reason}

    def _resolved(self) -> list[dict[str, Any]]:
        """Every value of the recipe with its source; what was left to measurements as it was found, with several targets for each of them."""
        rows = {row["path"]: row for row in resolved(self.plan.loaded)}
        for target in self.plan.targets:
            step = self.plan.step(self._shipped_step(self.plan.shipped[target.name]))
            if step.stage != "quantize":
                continue
            own = step.settings.name
            place = own + (f" ({target.name})" if len(self.plan.targets) > 1 else "")
            for name, value, source in self._found(step, rows):
                rows[f"{place}.{name}"] = {"path": f"{place}.{name}", "value": value, "source": source}
        return list(rows.values())

    def _shipped_step(self, ref: Ref) -> str:
        """The name of the step that a reference stands for, through the decisions of gates and races."""
        return ref if isinstance(ref, str) else self._shipped_step(ref.options[self.done.chosen(ref.decision)])

    def _found(self, step: Step, rows: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, Any, str]]:
        """(field, value, source) of what decisions changed in a quantizing step's settings; `rows` are those of the recipe."""
        config = step.settings.method_config
        decisions = {str(ref): read_decision(self.done.artifacts[str(ref)]) for n, ref in step.inputs.items() if n in ("mix?", "trial?")}
        given = list(getattr(config, "keep_nodes", ()))
        if found := sorted({node for d in decisions.values() for node in d["keep"]} - set(given)):
            sources = [rows[f"{step.settings.name}.keep_nodes"]["source"]] if given else []
            sources += [f"measured by {ref}" for ref, d in decisions.items() if d["keep"]]
            yield "keep_nodes", [*given, *found], ", ".join(sources)
        for ref, d in decisions.items():
            if d.get("calibration") and getattr(config, "calibration", None) == "auto":
                yield "calibration", d["calibration"], f"measured by {ref}"

    def _sensitivity(self) -> list[dict[str, Any]]:
        """What each operator costs and gains when it alone is quantized, for each search."""
        found = []
        for step in [s for s in self.plan.steps if s.stage == "mix" and s.name in self.done.artifacts]:
            chosen, alone = (read_decision(self.done.artifacts[name]) for name in (step.name, str(step.inputs["sensitivity"])))
            rows = [row | {"quantized": row["node"] not in chosen["keep"]} for row in alone["rows"]]
            found.append(
                {
                    "search": step.name.removesuffix(".mix"),
                    "reason": chosen["reason"],
                    "candidates": chosen["candidates"],
                    "operators": rows,
                }
            )
        return found

    # ------------------------------------------------------------------------------------------------ charts
    def _curves(self) -> dict[str, Any]:
        found = {}
        for step in self.plan.steps:
            artifact = self.done.artifacts[step.name]
            if step.gives is Kind.MODEL and step.name not in self.done.skipped and (artifact.path / "curves.json").is_file():
                found[step.name] = artifact.json("curves.json")
        return found

    def _confusion(self) -> dict[str, Any] | None:
        table = self._metrics_of(f"{self.first.name}.test")["confusion"]
        return {"labels": self.done.artifacts["data"].meta["classes"], "matrix": table} if table else None

    def _parity(self) -> list[dict[str, Any]]:
        return [{"target": t.name} | row for t in self.plan.targets for row in self.done.artifacts[f"{t.name}.parity"].json("parity.json")]


def _metric(body: Mapping[str, Any]) -> dict[str, Any]:
    return {"metric": body["metrics"].get(body["metric_name"]), "metric_name": body["metric_name"]}


def _predicted(bundle: Artifact, target: Target) -> dict[str, Any] | None:
    """A roofline latency for a device that is not here; None where the profile lacks numbers."""
    from edgekd.errors import EdgekdError
    from edgekd.profile.predict import predict

    try:
        found = predict(bundle.path / "bundle" / "model.onnx", target.device, threads=target.threads, batch=target.config.batch)
    except EdgekdError:
        return None
    return {"p50": found.p50_ms, "low": found.low_ms, "high": found.high_ms, "basis": found.basis, "label": "predicted"}
