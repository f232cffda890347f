"""data: any format -> one verified dataset artifact (index, splits, decoded pixels where they fit)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.artifact import Artifact, Kind
from edgekd.data.config import DataConfig
from edgekd.errors import DataRefused
from edgekd.registry import register
from edgekd.stages._stage import Settings

if TYPE_CHECKING:
    from edgekd.context import Context


@register("stage")
class Data:
    Config = DataConfig
    takes: Mapping[str, Kind] = {}
    gives = Kind.DATA
    version = 1
    libraries = ("pillow",)

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        from edgekd.data.dataset import build  # numpy and Pillow

        config = settings.typed(DataConfig)
        meta: dict[str, Any] = build(config, ctx.seed, out, cache_dir=ctx.store.root)
        if (
            settings.facts.get("index", meta["fingerprint"]) != meta["fingerprint"]
        ):  # the key speaks of what was there when the run was planned
            raise DataRefused("the dataset was changed while edgekd was running", where=str(config.root), hint="run the same command again")
        return meta
