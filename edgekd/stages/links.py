"""links: a graph's files -> one verified dataset artifact: pairs of nodes, linked or not, and the graph without the links of val and test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.artifact import Artifact, Kind
from edgekd.data.nodes_config import LinksConfig
from edgekd.errors import DataRefused
from edgekd.registry import register
from edgekd.stages._stage import Settings

if TYPE_CHECKING:
    from edgekd.context import Context


@register("stage")
class ReadLinks:
    Config = LinksConfig
    takes: Mapping[str, Kind] = {}
    gives = Kind.DATA
    version = 1
    libraries = ("numpy",)

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        from edgekd.data.graphs import fingerprint
        from edgekd.data.links import build  # numpy

        config = settings.typed(LinksConfig)
        if settings.facts.get("index", found := fingerprint(config)) != found:  # the key speaks of what was there when the run was planned
            raise DataRefused("the graph was changed while edgekd was running", where=str(config.root), hint="run the same command again")
        meta: dict[str, Any] = build(config, ctx.seed, out)
        for text in meta["assumed"]:
            ctx.console.say(f"  {text}")
        return meta | {"fingerprint": found}
