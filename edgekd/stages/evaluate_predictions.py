"""evaluate_predictions: what a file of predictions says of one split -> predictions and metrics, as of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.artifact import Artifact, Kind
from edgekd.registry import register
from edgekd.stages._stage import Settings
from edgekd.stages.evaluate import Evaluate, judge

if TYPE_CHECKING:
    from edgekd.context import Context


@register("stage")
class EvaluatePredictions:
    Config = Evaluate.Config
    takes: Mapping[str, Kind] = {"answers": Kind.ANSWERS, "data": Kind.DATA}
    gives = Kind.METRICS
    version = 1
    libraries = ("numpy",)

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        import numpy as np

        from edgekd.stages._common import open_samples

        config = settings.typed(self.Config)
        outputs = np.load(inputs["answers"].path / f"{config.split}.npy")
        return judge(outputs, settings, config, open_samples(inputs["data"], ctx), None, out)
