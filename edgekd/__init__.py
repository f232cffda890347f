"""edgekd: from a trained model to a small, fast, verified engine for a named device.

The Python API; the command line only calls it. Everything is loaded on first use, so that `import edgekd` is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgekd.api import Options, check, compress, import_checkpoint, plan, predict, profile, show, sign, verify
    from edgekd.registry import register

__all__ = ["Options", "check", "compress", "import_checkpoint", "plan", "predict", "profile", "register", "show", "sign", "verify"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'edgekd' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module("edgekd.registry" if name == "register" else "edgekd.api"), name)
