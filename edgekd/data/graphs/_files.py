"""What formats of graph files share: finding the file or folder that `data.root` names."""

from __future__ import annotations

from pathlib import Path

from edgekd.data.nodes_config import GraphConfig
from edgekd.errors import FileMissing


def root_of(cfg: GraphConfig, or_else: str = "") -> Path:
    """`data.root`, which must be there; `or_else` is what else helps where none was given."""
    root = Path(cfg.root or ".").expanduser()
    if cfg.root is None or not root.exists():
        what = "data folder not given" if cfg.root is None else "data folder not found"
        hint = "give it with -o data.root=PATH" + (f", {or_else}" if or_else and cfg.root is None else "")
        raise FileMissing(what, where=str(root), expected=f"a graph in the format {cfg.format}", hint=hint)
    return root


def one_of(cfg: GraphConfig, stems: tuple[str, ...], suffixes: tuple[str, ...]) -> Path:
    """The root itself where it is a file, or the only file of these names in it."""
    root = root_of(cfg)
    if root.is_file():
        return root
    found = [p for stem in stems for suffix in suffixes if (p := root / f"{stem}{suffix}").is_file()]
    if len(found) != 1:
        seen = "none of them" if not found else " and ".join(p.name for p in found)
        names = " or ".join(f"{stems[0]}{s}" for s in suffixes)
        raise FileMissing(
            f"the folder holds {seen}", where=str(root), expected=names, hint="give the file: -o data.root=FILE, or data.name"
        )
    return found[0]
