"""Graphs of which only some operators are quantized: built, opened, measured against one another, and judged on val."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import registry
from edgekd.artifact import Artifact
from edgekd.errors import OnnxRefused
from edgekd.stages._stage import Settings
from edgekd.stages.compile import judged_batch
from edgekd.stages.export import FACTS, GRAPH
from edgekd.stages.quantize import calibration_batches

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekd.context import Context

_BUDGET_SECONDS = 1.0  # of measuring a pair
_SAMPLES = 256  # val images that accuracy is judged on


class PartialGraphs:
    """What `operators` are quantized is given by name; everything else of a graph stays as it is."""

    unknown = ""  # why the operators cannot be listed

    def __init__(self, settings: Settings, config: Any, inputs: Mapping[str, Artifact], folder: Path, ctx: Context):
        from edgekd.profile.device import load_device
        from edgekd.stages._common import drawn, open_samples, task_of

        self.config, self.folder, self.ctx = config, folder, ctx
        self.device, self.backend = load_device(config.device), registry.load("backend", config.backend)()
        self.facts, self.dataset, self.task = inputs["graph"].json(FACTS), open_samples(inputs["data"], ctx), task_of(settings)
        self.positions = drawn(self.dataset, "val", _SAMPLES)
        self.flavour = str(settings.facts["flavour"])
        self.method = registry.load("quantize", str(settings.method))
        self.method_config: Any = settings.method_config
        self.graph = folder / "base.onnx"
        self.method.prepare(inputs["graph"].path / GRAPH, self.graph)
        try:
            self.operators: list[str] = [n for n, _ in self.method.candidates(self.graph)]  # densest in operations first
        except OnnxRefused as problem:  # a shape that stays unknown: nothing can be ordered or fed
            self.operators, self.unknown = [], problem.what
        self.fp32 = self.open(inputs["graph"].path / GRAPH)  # as it would ship: preparing alone can make it slower on other runtimes

    def in_order(self) -> list[str]:
        """The operators in the order of the graph."""
        found: list[str] = self.method.in_order(self.graph, self.operators)
        return found

    def built(self, chosen: set[str]) -> Path:
        """The graph with exactly these operators quantized."""
        name = hashlib.sha256("\n".join(sorted(chosen)).encode()).hexdigest()[:16]
        path = self.folder / f"{name}.onnx"
        if not path.is_file():
            keep = tuple(n for n in self.operators if n not in chosen)
            quantizer = self.method(self.method_config.model_copy(update={"keep_nodes": (*self.method_config.keep_nodes, *keep)}))
            samples = calibration_batches(self.dataset, self.facts, self.method_config.samples, self.ctx.seed)
            quantizer.quantize(self.graph, path, samples, self.flavour, ranges=self.folder / "ranges.json")
        return path

    def open(self, graph: Path) -> Any:
        """A session of the graph on the target's runtime; raises BackendError where that one refuses it."""
        engine = self.folder / f"{graph.stem}.engine"
        engine.mkdir(exist_ok=True)
        meta = self.backend.convert(graph, self.device, engine, self.config.options, batch=self.config.batch)
        session = self.backend.open(
            engine / meta["model_file"], threads=self.config.threads, device=self.device, options=meta.get("options")
        )
        self._judged_batch = judged_batch(meta)
        shutil.rmtree(engine)  # it is loaded; two dozen copies of a large model would fill a disk
        return session

    def ratio(self, new: Any, old: Any) -> dict[str, Any]:
        """Ratio of latencies of two sessions with its interval, interleaved; below 1 where `new` is faster."""
        from edgekd.profile import measure as m

        sessions = {"new": new, "old": old}
        samples = m.measure(sessions, dict.fromkeys(sessions, self._feeds()), budget_s=_BUDGET_SECONDS)
        return m.ratio(samples["new"], samples["old"])

    def outputs(self, session: Any) -> NDArray[np.float32]:
        """Of a few hundred val images."""
        from edgekd.stages.evaluate import run_engine

        return run_engine(session, self.facts | {"max_batch": self._judged_batch}, self.dataset, self.positions, self.ctx, "val")

    def scores(self, outputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """The metric of each of those images."""
        return self.task.scores(outputs, self.dataset.labels[self.positions])

    def _feeds(self) -> dict[str, Any]:
        import numpy as np

        side, batch = self.facts["image_size"], self.facts["fixed_batch"] or self.config.batch
        return {self.facts["input"]: np.random.default_rng(0).standard_normal((batch, 3, side, side), dtype=np.float32)}
