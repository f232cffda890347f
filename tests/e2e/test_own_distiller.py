"""README's distiller of one's own: copied from there, it trains, and its file is part of the key."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from edgekd import registry
from tests.support import QUICKSTART, REPOSITORY, TINY, run_here

pytestmark = [
    pytest.mark.usefixtures("stored"),
    pytest.mark.skipif(not (REPOSITORY / "README.md").is_file(), reason="there is no README.md"),
]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    block = text[text.index("    import edgekd\n") :]
    lines = block.splitlines()
    end = next(i for i, line in enumerate(lines) if line and not line.startswith("    "))
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent("\n".join(lines[:end])), encoding="utf-8")
    return path


def test_a_distiller_of_ones_own_needs_twenty_lines_and_trains_like_any_other(mine: Path, tmp_path: Path) -> None:
    code = [line for line in mine.read_text().splitlines() if line.strip()]
    assert len(code) <= 20
    try:
        how = (QUICKSTART, *TINY, "--no-gate", "--code", mine, "-o", "distill.method=lead", "-o", "distill.method=lead")
        found = run_here("sweep", *how, "--json", "--out", tmp_path / "run")
        assert found.code == 0, found.text
        assert found.json()["rows"][0]["error"] == ""
        unknown = run_here("check", QUICKSTART, "-o", "distill.method=lead", "-o", "distill.no_such=1", "--code", mine)
        assert unknown.code == 2
        assert "no_such" in unknown.err
    finally:
        registry._user.clear()  # the other tests of this process know nothing of it
