"""nodes: a graph's files -> one verified dataset artifact: features, edges, splits, and what was assumed about them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.artifact import Artifact, Kind
from edgekd.data.nodes_config import NodesConfig
from edgekd.errors import DataRefused
from edgekd.registry import register
from edgekd.stages._stage import Settings

if TYPE_CHECKING:
    from edgekd.context import Context


@register("stage")
class ReadNodes:
    Config = NodesConfig
    takes: Mapping[str, Kind] = {}
    gives = Kind.DATA
    version = 1
    libraries = ("numpy", "scipy", "gensim")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        from edgekd.data.graphs import fingerprint
        from edgekd.data.nodes import build  # numpy

        config = settings.typed(NodesConfig)
        if settings.facts.get("index", found := fingerprint(config)) != found:  # the key speaks of what was there when the run was planned
            raise DataRefused("the graph was changed while edgekd was running", where=str(config.root), hint="run the same command again")
        meta: dict[str, Any] = build(config, ctx.seed, out)
        for text in meta["assumed"]:
            ctx.console.say(f"  {text}")
        return meta | {"fingerprint": found}
