"""What there is: recipes, devices, methods, and what the store holds; all without torch."""

from __future__ import annotations

import ast
import json
import time
from pathlib import Path
from typing import Any

from edgekd import registry
from edgekd.errors import UnknownName, UsageError, suggest

COSTS = Path(__file__).parent / "distill" / "costs.json"  # measured and written by tools/bench_costs.py
_METHOD_KINDS = ("distill", "graph_distill", "architecture", "criterion", "quantize", "format", "graph", "backend", "task")


def list_recipes() -> list[dict[str, Any]]:
    """Shipped recipes: name and the first comment line of the file."""
    from edgekd.recipe import shipped
    from edgekd.shipped import shipped_dir

    root = shipped_dir("recipes")
    return [{"name": n, "about": _first_comment(root / f"{n}.yaml")} for n in shipped()]


def list_devices() -> list[dict[str, Any]]:
    """Device profiles: id, name, kind, runtimes, confidence; read but not validated, for a list must be instant (`devices show` validates)."""
    from edgekd.profile.host import detect, raw_profile
    from edgekd.safeio.yaml import read_file
    from edgekd.shipped import shipped_dir

    files = sorted(shipped_dir("hardware").glob("*.yaml"))
    found = [raw_profile(detect()), *(v for f in files if isinstance(v := read_file(f).value, dict))]
    return [{k: d.get(k, "") for k in ("id", "name", "kind", "confidence")} | {"runtimes": _runtimes(d.get("runtimes"))} for d in found]


def show_device(name: str) -> dict[str, Any]:
    """A profile, and rows of field, value, origin and source for each number in it."""
    from edgekd.profile.device import load_device
    from edgekd.profile.schema import numbers

    device = load_device(name)
    origin = {p.field: p for p in device.provenance}
    rows = [
        {"field": f, "value": v, "origin": origin[f].kind if f in origin else "", "source": origin[f].source if f in origin else ""}
        for f, v in numbers(device)
    ]
    return {"profile": device.model_dump(mode="json"), "rows": rows}


def list_methods(kind: str | None = None) -> list[dict[str, Any]]:
    """Methods: kind, name and the first line of the file's docstring."""
    if kind in ("architectures", "architecture", "arch"):  # of nodes, then of images
        from edgekd.models.names import architectures

        return _rows("architecture") + [{"kind": "architecture", "name": n, "about": ""} for n in sorted(architectures())]
    if kind is not None and kind not in _METHOD_KINDS:
        raise UnknownName(f"unknown kind '{kind}'{suggest(kind, _METHOD_KINDS)}")
    return [row for k in ((kind,) if kind else _METHOD_KINDS) for row in _rows(k)]


def _rows(kind: str) -> list[dict[str, Any]]:
    return [{"kind": kind, "name": n, "about": _doc(kind, n).partition("\n")[0]} for n in registry.names(kind)]


def show_method(name: str) -> dict[str, Any]:
    """A method's documentation and knobs."""
    kind = next((k for k in _METHOD_KINDS if name in registry.names(k)), None)
    if kind is None:
        known = {n for k in _METHOD_KINDS for n in registry.names(k)}
        raise UnknownName(f"unknown method '{name}'{suggest(name, known)}", hint="list them: edgekd methods list")
    cls = registry.load(kind, name)
    config = getattr(cls, "Config", None) or getattr(cls, "Options", None)  # backends call theirs options
    fields = []
    for field, info in (config.model_fields if config else {}).items():
        default = "required" if info.is_required() else info.get_default(call_default_factory=True)
        kind_name = (
            getattr(info.annotation, "__name__", str(info.annotation))
            if isinstance(info.annotation, type)
            else str(info.annotation).replace("typing.", "")
        )
        fields.append({"field": field, "type": kind_name, "default": str(default), "description": info.description or ""})
    found = {"name": name, "kind": kind, "about": _doc(kind, name), "fields": fields}
    return found | {"costs": _costs(name)} if kind == "distill" else found


def _costs(name: str) -> dict[str, Any]:
    """What a training step of a distiller took where it was measured, a row a pair of models, and how that was done; no rows where it was not."""
    found = json.loads(COSTS.read_text(encoding="utf-8"))
    rows = [
        {"pair": pair, "models": row["models"], "step": f"{times[name]:.2f}x" if times[name] else "refused", "kd": f"{times['kd']:.2f}x"}
        for pair, row in found["pairs"].items()
        if name in (times := row["times"])
    ]
    return {"measured": f"{found['measured']} ({found['by']})", "rows": rows}


# ------------------------------------------------------------------------------------------------------------ store
def store_rows() -> list[dict[str, Any]]:
    """Artifacts, the most recently used first."""
    from edgekd.store import Store

    rows = sorted(Store().entries(), key=lambda e: -e[3])
    return [
        {
            "key": m.key[:16],
            "kind": str(m.kind),
            "step": m.meta.get("step", m.recipe.get("step", "")),
            "bytes": b,
            "used": time.strftime("%Y-%m-%d %H:%M", time.localtime(t)),
        }
        for m, _, b, t in rows
    ]


def store_why(key: str, other: str | None = None) -> list[dict[str, Any]]:
    """The ingredients of a key, or those in which two keys differ; keys may be shortened."""
    from edgekd.forecast import flat

    first = flat(_manifest(key).recipe)
    if other is None:
        return [{"ingredient": k, "value": v} for k, v in first.items()]
    second = flat(_manifest(other).recipe)
    names = sorted({*first, *second})
    return [{"ingredient": n, "first": first.get(n), "second": second.get(n)} for n in names if first.get(n) != second.get(n)]


def store_verify() -> dict[str, Any]:
    """Reads everything; problems were moved to quarantine."""
    from edgekd.store import Store

    store = Store()
    problems = store.verify()
    return {"problems": problems, "entries": sum(1 for _ in store.entries())}


def store_gc(older_than_days: float | None, max_gb: float | None, dry_run: bool) -> dict[str, Any]:
    """What gc removed, or would remove."""
    from dataclasses import asdict

    from edgekd.store import Store

    return asdict(Store().gc(older_than_days=older_than_days, max_bytes=None if max_gb is None else int(max_gb * 1e9), dry_run=dry_run))


def _manifest(key: str) -> Any:
    from edgekd.store import Store

    found = [m for m, *_ in Store().entries() if m.key.startswith(key)]
    if len(found) != 1:
        raise UsageError(f"{len(found)} artifacts have a key that starts with '{key}'", expected="exactly one", hint="edgekd store list")
    return found[0]


def _doc(kind: str, name: str) -> str:
    return ast.get_docstring(ast.parse(registry.source_of(kind, name))) or ""


def _runtimes(value: Any) -> list[str]:
    return [str(r.get("name", "")) for r in value if isinstance(r, dict)] if isinstance(value, list) else []


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""
