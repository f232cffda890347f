"""How a model is run while something learns: precision, memory layout, compiled or not. Settings that leave it open, and what they came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from edgekd.config import Config


@dataclass(frozen=True)
class Speed:
    """Chosen by measuring (train/tune.py), recorded, replayed."""

    autocast: bool = False
    channels_last: bool = False
    compiled: bool = False
    runtime: str = ""  # of a teacher: `onnxruntime int8` and the like, instead of torch

    @classmethod
    def of(cls, decision: Mapping[str, Any]) -> Speed:
        """What a tuning decided for one of the models."""
        autocast, channels_last, compiled = (bool(decision.get(n)) for n in ("autocast", "channels_last", "compiled"))
        return cls(autocast, channels_last, compiled, str(decision.get("runtime") or ""))

    def __str__(self) -> str:
        if self.runtime:
            return self.runtime
        words = ["bf16" if self.autocast else "fp32", "channels_last" if self.channels_last else "", "compiled" if self.compiled else ""]
        return " ".join(w for w in words if w)


class SpeedConfig(Config):
    """What the user settles, and what is left to be measured."""

    autocast: Literal["auto", "off", "bf16"] = Field("auto", description="bf16 autocast; auto measures a few steps and keeps the faster")
    channels_last: Literal["auto", "off", "on"] = Field("auto", description="memory layout of images; auto measures")
    compile: Literal["auto", "off", "on"] = Field(
        "auto", description="torch.compile for models that learn and teach; auto measures, where the training is long enough to repay it"
    )

    runtime: Literal["auto", "off"] = Field(
        "auto",
        description="teachers of logits by an installed runtime, in fp32 or int8; auto measures as for compile, and checks their answers",
    )

    @property
    def open(self) -> bool:
        """Whether something is left to be measured."""
        return "auto" in (self.autocast, self.channels_last, self.compile)

    @property
    def speed(self) -> Speed:
        """What the settings say; what they leave open is off."""
        return Speed(self.autocast == "bf16", self.channels_last == "on", self.compile == "on")
