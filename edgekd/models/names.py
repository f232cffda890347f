"""Names of timm's architectures without importing timm: a generated list (tools/update_names.py) that a test compares with the installed timm."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

from edgekd.errors import suggest


@cache
def architectures() -> frozenset[str]:
    """All architecture names of the timm version that edgekd was tested with."""
    return frozenset((Path(__file__).parent / "timm_names.txt").read_text(encoding="utf-8").split())


def check_architecture(name: str) -> str | None:
    """A sentence that says what is wrong with a name, or None."""
    if name in architectures() or name.partition(".")[0] in architectures():
        return None
    timm = sys.modules.get("timm")  # loaded already: a user's --code file may have registered more
    if timm is not None and timm.is_model(name):
        return None
    return f"unknown architecture '{name}'{suggest(name, architectures())}"
