"""What a stage is: a pure function artifacts -> artifact, with a closed config and the kinds that wire it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from edgekd.artifact import Artifact, Kind
from edgekd.config import Config

if TYPE_CHECKING:
    from edgekd.context import Context

DECISION = "decision.json"
C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Settings:
    """One step's resolved settings: the stage's own config, its method's, and facts found while planning."""

    name: str
    config: Config
    method: str | None = None
    method_config: Config | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # dataset fingerprint, weights hash, device identity: part of the key

    def typed(self, cls: type[C]) -> C:
        """The stage's config as its own class; a TypeError here is a fault of the planner."""
        if not isinstance(self.config, cls):
            raise TypeError(f"{self.name} was planned with {type(self.config).__name__}, not {cls.__name__}")
        return self.config


class Stage(Protocol):
    """One file of this folder, registered with `@register("stage")`. Returning publishes, raising discards."""

    Config: ClassVar[type[Config]]
    takes: ClassVar[Mapping[str, Kind]]  # input name -> kind; a name that ends with '?' may be absent, '*' stands for any more
    gives: ClassVar[Kind]
    version: ClassVar[int]  # raised when shared code changes what the stage makes
    libraries: ClassVar[tuple[str, ...]]  # whose versions are part of the key

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        """Writes the artifact's files into `out` and returns its meta."""


class UserStage(Stage, Protocol):
    """A stage that a recipe lists by name."""

    method_kind: ClassVar[str | None]  # registry kind of its method, or None
    method_field: ClassVar[str]  # the recipe field that names the method
    compresses: ClassVar[bool]  # True: opens a gated segment


def write_decision(out: Path, decision: Mapping[str, Any]) -> None:
    """Records something chosen from a measurement, so that it can be replayed."""
    (out / DECISION).write_text(json.dumps(decision, sort_keys=True, indent=1, allow_nan=False), encoding="utf-8")


def read_decision(artifact: Artifact) -> dict[str, Any]:
    found: dict[str, Any] = artifact.json(DECISION)
    return found
