"""execute: what a step made is published only if nothing stopped it, whoever swallowed the signal on the way."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edgekd import registry
from edgekd.artifact import Artifact, Kind
from edgekd.config import Config
from edgekd.console import Console
from edgekd.context import Context
from edgekd.errors import EdgekdError, Interrupted
from edgekd.plan import Step
from edgekd.run import execute
from edgekd.stages._stage import Settings
from edgekd.store import Store


class Swallows:
    """A stage inside whose library the signal arrives, and whose library carries on with something else."""

    takes: Mapping[str, Kind] = {}
    gives = Kind.DATA
    version = 1
    libraries = ()

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        (out / "file").write_text("the second attempt")
        try:
            ctx.stop.handle(signal.SIGINT, None)
        except BaseException:
            return {"attempt": 2}
        return {"attempt": 1}


class OnePlan:
    def __init__(self, step: Step):
        self.steps = [step]


def test_a_step_whose_library_swallowed_the_signal_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "load", lambda kind, name: Swallows)
    monkeypatch.setattr(registry, "source_of", lambda kind, name: b"")
    store = Store(tmp_path)
    step = Step("data", "swallows", Settings("data", Config()), {})
    with pytest.raises(Interrupted) as caught:
        execute(OnePlan(step), Context(store, Console(quiet=True)))  # type: ignore[arg-type]
    assert caught.value.exit_code == 130
    assert list(store.entries()) == []
    assert not list((tmp_path / "tmp").iterdir())


def test_a_handler_of_exceptions_does_not_catch_an_interruption() -> None:
    assert not issubclass(Interrupted, Exception)
    assert issubclass(EdgekdError, Exception)


def test_a_dataset_that_changes_between_plan_and_run_is_refused(home: Path, images: Path, tmp_path: Path) -> None:
    import shutil

    from edgekd.errors import DataRefused
    from edgekd.plan import build_plan
    from edgekd.recipe import load

    photos = Path(shutil.copytree(images, tmp_path / "photos"))
    plan = build_plan(load("quickstart", [f"data={{format: image_folder, root: {photos}, image_size: 32}}"]), cache_dir=home)
    next(photos.rglob("*.png")).unlink()
    with pytest.raises(DataRefused, match="changed while edgekd was running"):
        execute(plan, Context(Store(home), Console(quiet=True)))
