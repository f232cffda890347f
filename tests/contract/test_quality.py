"""Lint, format, types and layers hold for the whole checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
CHECKS = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy --strict": ["mypy", "--strict", "edgekd"],
    "layers": ["lint-imports"],
}


@pytest.mark.parametrize("name", CHECKS)
def test_the_checkout_passes(name: str) -> None:
    tool, *args = CHECKS[name]
    beside = Path(sys.executable).parent / tool
    program = str(beside) if beside.is_file() else shutil.which(tool)
    if program is None:
        pytest.skip(f"{tool} is not installed: make dev")
    p = subprocess.run([program, *args], cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert p.returncode == 0, p.stdout + p.stderr
