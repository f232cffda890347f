"""compile: graph -> engine for one device, by its backend."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgekd import registry
from edgekd.artifact import Artifact, Kind
from edgekd.config import Config as Base
from edgekd.errors import BackendError
from edgekd.registry import register
from edgekd.stages._stage import Settings
from edgekd.stages.export import FACTS, GRAPH

if TYPE_CHECKING:
    from edgekd.backends import Session
    from edgekd.context import Context

ENGINE = "engine.json"


class RunConfig(Base):
    """Where and how an engine runs."""

    device: str = Field("host", description="device profile")
    backend: str = Field("onnxruntime", description="runtime")
    threads: int = Field(1, ge=1, description="threads of the runtime")
    batch: int = Field(1, ge=1, description="images per inference")
    options: dict[str, Any] = Field(default_factory=dict, description="settings of the backend's builder")


@register("stage")
class Compile:
    class Config(RunConfig):
        optional: bool = Field(False, description="True: a graph that the runtime refuses is recorded with the reason, and the run goes on")

    takes: Mapping[str, Kind] = {"graph": Kind.GRAPH}
    gives = Kind.ENGINE
    version = 3
    libraries = ("onnx",)

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        from edgekd.backends import watched
        from edgekd.profile.device import load_device

        config = settings.typed(self.Config)
        backend, graph = registry.load("backend", config.backend)(), inputs["graph"].path / GRAPH
        try:
            with watched(backend, ctx.console, config.backend):
                meta: dict[str, Any] = backend.convert(graph, load_device(config.device), out, config.options, batch=config.batch)
        except BackendError as problem:
            if not config.optional:
                raise
            ctx.console.warn(f"{config.backend} refuses the graph: {problem.what}")
            (out / ENGINE).write_text(json.dumps({"backend": config.backend, "refused": problem.what}), encoding="utf-8")
            return {"refused": problem.what}
        if meta.get("note"):
            ctx.console.say(f"  {meta['note']}")
        facts = inputs["graph"].json(FACTS) | {
            "device": config.device,
            "backend": config.backend,
            "threads": config.threads,
            "model_file": meta["model_file"],
            "max_batch": judged_batch(meta),
        }
        (out / ENGINE).write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")
        return meta | {"size_bytes": (out / meta["model_file"]).stat().st_size}


def judged_batch(meta: Mapping[str, Any]) -> int | None:
    """How many images an engine is given at once where its outputs are judged: what it is used for, or takes at most; None for any number."""
    found: int | None = meta.get("judged_batch") or meta.get("max_batch")
    return found


def open_engine(engine: Artifact, *, threads: int | None = None) -> tuple[Session, dict[str, Any]]:
    """A session of an engine on this machine, and the engine's facts; raises BackendError for one that was refused."""
    from edgekd.profile.device import load_device

    facts: dict[str, Any] = engine.json(ENGINE)
    if "refused" in facts:
        raise BackendError(facts["refused"], where=facts["backend"])
    backend = registry.load("backend", facts["backend"])()
    session: Session = backend.open(
        engine.path / facts["model_file"],
        threads=threads or facts["threads"],
        device=load_device(facts["device"]),
        options=engine.meta.get("options"),
    )
    return session, facts


def engine_file(engine: Artifact) -> Path:
    """The file that the runtime opens."""
    return engine.path / str(engine.json(ENGINE)["model_file"])


def engine_bytes(engine: Artifact) -> int:
    """Size of the engine's file in bytes."""
    return engine_file(engine).stat().st_size
