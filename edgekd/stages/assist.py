"""assist: the student taught by the teacher and the one taught by its assistant, on val -> the decision which of them goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgekd.artifact import Artifact, Kind
from edgekd.config import Config as Base
from edgekd.gate import helped, overruled
from edgekd.registry import register
from edgekd.stages._stage import Settings, write_decision
from edgekd.stages.evaluate import drop_of

if TYPE_CHECKING:
    from edgekd.context import Context


@register("stage")
class Assist:
    class Config(Base):
        enabled: bool = Field(True, description="False keeps the assisted student whatever val says, and says so")

    takes: Mapping[str, Kind] = {"before_metrics": Kind.METRICS, "after_metrics": Kind.METRICS}
    gives = Kind.DECISION
    version = 1
    libraries = ("numpy",)

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        from edgekd.stages._common import measured_by, task_of

        task = task_of(settings)
        drop, interval = drop_of(task, inputs["before_metrics"], inputs["after_metrics"])
        verdict = helped(drop, interval, measured_by(task))
        if not settings.typed(self.Config).enabled:
            verdict = overruled(verdict)
        body = {"verdict": verdict.verdict, "reason": verdict.reason, "chosen": verdict.chosen, "drop": drop, "interval": list(interval)}
        write_decision(out, body)
        return {"verdict": verdict.verdict, "reason": verdict.reason}
