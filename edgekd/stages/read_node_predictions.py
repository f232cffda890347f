"""read_node_predictions: a file of what a teacher says of each node -> answers, calibrated on val, with its logits of val and test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from edgekd.artifact import Artifact, Kind
from edgekd.config import Config as Base
from edgekd.config import no_key
from edgekd.registry import register
from edgekd.stages._stage import Settings

if TYPE_CHECKING:
    from edgekd.context import Context


@register("stage")
class ReadNodePredictions:
    class Config(Base):
        # The content's hash is in the key instead, so the file may move without a rebuild.
        predictions: Path = no_key(..., "the file")
        outputs: Literal["auto", "logits", "probabilities"] = Field("auto", description="what its numbers are; auto: as it or they say")
        calibrated: bool = Field(True, description="divided by the temperature that fits val; a teacher that stays flat is refused")
        classes: tuple[str, ...] = Field((), description="names of its columns, in order; none: those in the file, or the data's")

    takes: Mapping[str, Kind] = {"data": Kind.DATA}
    gives = Kind.ANSWERS
    version = 1
    libraries = ("torch", "numpy")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        from edgekd.stages._common import open_nodes, unchanged
        from edgekd.stages.answer_nodes import write_answers
        from edgekd.stages.read_predictions import logits_of_file

        config, nodes = settings.typed(self.Config), open_nodes(inputs["data"])
        unchanged(config.predictions, settings)
        logits, kind = logits_of_file(config, nodes, "nodes")
        return {"arch": config.predictions.name, "gives": kind} | write_answers(logits, logits, nodes, config.calibrated, out)
