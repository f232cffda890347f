"""parity: torch fp32 -> ONNX fp32 -> optimized -> quantized -> engine on real val images -> one row a rung; a broken rung makes the run end with exit 4."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgekd import registry
from edgekd.artifact import Artifact, Kind
from edgekd.config import Config as Base
from edgekd.quantize._learned import GRID
from edgekd.registry import register
from edgekd.stages._stage import Settings
from edgekd.stages.compile import ENGINE
from edgekd.stages.export import FACTS, GRAPH

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekd.context import Context
    from edgekd.export.bisect import Compared
    from edgekd.stages._common import Samples

PARITY = "parity.json"
_PROBES = 8  # images whose intermediate tensors are compared where a rung is broken


@register("stage")
class Parity:
    class Config(Base):
        samples: int = Field(256, ge=1, description="val images that are compared")

    takes: Mapping[str, Kind] = {"graph": Kind.GRAPH, "fp32": Kind.GRAPH, "data": Kind.DATA, "model?": Kind.MODEL, "engine?": Kind.ENGINE}
    gives = Kind.METRICS
    version = 6
    libraries = ("torch", "onnxruntime-gpu", "onnxruntime")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        from edgekd.export.parity import compare
        from edgekd.stages._common import drawn, open_samples, task_of
        from edgekd.stages.compile import open_engine
        from edgekd.stages.evaluate import run_engine

        task, dataset = task_of(settings), open_samples(inputs["data"], ctx)
        positions = drawn(dataset, "val", settings.typed(self.Config).samples)
        labels, rows = dataset.labels[positions] if dataset.labelled else None, []
        places = _Places(inputs, dataset, positions[:_PROBES])
        onnx = graph_outputs(inputs["fp32"], dataset, positions, ctx)
        if "model" in inputs:
            row = compare("torch fp32 -> ONNX fp32", "fp32", torch_outputs(inputs["model"], dataset, positions), onnx, labels, task)
            rows.append(row | places.of(row, places.exported))
        facts = inputs["graph"].json(FACTS)
        precision = facts["precision"]
        if inputs["graph"].digest != inputs["fp32"].digest:
            rounded, source = graph_outputs(inputs["graph"], dataset, positions, ctx), "ONNX fp32"
            if (
                "model" in inputs and (inputs["model"].path / GRID).is_file()
            ):  # trained with rounded inputs: without them it is another model
                onnx, source = torch_outputs(inputs["model"], dataset, positions, rounded=True), "torch rounded"
            elif facts.get("prepared_by"):
                found = outputs_of(places.prepared, facts, dataset, positions, ctx)
                row = compare("ONNX fp32 -> optimized", "fp32", onnx, found, labels, task)
                rows.append(row | places.of(row, places.optimized))
                onnx, source = found, "optimized"
            row = compare(f"{source} -> {precision}", precision, onnx, rounded, labels, task)
            rows.append(row | places.of(row, places.rounded))
            onnx = rounded
        if "engine" in inputs and (name := _another(inputs["engine"])):
            session, facts = open_engine(inputs["engine"])
            found = run_engine(session, facts, dataset, positions, ctx, "parity")
            row = compare(f"ONNX {precision} -> {name}", precision, onnx, found, labels, task)
            rows.append(row | places.of(row, places.built))
        (out / PARITY).write_text(json.dumps(rows, sort_keys=True), encoding="utf-8")
        return {"ok": all(row["ok"] for row in rows)}


def _another(engine: Artifact) -> str | None:
    """What an engine is called that is not the graph on onnxruntime: the rungs before were run on that."""
    facts = engine.json(ENGINE)
    if facts["backend"] != "onnxruntime":
        return str(facts["backend"])
    return None if facts["model_file"] == GRAPH else "ORT format"


class _Places:
    """Finds the first node at which a broken rung breaks, on a few images."""

    def __init__(self, inputs: Mapping[str, Artifact], dataset: Samples, positions: NDArray[np.int64]):
        self.inputs, self.dataset, self.positions = inputs, dataset, positions
        self._folder = tempfile.TemporaryDirectory()

    @cached_property
    def prepared(self) -> Path:
        """The fp32 graph as its quantizer optimizes it before rounding, made again."""
        path = Path(self._folder.name) / "optimized.onnx"
        registry.load("quantize", self.inputs["graph"].json(FACTS)["prepared_by"]).prepare(self.inputs["fp32"].path / GRAPH, path)
        return path

    def of(self, row: Mapping[str, Any], compared: Callable[[], list[Compared]]) -> dict[str, Any]:
        """`first_break` in words for a row that is broken; nothing where it holds. What cannot be looked into says why."""
        from edgekd.export.bisect import first_break, tensor_limits

        if row["ok"]:
            return {}
        exact = row["rung"].endswith(("ONNX fp32", "optimized"))
        precision = "fp32" if exact else self.inputs["graph"].json(FACTS)["precision"]
        try:
            first = first_break(compared(), **tensor_limits(precision))
        except Exception as problem:  # looking for the reason must not hide that the rung is broken
            return {"first_break": f"not found: {type(problem).__name__}: {problem}"[:300]}
        return {"first_break": first.said() if first else "no single node: errors add up"}

    def exported(self) -> list[Compared]:
        import torch

        from edgekd.export.bisect import compare_modules
        from edgekd.models.build import load_model
        from edgekd.safeio.onnxfile import check_onnx

        module, _ = load_model(self.inputs["model"])
        feeds = self._feeds("fp32")
        [images] = feeds.values()
        return compare_modules(module.eval(), torch.from_numpy(images), check_onnx(self.inputs["fp32"].path / GRAPH, trusted=True), feeds)

    def optimized(self) -> list[Compared]:
        from edgekd.export.bisect import compare_tensors
        from edgekd.safeio.onnxfile import check_onnx

        fp32, feeds = check_onnx(self.inputs["fp32"].path / GRAPH, trusted=True), self._feeds("fp32")
        return compare_tensors(fp32, check_onnx(self.prepared, trusted=True), feeds, feeds)

    def rounded(self) -> list[Compared]:
        from edgekd.export.bisect import compare_tensors
        from edgekd.safeio.onnxfile import check_onnx

        fp32, graph = (check_onnx(self.inputs[n].path / GRAPH, trusted=True) for n in ("fp32", "graph"))
        return compare_tensors(fp32, graph, self._feeds("fp32"), self._feeds("graph"))

    def built(self) -> list[Compared]:
        """The graph's tensors on onnxruntime against the same on the engine's runtime, built again to show them."""
        from edgekd.export.bisect import compare_tensors
        from edgekd.safeio.onnxfile import check_onnx

        graph, feeds = check_onnx(self.inputs["graph"].path / GRAPH, trusted=True), self._feeds("graph")
        return compare_tensors(graph, graph, feeds, feeds, self._on_its_runtime)

    def _on_its_runtime(self, model: Any, names: list[str], feeds: Any) -> dict[str, Any]:
        from edgekd.export.bisect import showing
        from edgekd.profile.device import load_device

        facts = self.inputs["engine"].json(ENGINE)
        backend, device = registry.load("backend", facts["backend"])(), load_device(facts["device"])
        with tempfile.TemporaryDirectory() as name:
            file = Path(name) / "showing.onnx"
            file.write_bytes(showing(model, names).SerializeToString())
            meta = backend.convert(file, device, Path(name), {}, batch=len(self.positions))
            built = Path(name) / meta["model_file"]
            session = backend.open(built, threads=facts["threads"], device=device, options=meta.get("options"))
            values = dict(zip(session.output_names, session.run(dict(feeds)), strict=True))
            session.close()
        return {n: v for n, v in values.items() if v.dtype.kind == "f"}

    def _feeds(self, name: str) -> dict[str, NDArray[np.float32]]:
        import numpy as np

        from edgekd.data.normalise import normalised

        facts = self.inputs[name].json(FACTS)
        positions = np.resize(self.positions, facts["fixed_batch"]) if facts["fixed_batch"] else self.positions
        return {facts["input"]: normalised(self.dataset.samples(positions), facts)}


def graph_outputs(graph: Artifact, dataset: Samples, positions: NDArray[np.int64], ctx: Context) -> NDArray[np.float32]:
    """Outputs of a graph on this machine's onnxruntime."""
    return outputs_of(graph.path / GRAPH, graph.json(FACTS), dataset, positions, ctx)


def outputs_of(file: Path, facts: Mapping[str, Any], dataset: Samples, positions: NDArray[np.int64], ctx: Context) -> NDArray[np.float32]:
    """Outputs of an ONNX file on this machine's onnxruntime; `facts` say what it takes."""
    from edgekd.profile.device import load_device
    from edgekd.stages.evaluate import run_engine

    session = registry.load("backend", "onnxruntime")().open(file, threads=ctx.threads, device=load_device("host"))
    return run_engine(session, facts, dataset, positions, ctx, "parity")


def torch_outputs(model: Artifact, dataset: Samples, positions: NDArray[np.int64], *, rounded: bool = False) -> NDArray[np.float32]:
    """Outputs in torch; `rounded` as the model was trained by a quantizer."""
    import torch

    from edgekd.models.build import load_model
    from edgekd.quantize._attach import round_inputs
    from edgekd.quantize._learned import load_grid
    from edgekd.train.evaluate import logits_of
    from edgekd.train.views import View

    module, spec = load_model(model)
    if rounded:
        round_inputs(module, {n.removesuffix("/input"): v for n, v in load_grid(model.path / GRID).items() if n.endswith("/input")})
    if not spec.image_size:
        with torch.inference_mode():
            said: NDArray[np.float32] = module(torch.from_numpy(dataset.samples(positions))).numpy()
        return said
    return logits_of(module, View(spec), dataset, positions)  # type: ignore[arg-type]  # these are images
