"""Layouts of graphs, one a file: each names its files, which are hashed, and reads them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edgekd import registry
from edgekd.artifact import digest_of
from edgekd.data.nodes_config import GraphConfig, NodesConfig
from edgekd.safeio.files import sha256_file

if TYPE_CHECKING:
    from edgekd.data.nodes import Raw


class GraphFormat(Protocol):
    """One file of this folder, registered with `@register("graph")`."""

    def files(self, cfg: GraphConfig) -> dict[str, Path]: ...
    def read(self, cfg: GraphConfig) -> Raw: ...


def graph_format(name: str) -> GraphFormat:
    made: GraphFormat = registry.load("graph", name)()
    return made


def fingerprint(cfg: GraphConfig) -> str:
    """SHA-256 over the contents of the graph's files; of a built-in one, over its name. Imports neither torch nor numpy."""
    named = {name: sha256_file(path) for name, path in graph_format(cfg.format).files(cfg).items()}
    masks = cfg.split.file if isinstance(cfg, NodesConfig) else None
    given = {"split": sha256_file(masks)} if masks is not None and masks.is_file() else {}
    return digest_of({"format": cfg.format} | named | given)
