"""What an architecture for nodes is: settings, what it looks at, and how it is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pydantic import Field

from edgekd.config import Config
from edgekd.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn


class LayersConfig(Config):
    """What all of them have."""

    layers: int = Field(2, ge=1, le=16, description="how many layers; of a graph model also how many steps away it sees")
    hidden: int = Field(128, ge=1, le=65_536, description="width of all but the last")
    dropout: float = Field(0.5, ge=0, lt=1, description="between layers, never on the features")
    norm: Literal["none", "batch", "layer"] = Field("none", description="after each layer but the last")


class Architecture(Protocol):
    """One file of this folder, registered with `@register("architecture")`; a user's own by --code alike."""

    Config: ClassVar[type[LayersConfig]]
    looks_at: ClassVar[Literal["rows", "graph"]]  # rows: a node's own features; graph: its neighbours' as well

    def create(self, config: LayersConfig, features: int, classes: int) -> nn.Module:
        """The module. One that looks at rows maps (rows, features) to (rows, classes); the last layer is its attribute `classifier`.

        One that looks at a graph takes (features, edges), where edges is what its own `edges` gives, and says something of every node. How many steps away it
        looks is its attribute `hops`, or the length of its `body` and the last layer.
        """


def hops_of(model: object) -> int:
    """How many steps away a model of a graph looks. Raises UsageError for one that does not say."""
    found = getattr(model, "hops", None) or (len(model.body) + 1 if hasattr(model, "body") else None)
    if found is None:
        raise UsageError(
            f"{type(model).__name__} does not say how many steps away it looks",
            where="teacher.arch",
            expected="an attribute hops of the module",
            hint="self.hops = 2",
        )
    return int(found)


class GraphModule(Protocol):
    """What `create` gives for a graph."""

    def edges(self, indptr: NDArray[np.int64], neighbours: NDArray[np.int32]) -> Tensor:
        """Made once: what `forward` needs of the edges, given without loops."""

    def __call__(self, features: Tensor, edges: Tensor) -> Tensor: ...
