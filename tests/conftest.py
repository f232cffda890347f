"""A store of their own for all tests, and one finished quickstart for those that read it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import QUICKSTART, TINY, Finished, artifacts, run_here, short_measurements, write_images

if "PYTEST_XDIST_WORKER" in os.environ:  # before anything imports torch: workers that share two cores would fight over them
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or fills the user's own store; tests that need an empty one take `home`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEKD_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("COLUMNS", "200")
        yield


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store."""
    path = tmp_path / "home"
    monkeypatch.setenv("EDGEKD_HOME", str(path))
    return path


@pytest.fixture
def quick() -> Iterator[None]:
    with short_measurements():
        yield


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """`edgekd compress recipes/quickstart.yaml --json`, tiny; its store stays for runs that share the cache."""
    home, folder = tmp_path_factory.mktemp("quickstart-home"), tmp_path_factory.mktemp("quickstart") / "run"
    args = (QUICKSTART, *TINY, "--no-gate")
    with pytest.MonkeyPatch.context() as patch, short_measurements():
        patch.setenv("EDGEKD_HOME", str(home))
        result = run_here("compress", *args, "--out", folder, "--json")
    assert result.code in (0, 4), result.err
    return Finished(home, folder, args, result, result.json(), artifacts(home))


@pytest.fixture
def quickstart_home(quickstart: Finished, monkeypatch: pytest.MonkeyPatch) -> Finished:
    """The finished quickstart with its store in use."""
    monkeypatch.setenv("EDGEKD_HOME", str(quickstart.home))
    return quickstart


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data")
