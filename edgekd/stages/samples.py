"""samples: nothing -> data, generated images where a user gives none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.artifact import Artifact, Kind
from edgekd.data.config import SamplesConfig
from edgekd.registry import register
from edgekd.stages._stage import Settings

if TYPE_CHECKING:
    from edgekd.context import Context


@register("stage")
class Samples:
    Config = SamplesConfig
    takes: Mapping[str, Kind] = {}
    gives = Kind.DATA
    version = 1
    libraries = ("pillow", "numpy")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        from edgekd.data.generated import build  # numpy and Pillow

        return build(settings.typed(SamplesConfig), ctx.seed, out)
