"""serve: a graph model and the engine that replaces it -> how long each takes for one node or pair, and for all nodes, measured together: the price of looking at neighbours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.artifact import Artifact, Kind
from edgekd.config import Config as Base
from edgekd.registry import register
from edgekd.stages._stage import Settings
from edgekd.stages.compile import open_engine
from edgekd.stages.profile import TRACE

if TYPE_CHECKING:
    from edgekd.context import Context

_NODES = 512  # of the round that is asked for again and again
_SECONDS = 2.0  # for each that is measured
_ROUNDS = 5  # of answering the whole graph


@register("stage")
class Serve:
    class Config(Base):
        """Nothing to set: one node at a time, one thread."""

    takes: Mapping[str, Kind] = {"model": Kind.MODEL, "data": Kind.DATA, "engine": Kind.ENGINE}
    gives = Kind.TRACE
    version = 2
    libraries = ("torch", "torch-geometric", "scipy", "onnxruntime-gpu", "onnxruntime")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        import numpy as np

        from edgekd.data.rng import seed_of
        from edgekd.graph._serve import Asked, EveryRow, OfPairs, Student, WholeGraph, seconds_a_row, served
        from edgekd.models.build import load_model
        from edgekd.profile.measure import PROTOCOL, measure, ratio
        from edgekd.stages._common import one_thread, open_links, open_nodes

        model, spec = load_model(inputs["model"])
        links = open_links(inputs["data"]) if spec.pairs else None
        nodes = links.nodes if links is not None else open_nodes(inputs["data"])
        whom = links or nodes
        asked = np.random.default_rng(seed_of(0, "serve")).integers(0, len(whom), _NODES)
        session, facts = open_engine(inputs["engine"], threads=1)
        ways = served(model.get_submodule("encoder") if links is not None else model, nodes)
        if links is not None:
            ways = {name: OfPairs(way, model, links) for name, way in ways.items()}
        ways |= {"student": Student(session, facts, whom)}
        with one_thread():
            samples = measure({n: Asked(w, asked) for n, w in ways.items()}, {n: {} for n in ways}, budget_s=_SECONDS * len(ways))
            whole: dict[str, WholeGraph | EveryRow] = {}
            if links is None:
                whole = {"teacher": WholeGraph(model, nodes), "student": EveryRow(session, facts, nodes)}
            seconds = seconds_a_row(whole, _ROUNDS)
        body = {
            "protocol": PROTOCOL,
            "latency": {n: s.summary() for n, s in samples.items()},
            "ratios": {n: ratio(samples[n], samples["student"]) for n in ways if n != "student"},
            "whole_us_per_node": {n: 1e6 * s for n, s in seconds.items()},
            "nodes": len(nodes),
            "edges": len(nodes.neighbours),
        }
        (out / TRACE).write_text(json.dumps(body, sort_keys=True), encoding="utf-8")
        return {n: row["p50"] for n, row in body["latency"].items()}  # type: ignore[attr-defined]
