"""Names of timm's architectures without importing timm: a generated list (tools/update_names.py) that a test compares with the installed timm."""

from __future__ import annotations

import hashlib
import inspect
import sys
from functools import cache
from pathlib import Path

from edgekd import registry
from edgekd.errors import suggest


@cache
def architectures() -> frozenset[str]:
    """All architecture names of the timm version that edgekd was tested with."""
    return frozenset((Path(__file__).parent / "timm_names.txt").read_text(encoding="utf-8").split())


def user_source(name: str) -> str | None:
    """SHA-256 of the user's own file that defines an architecture, or None for timm's: weights do not tell when code has changed."""
    if registry.is_users("architecture", name):
        return hashlib.sha256(registry.source_of("architecture", name)).hexdigest()
    timm = sys.modules.get("timm")  # loaded by that very file, if there is one
    if timm is None or not timm.is_model(name):
        return None
    module = timm.model_entrypoint(name).__module__
    return None if module.startswith("timm.") else hashlib.sha256(inspect.getsource(sys.modules[module]).encode()).hexdigest()


def check_architecture(name: str) -> str | None:
    """A sentence that says what is wrong with a name, or None."""
    if name in architectures() or name.partition(".")[0] in architectures():
        return None
    timm = sys.modules.get("timm")  # loaded already: a user's --code file may have registered more
    if timm is not None and timm.is_model(name):
        return None
    return f"unknown architecture '{name}'{suggest(name, architectures())}"
