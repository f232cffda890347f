"""Artifact, Kind, Manifest: what stages take and give, and what the store keeps.

An artifact is an immutable folder. Its `digest` covers the names and bytes of its files and nothing else, so two builds with the same
result are the same input to what follows; `meta` (seconds, host, notes) is beside it and never part of a key.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


class Kind(StrEnum):
    """What an artifact is; the planner wires stages by it."""

    DATA = "data"  # decoded or indexed dataset with its splits
    ANSWERS = "answers"  # what a teacher says to every view of every training image
    MODEL = "model"  # spec.json + model.safetensors
    GRAPH = "graph"  # model.onnx
    ENGINE = "engine"  # what a backend runs
    TRACE = "trace"  # latencies and sizes of engines, measured in one run
    METRICS = "metrics"  # predictions and metrics of an engine on one split
    DECISION = "decision"  # something chosen from a measurement; can be replayed
    BUNDLE = "bundle"  # the deployable folder


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: size in bytes and SHA-256 in hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` of a store entry says."""

    key: str
    kind: Kind
    files: dict[str, FileEntry]
    meta: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)  # the ingredients of the key, for `store why`

    @property
    def digest(self) -> str:
        """SHA-256 over names and hashes of the files."""
        return digest_of({name: entry.sha256 for name, entry in self.files.items()})

    def to_json(self) -> str:
        files = {name: {"size": e.size, "sha256": e.sha256} for name, e in sorted(self.files.items())}
        body = {"version": 1, "key": self.key, "kind": str(self.kind), "files": files, "meta": self.meta, "recipe": self.recipe}
        return json.dumps(body, sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises ValueError, KeyError or TypeError on anything malformed; the store treats those as corruption."""
        raw = json.loads(text)
        if raw["version"] != 1:
            raise ValueError(f"manifest version {raw['version']}")
        files = {str(n): FileEntry(int(e["size"]), str(e["sha256"])) for n, e in raw["files"].items()}
        return cls(str(raw["key"]), Kind(raw["kind"]), files, dict(raw["meta"]), dict(raw["recipe"]))


@dataclass(frozen=True)
class Artifact:
    """A verified entry of the store."""

    key: str
    kind: Kind
    path: Path
    digest: str
    meta: dict[str, Any] = field(default_factory=dict)
    cached: bool = True  # False: built by this process

    def json(self, name: str) -> Any:
        """The parsed JSON file `name` of this artifact."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))


def canonical(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: object) -> str:
    """SHA-256 in hex of the canonical JSON of `value`."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()
