"""mix: finds by measuring which operators of a graph are worth quantizing on the judge -> the decision which nodes stay as they are.

An int8 convolution pays for the Quantize and Dequantize nodes around it only where it has many operations for each value that passes, so sets that
grow by that ratio are built and measured against fp32, and beside them the operators that gained when they were quantized alone (sensitivity.py). From
the best set on, operators that lost alone and stretches of the graph are switched, each change kept only if the interleaved measurement is sure. Then
accuracy on val: while the drop is too large, the operators that cost most of it for what they gain go back to fp32, each time twice as many; those whose
going back changes nothing stay, and others go. What is left is measured against fp32 once more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgekd.artifact import Artifact, Kind
from edgekd.errors import BackendError
from edgekd.registry import register
from edgekd.stages._partial import PartialGraphs
from edgekd.stages._stage import Settings, read_decision, write_decision
from edgekd.stages.compile import RunConfig

if TYPE_CHECKING:
    from edgekd.context import Context

_NESTED = (1.0, 0.75, 0.55, 0.4, 0.3, 0.2, 0.12, 0.06)  # shares of the operators, densest in operations first
_STRETCHES = 10  # pieces of the graph that are switched as one
_BACK = 0.1  # share of the quantized operators that go back to fp32 first
_TRIES = 8  # graphs that are judged on val at least: doubling reaches an accurate set or none in fewer
_LEAST_GAIN = 0.002  # of the latency: below, what an operator gains is noise


@register("stage")
class Mix:
    class Config(RunConfig):
        evaluations: int = Field(
            24, ge=1, le=200, description="graphs that are built and measured; what is left of them, and 8 at least, is judged on val"
        )
        accuracy_drop_max: float = Field(0.01, ge=0, le=1, description="largest drop on val against the graph as it came")

    takes: Mapping[str, Kind] = {"graph": Kind.GRAPH, "data": Kind.DATA, "sensitivity": Kind.DECISION}
    gives = Kind.DECISION
    version = 3
    libraries = ("onnx", "onnxruntime-gpu", "onnxruntime")
    method_kind = "quantize"

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        config = settings.typed(self.Config)
        with tempfile.TemporaryDirectory() as folder:
            graphs = PartialGraphs(settings, config, inputs, Path(folder), ctx)
            found = _Search(graphs, read_decision(inputs["sensitivity"])["rows"], config, ctx).run()
        write_decision(out, found)
        return {"trials": len(found["trials"]), "quantized": found["quantized"], "reason": found["reason"]}


class _Search:
    """Measures graphs that differ in which operators are quantized."""

    def __init__(self, graphs: PartialGraphs, alone: list[dict[str, Any]], config: Any, ctx: Context):
        self.graphs, self.config, self.ctx = graphs, config, ctx
        self.alone = {row["node"]: row for row in alone if row["ratio"] is not None}
        self.trials: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """The decision: nodes that stay, what was tried, and the measured ratio of the best graph to fp32."""
        names = self.graphs.operators
        if not names:
            return self._everything(self.graphs.unknown or "the graph has no operators with weights")
        with self.ctx.console.bar("search", self.config.evaluations) as bar:
            self.bar = bar
            best = self._best_set(names)
            if all(t["ratio"] is None for t in self.trials):
                return self._everything("no graph could be built or measured in the time of a trial")
            if best:
                best = self._switched(best)
        if not best:
            return self._nothing(f"no set of the {len(names)} operators is certainly faster in int8")
        if not (accurate := self._accurate(best)):
            points = 100 * self.config.accuracy_drop_max
            return self._nothing(
                f"of the {len(best)} operators that are faster in int8 no set was found that loses at most {points:g} points"
            )
        return self._confirmed(accurate)

    def _confirmed(self, best: set[str]) -> dict[str, Any]:
        """The decision for a set, if it is faster than fp32 itself: operators went back, and sets were compared with one another."""
        found, told = self._measured(best, None), f"{len(best)} of {len(self.graphs.operators)} operators in int8"
        self.trials.append({"quantized": sorted(best), "ratio": found["ratio"], "ci95": found["ci95"]})
        if found["ratio"] is None:
            return self._nothing(f"{told} could not be measured against fp32 at the end")
        ratio, (low, high) = found["ratio"], found["ci95"]
        if not high < 1:
            return self._nothing(
                f"{told} are not certainly faster than fp32 at the end: {ratio:.2f}x its latency ({low:.2f} to {high:.2f})"
            )
        return self._facts(best) | {"reason": f"{told}: {ratio:.2f}x the latency of fp32", "chosen": "after"}

    def _nothing(self, why: str) -> dict[str, Any]:
        """The decision to leave the graph as it came."""
        return self._facts(set()) | {"reason": why, "chosen": "before", "verdict": "rolled back", "why": why}

    def _everything(self, why: str) -> dict[str, Any]:
        """The decision where nothing could be searched: as without a search."""
        self.ctx.console.warn(f"no search for operators, everything is quantized: {why}")
        return self._facts(set(self.graphs.operators)) | {"reason": f"everything is quantized: {why}", "chosen": "after"}

    def _facts(self, best: set[str]) -> dict[str, Any]:
        names = self.graphs.operators
        return {
            "keep": sorted(set(names) - best),
            "quantized": len(best),
            "candidates": len(names),
            "trials": self.trials,
        }

    # ------------------------------------------------------------------------------------------------ latency
    def _best_set(self, names: Sequence[str]) -> set[str]:
        """The fastest of the sets to begin with, of equals the largest; empty where none is faster than fp32."""
        found = [(self._against(chosen, None), -len(chosen), chosen) for chosen in self._sets(names)[: self._left()]]
        faster = [f for f in found if f[0] < 1]
        return min(faster, key=lambda f: f[:2])[2] if faster else set()

    def _sets(self, names: Sequence[str]) -> list[set[str]]:
        """Everything, what gained alone, and nested sets of the densest."""
        sizes = sorted({max(1, round(share * len(names))) for share in _NESTED}, reverse=True)
        nested = [set(names[:size]) for size in sizes]
        probably = {n for n, row in self.alone.items() if row["ratio"] < 1}
        surely = {n for n, row in self.alone.items() if row["ci95"][1] < 1}
        sets = [nested[0], probably, surely, *nested[1:]]
        return [chosen for place, chosen in enumerate(sets) if chosen and chosen not in sets[:place]]

    def _switched(self, best: set[str]) -> set[str]:
        """Operators that lost or gained alone, then stretches of the graph, in or out, while that is certainly faster."""
        lost, gained = ({n for n, row in self.alone.items() if (row["ratio"] > 1) is slower} for slower in (True, False))
        for changed in (best - lost, best | gained):
            if changed and changed != best and self._left() and self._against(changed, best) < 1:
                best = changed
        stretches = list(_pieces(self.graphs.in_order(), _STRETCHES))
        improved = True
        while improved and self._left():
            improved = False
            for stretch in stretches:
                if not self._left():
                    break
                inside = best & set(stretch)
                for changed in (best - inside, best | set(stretch)):
                    if changed and changed != best and self._left() and self._against(changed, best) < 1:
                        best, improved = changed, True
        return best

    def _left(self) -> int:
        return max(0, int(self.config.evaluations) - sum("against" in t for t in self.trials))

    def _against(self, chosen: set[str], other: set[str] | None) -> float:
        """Upper end of the interval of latency ratios: `chosen` to `other`, or to fp32; below 1 it is certainly faster."""
        self.ctx.stop.check()
        found = self._measured(chosen, other)
        ratio, high = (float("inf"), float("inf")) if found["ratio"] is None else (found["ratio"], found["ci95"][1])
        against = "fp32" if other is None else f"{len(other)} operators"
        self.trials.append({"quantized": sorted(chosen), "against": against, "ratio": ratio if ratio < float("inf") else None})
        self.bar.update(self.config.evaluations - self._left(), int8=str(len(chosen)), ratio=f"{ratio:.3f}")
        return float(high)

    def _measured(self, chosen: set[str], other: set[str] | None) -> dict[str, Any]:
        """Ratio of latencies with its interval; none where a runtime refuses the set, which is no reason to end the search."""
        try:
            return self._compared(chosen, other)
        except BackendError as problem:
            self.ctx.console.say(f"  {len(chosen)} operators: {problem}")
            return {"ratio": None, "ci95": None}

    def _compared(self, chosen: set[str], other: set[str] | None) -> dict[str, Any]:
        """Ratio of latencies with its interval: the graph with `chosen` quantized to that with `other`, or to fp32."""
        old = self.graphs.fp32 if other is None else self.graphs.open(self.graphs.built(other))
        return self.graphs.ratio(self.graphs.open(self.graphs.built(chosen)), old)

    # ------------------------------------------------------------------------------------------------ accuracy
    def _accurate(self, best: set[str]) -> set[str]:
        """What of the set keeps the drop on val inside the limit; nothing where no try did.

        More and more operators go back, in the order that helps; then as many of the last ones as fit come again.
        """
        self.reference, self.tries = self._scores(set()), max(self._left(), _TRIES)
        orders, gone, count = [self._costly, self._others], list[str](), max(1, round(_BACK * len(best)))
        with self.ctx.console.bar("accuracy", self.tries) as bar:
            self.bar, self.planned = bar, self.tries
            drop = self._drop(best)
            while drop > self.config.accuracy_drop_max:
                if len(best) == 1 or not self.tries:
                    return set()
                going = orders[0](best)[: min(count, len(best) - 1)]
                fewer = best - set(going)
                found = self._drop(fewer) if going else drop
                if found >= drop and len(orders) > 1:  # what went back costs nothing: it stays
                    del orders[0]
                    continue
                best, gone, drop, count = fewer, going, found, 2 * count
            return self._come_again(best, gone)

    def _come_again(self, best: set[str], gone: list[str]) -> set[str]:
        """The set with those of the last step, worst first, that need not have gone."""
        few, enough = 0, len(gone)
        while enough - few > 1 and self.tries:
            middle = (few + enough) // 2
            if self._drop(best | set(gone[middle:])) <= self.config.accuracy_drop_max:
                enough = middle
            else:
                few = middle
        return best | set(gone[enough:])

    def _drop(self, chosen: set[str]) -> float:
        """Of the metric on val against fp32; infinite where a runtime refuses the set."""
        self.ctx.stop.check()
        drop: float | None = None
        try:
            drop = float((self.reference - self._scores(chosen)).mean())
        except BackendError as problem:
            self.ctx.console.say(f"  {len(chosen)} operators: {problem}")
        self.tries -= 1
        self.trials.append({"quantized": sorted(chosen), "drop": drop})
        shown = "refused" if drop is None else f"{drop:.4f}"
        self.bar.update(self.planned - self.tries, int8=str(len(chosen)), drop=shown)
        return float("inf") if drop is None else drop

    def _scores(self, chosen: set[str]) -> Any:
        session = self.graphs.open(self.graphs.built(chosen)) if chosen else self.graphs.fp32
        return self.graphs.scores(self.graphs.outputs(session))

    def _costly(self, best: set[str]) -> list[str]:
        """The operators that were measured alone, those first that cost most accuracy for what they gain."""
        known = [row for row in self.alone.values() if row["node"] in best]
        costs = {row["node"]: (max(row["drop"], 0.0) + row["error"]) / max(1 - row["ratio"], _LEAST_GAIN) for row in known}
        return sorted(costs, key=lambda n: (-costs[n], n))

    def _others(self, best: set[str]) -> list[str]:
        """All operators: those first at which tensors turn away most, then the least dense, which gain least."""
        steep: list[str] = []
        try:
            steep = self._steepest(best)
        except (OSError, MemoryError):  # the machine's
            raise
        except Exception as problem:  # where to begin is no more than a help, and onnxruntime may refuse what the target's runtime takes
            self.ctx.console.say(f"  the tensors of {len(best)} operators cannot be compared: {problem}")
        return list(dict.fromkeys([*steep, *(n for n in reversed(self.graphs.operators) if n in best)]))

    def _steepest(self, best: set[str]) -> list[str]:
        import onnx

        from edgekd.data.normalise import normalised
        from edgekd.export.bisect import compare_tensors, steepest

        graphs = self.graphs
        size = graphs.facts["fixed_batch"] or 8
        feeds = {graphs.facts["input"]: normalised(graphs.dataset.samples(graphs.positions[:size]), graphs.facts)}
        before, after = (onnx.load_model_from_string(f.read_bytes()) for f in (graphs.graph, graphs.built(best)))
        tensors = [t for t in compare_tensors(before, after, feeds, feeds) if t.node in best]
        return [t.node for t in steepest(tensors, len(best))]


def _pieces(names: Sequence[str], count: int) -> Iterator[list[str]]:
    size = max(1, -(-len(names) // count))
    for start in range(0, len(names), size):
        yield list(names[start : start + size])
