"""Writes the generated parts of README.md: `python tools/update_readme.py`; a test checks that they are up to date."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from edgekd.listing import list_methods  # noqa: E402


def methods_table() -> str:
    """The table of methods, from the first line of each file."""
    rows = [f"| {m['kind']} | `{m['name']}` | {m['about']} |" for m in list_methods()]
    return "\n".join(["| kind | name | what it does |", "|---|---|---|", *rows])


def updated(text: str) -> str:
    """README with its generated parts replaced."""
    return re.sub(r"<!-- methods -->.*?<!-- /methods -->", f"<!-- methods -->\n{methods_table()}\n<!-- /methods -->", text, flags=re.S)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text(encoding="utf-8")), encoding="utf-8")
