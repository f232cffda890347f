"""What the tests of whole commands share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for the tests of a file, which is empty at its start."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def stored(own_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's store is in use."""
    monkeypatch.setenv("EDGEKD_HOME", str(own_store))
