"""Generated parts of README are up to date."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_of_methods_is_what_the_code_says(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import update_readme

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert update_readme.updated(text) == text, "run: python tools/update_readme.py"
    sys.modules.pop("update_readme")
