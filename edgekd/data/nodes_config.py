"""A graph of a recipe: where it lies, how its edges are read, and which of its nodes, or of its links, are trained on, decided on and tested."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from edgekd.config import Config, no_key

Fraction = Annotated[float, Field(gt=0, lt=1)]


class NodeSplitConfig(Config):
    """Which nodes are train, val and test; those of none of them are seen without their labels."""

    by: Literal["auto", "given", "class", "time"] = Field(
        "auto",
        description="given: as the files say; class: so many of each class by seed; time: the earliest train; auto: given where it is",
    )
    file: Path | None = no_key(None, "masks or positions named train, val and test, .npz; instead of what the data say")
    train: int = Field(20, ge=1, description="by class: training nodes of each class")
    val: int = Field(30, ge=1, description="by class: nodes of each class for decisions; all others are test")
    val_part: Fraction = Field(0.15, description="by time: the part of the labelled nodes after train")
    test_part: Fraction = Field(0.15, description="by time: the last part")
    seed: int | None = Field(None, ge=0, lt=2**31, description="by class: default: the recipe's seed")
    largest_component: bool = Field(False, description="keep the largest connected part of the graph only")

    @model_validator(mode="after")
    def _leaves_something(self) -> NodeSplitConfig:
        if self.val_part + self.test_part > 0.9:
            raise ValueError("val_part and test_part together take more than 0.9 of the nodes; at least 0.1 must be left to train on")
        return self


class PositionsConfig(Config):
    """Where a node lies in the graph, as further features for a model of rows."""

    size: int = Field(64, ge=1, le=4096, description="numbers a node gets")
    walks: int = Field(5, ge=1, le=1000, description="random walks from each node")
    length: int = Field(50, ge=2, le=10_000, description="nodes of a walk")
    window: int = Field(5, ge=1, le=100, description="how far apart in a walk two nodes count as near")
    epochs: int = Field(1, ge=1, le=100, description="how often the walks are learned from")


class GraphConfig(Config):
    """Where a graph lies and how it is read."""

    labelled: ClassVar[bool] = True  # whether nodes have labels

    format: str = Field(description="how the graph lies on disk; a file name in data/graphs")
    # The content's hash is in the keys instead, so the files may move without a rebuild.
    root: Path | None = no_key(None, "folder of the graph, or its file")
    name: str | None = Field(None, pattern=r"^[\w.-]{1,64}$", description="which graph, where the folder may hold several: cora, citeseer")
    edges: Literal["undirected", "directed"] = Field(
        "undirected", description="undirected: an edge counts both ways, whichever of the two the files list"
    )
    features: Literal["auto", "rows", "raw"] = Field(
        "auto", description="rows: divided by their sum; raw: as they are; auto: what the format's tables were made with"
    )


class NodesConfig(GraphConfig):
    """A graph whose nodes are samples."""

    setting: Literal["transductive", "inductive"] = Field(
        "transductive", description="inductive: test nodes and their edges are unseen while training"
    )
    hidden: Annotated[float, Field(gt=0, le=1, description="inductive: the part of the test nodes that is unseen; the rest is seen")] = 1.0
    split: NodeSplitConfig = Field(default_factory=NodeSplitConfig, description="which nodes are train, val and test")
    positions: PositionsConfig | None = Field(
        None,
        description="DeepWalk's numbers beside the features that a model of rows sees; whoever asks it then must know a node's neighbours",
    )

    @model_validator(mode="after")
    def _hides_where_asked(self) -> NodesConfig:
        if self.setting == "transductive" and "hidden" in self.model_fields_set:
            raise ValueError("nothing is hidden in the transductive setting; leave it out, or set setting: inductive")
        return self


class LinkSplitConfig(Config):
    """Which links are held back. As many pairs that are none stand beside those of each part."""

    val: Fraction = Field(0.05, description="the part of the links for decisions")
    test: Fraction = Field(0.1, description="the part of the links for the final result")
    seed: int | None = Field(None, ge=0, lt=2**31, description="default: the recipe's seed")

    @model_validator(mode="after")
    def _leaves_something(self) -> LinkSplitConfig:
        if self.val + self.test > 0.9:
            raise ValueError("val and test together take more than 0.9 of the links; at least 0.1 must be left to train on")
        return self


class LinksConfig(GraphConfig):
    """A graph whose pairs of nodes are samples: linked or not. Labels of nodes are not read."""

    labelled: ClassVar[bool] = False

    edges: Literal["undirected"] = Field("undirected", description="a link counts both ways")
    split: LinkSplitConfig = Field(default_factory=LinkSplitConfig, description="which links are train, val and test")
