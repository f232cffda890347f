"""profile: engines -> trace. All engines of a run are measured together, interleaved, so that their figures can be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import registry
from edgekd.artifact import Artifact, Kind
from edgekd.errors import BackendError
from edgekd.registry import register
from edgekd.stages._stage import Settings
from edgekd.stages.compile import RunConfig, open_engine

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekd.context import Context

TRACE = "trace.json"
_SECONDS_PER_ENGINE = 1.5
_KEPT_SAMPLES = 400


@register("stage")
class Profile:
    Config = RunConfig
    takes: Mapping[str, Kind] = {"shipped": Kind.ENGINE, "*": Kind.ENGINE}
    gives = Kind.TRACE
    version = 2
    libraries = ("onnxruntime-gpu", "onnxruntime")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        from edgekd.profile.device import load_device
        from edgekd.profile.footprint import load_facts
        from edgekd.profile.measure import PROTOCOL, measure

        config = settings.typed(RunConfig)
        engines = {name.removeprefix("*"): engine for name, engine in inputs.items()}
        unique = {engine.digest: name for name, engine in reversed(engines.items())}  # equal engines are measured once
        opened = {name: open_engine(engines[name], threads=config.threads) for name in unique.values()}
        feeds = {name: {facts["input"]: random_input(facts, config.batch)} for name, (_, facts) in opened.items()}
        samples = measure({n: s for n, (s, _) in opened.items()}, feeds, budget_s=_SECONDS_PER_ENGINE * len(opened))
        rows = {
            name: samples[unique[e.digest]].summary() | {"samples": list(samples[unique[e.digest]].ms[:_KEPT_SAMPLES])}
            for name, e in engines.items()
        }
        shipped = engines["shipped"]
        name, facts = unique[shipped.digest], opened[unique[shipped.digest]][1]
        backend, file = registry.load("backend", facts["backend"])(), shipped.path / facts["model_file"]
        device = load_device(config.device)
        options = shipped.meta.get("options")
        footprint = load_facts(file, facts["backend"], device=device, feeds=feeds[name], threads=config.threads, options=options)
        try:
            found = backend.layers(file, feeds[name], config.threads, device, options) if hasattr(backend, "layers") else []
            layers = [asdict(layer) for layer in found]
        except BackendError as problem:  # a table for the report: what was measured counts without it
            ctx.console.warn(f"there is no time per operator: {problem}")
            layers = []
        body = {
            "protocol": PROTOCOL,
            "latency": rows,
            "footprint": footprint,
            "operators": layers,
            "threads": config.threads,
            "batch": facts.get("fixed_batch") or config.batch,
        }
        (out / TRACE).write_text(json.dumps(body, sort_keys=True), encoding="utf-8")
        return {"p50": rows["shipped"]["p50"]}


def random_input(facts: Mapping[str, Any], batch: int) -> NDArray[np.float32]:
    """A fixed random input (batch, 3, h, w), or (batch, features)."""
    import numpy as np

    shape = (facts["features"],) if "features" in facts else (3, facts["image_size"], facts["image_size"])
    return np.random.default_rng(0).standard_normal((facts.get("fixed_batch") or batch, *shape), dtype=np.float32)
