"""What several stages need: the dataset, the task and a device to train on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from edgekd import registry

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from edgekd.artifact import Artifact
    from edgekd.context import Context
    from edgekd.data.dataset import Dataset
    from edgekd.data.links import Links
    from edgekd.data.nodes import Nodes
    from edgekd.stages._stage import Settings
    from edgekd.tasks._task import Task


class Samples(Protocol):
    """What stages that run a model need of a dataset, whatever its samples are."""

    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def ids(self) -> tuple[str, ...]: ...
    @property
    def labels(self) -> NDArray[np.int64]: ...
    @property
    def labelled(self) -> bool: ...
    def __len__(self) -> int: ...
    def split(self, name: str) -> NDArray[np.int64]: ...
    def samples(self, positions: NDArray[np.int64]) -> NDArray[Any]: ...


def open_dataset(data: Artifact, ctx: Context) -> Dataset:
    """Images."""
    from edgekd.data.dataset import Dataset  # numpy

    return Dataset.open(data.path, ctx.data_root, workers=ctx.data_workers)


def open_nodes(data: Artifact) -> Nodes:
    """A graph."""
    from edgekd.data.nodes import Nodes

    return Nodes.open(data.path)


def open_links(data: Artifact) -> Links:
    """Pairs of nodes."""
    from edgekd.data.links import Links

    return Links.open(data.path)


def open_samples(data: Artifact, ctx: Context) -> Samples:
    """Any of them."""
    from edgekd.data.links import PAIRS
    from edgekd.data.nodes import ABOUT

    if (data.path / PAIRS).is_file():
        return open_links(data)
    return open_nodes(data) if (data.path / ABOUT).is_file() else open_dataset(data, ctx)


def drawn(dataset: Samples, split: str, count: int) -> NDArray[np.int64]:
    """`count` positions of a split in a fixed random order: a folder lists its images class by class, so the first ones are all alike."""
    from edgekd.data.loader import epoch_order

    return epoch_order(0, 0, dataset.split(split))[:count]


def unchanged(path: Path, settings: Settings) -> None:
    """Raises DataRefused for a file that is not the one whose hash is in the step's key."""
    from edgekd.errors import DataRefused
    from edgekd.safeio.files import sha256_file

    if settings.facts.get("file", "") not in ("", sha256_file(path)):
        raise DataRefused("the file was changed while edgekd was running", where=str(path), hint="run the same command again")


def task_of(settings: Settings) -> Task:
    task: Task = registry.load("task", str(settings.facts.get("task", "classification")))()
    return task.without_labels() if settings.facts.get("imitates") else task  # type: ignore[attr-defined]


def measured_by(task: Task) -> str:
    """What a task's metric counts, in words."""
    return str(getattr(task, "measures", "accuracy"))


def samples_of(task: Task) -> str:
    """What a task calls its samples."""
    return str(getattr(task, "samples", "images"))


def template_of(task: Task) -> str:
    """The script that a bundle of this task gets as its predict.py."""
    return str(getattr(task, "template", "predict.py"))


def training_device() -> str:
    """cuda where torch sees a GPU, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def method_of(settings: Settings, kind: str) -> Any:
    """The method object that runs, made from its config."""
    return registry.load(kind, str(settings.method))(settings.method_config)
