"""What a backend is: a runtime that turns an ONNX graph into an engine and runs it. One file per backend, listed by its name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgekd.errors import BackendError

if TYPE_CHECKING:
    import numpy as np

    from edgekd.config import Config
    from edgekd.console import Console
    from edgekd.profile.schema import DeviceProfile

    Array = np.ndarray[Any, Any]
    Feeds = dict[str, Array]


class Session(Protocol):
    """An opened engine.

    One method may be absent: `ready(feeds)`, of a runtime that compiles at the first run for inputs of a shape, does that now.
    """

    @property
    def input_names(self) -> list[str]: ...

    @property
    def output_names(self) -> list[str]: ...

    def run(self, feeds: Feeds) -> list[Array]:
        """All outputs in order; raises BackendError for inputs that do not fit."""

    def close(self) -> None:
        """Frees the engine; a closed session cannot run."""


@dataclass(frozen=True)
class Layer:
    """Mean time of one node per run, in microseconds, and its share of all nodes; precision and format where the runtime says them."""

    name: str
    op_type: str
    total_us: float
    share: float
    calls: int
    precision: str = ""
    format: str = ""


class Backend(Protocol):
    """A runtime. Its class is importable without the runtime; every failure is a BackendError.

    Two methods may be absent: `layers(engine, feeds, threads, device, options) -> list[Layer]`, and `watch(told)` of one whose builds take long.
    """

    name: str
    suffix: str  # of an engine that is another file than its graph; .onnx where there is none
    builds: bool  # True: an engine is another thing than its graph, and takes a builder that may be missing here

    @property
    def Options(self) -> type[Config]:  # noqa: N802, the nested class of a backend
        """What a target may set."""

    def available(self) -> str | None:
        """None if usable here, else the reason and what to install."""

    def builds_for(self, device: DeviceProfile) -> str | None:
        """None if this machine can convert for that device, else why not and what to do."""

    def runs_on(self, device: DeviceProfile) -> bool:
        """True if this machine can execute for that device."""

    def version(self) -> str:
        """Of the installed runtime, read without importing it; `none` where it is missing."""

    def prepare(self) -> None:
        """Imports the runtime, so that what follows can be timed without that."""

    def convert(self, graph: Path, device: DeviceProfile, out: Path, options: Mapping[str, Any], *, batch: int = 1) -> dict[str, Any]:
        """Writes the engine, best for `batch` images, into the folder `out`; returns meta with at least `{"model_file": name}`.

        `usage`, if it is there, is Markdown: how the engine is run without edgekd. It ends in the bundle's PROVENANCE.md.
        """

    def open(self, engine: Path, *, threads: int, device: DeviceProfile, options: Mapping[str, Any] | None = None) -> Session:
        """An engine file ready to run, on the execution provider that the device asks for and no other. `options`: those it was built with."""


def version_of(*wheels: str) -> str:
    """The installed version of the first of these wheels, or `none`; nothing of it is imported."""
    for wheel in wheels:
        try:
            return metadata.version(wheel)
        except metadata.PackageNotFoundError:
            continue
    return "none"


def asked(backend: Backend, options: Mapping[str, Any], graph: Path) -> Any:
    """The backend's Options; raises BackendError for one that it does not have."""
    if unknown := set(options) - set(backend.Options.model_fields):
        known = ", ".join(backend.Options.model_fields)
        raise BackendError(
            f"{backend.name} has no option '{min(unknown)}'", where=graph.name, expected=f"one of {known}" if known else "no options"
        )
    return backend.Options(**options)


@contextmanager
def watched(backend: Backend, console: Console, name: str) -> Iterator[None]:
    """Shows how far a build inside is, where the backend tells."""
    if (watch := getattr(backend, "watch", None)) is None:
        yield
        return
    with console.bar(name, 1.0) as bar:
        watch(lambda done, phase: bar.update(done, phase=phase))
        try:
            yield
        finally:
            watch(None)
