"""What `plan` says of steps that would run: what changed since each last ran, and how long and how large it was then."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from edgekd.artifact import Manifest
from edgekd.plan import Outlook

_SHOWN = 2  # differences that are spelled out


def forecast(outlooks: Iterable[Outlook], earlier: Iterable[tuple[Manifest, int]]) -> Iterator[dict[str, Any]]:
    """For each step: `why` it runs, and `seconds` and `bytes` of the most similar run of it, None where there was none.

    `earlier` holds manifests of the store with the size of their entry in bytes.
    """
    past: dict[tuple[str, str], list[tuple[dict[str, Any], Manifest, int]]] = {}
    for manifest, size in earlier:
        stage = manifest.recipe.get("stage")
        if isinstance(stage, dict):
            past.setdefault((str(manifest.recipe.get("step")), str(stage.get("name"))), []).append((flat(manifest.recipe), manifest, size))
    for outlook in outlooks:
        if outlook.state in ("cached", "skipped"):
            yield {"why": "", "seconds": None, "bytes": None}
            continue
        now = flat(outlook.ingredients)
        alike = past.get((outlook.step.name, outlook.step.stage), [])
        if not alike:
            yield {"why": "has not run yet", "seconds": None, "bytes": None}
            continue
        then, manifest, size = min(alike, key=lambda e: len(_changed(e[0], now)))
        yield {"why": _why(outlook, then, now), "seconds": manifest.meta.get("seconds"), "bytes": size}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    if isinstance(value, dict):
        return {k: v for name, item in value.items() for k, v in flat(item, f"{prefix}.{name}" if prefix else str(name)).items()}
    return {prefix: value}


def _why(outlook: Outlook, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    changed = [_said(name, then.get(name), now.get(name)) for name in _changed(then, now)]
    if outlook.after:
        changed.append(f"follows {outlook.after}")
    more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return ", ".join(changed[:_SHOWN]) + more if changed else "its artifact is gone"


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names whose values differ; inputs that are not known yet are left out."""
    waiting = {name for name in then if name.startswith("inputs.") and name not in now}
    return sorted(name for name in {*then, *now} - waiting - {"step"} if then.get(name) != now.get(name))


def _said(name: str, then: Any, now: Any) -> str:
    section, _, rest = name.partition(".")
    if section == "inputs":
        return f"other {rest.removesuffix('?')}"
    if name.endswith(".source"):
        return f"new code of the {section}"
    if any(isinstance(v, str) and len(v) > 40 for v in (then, now)):
        return f"other {rest or name}"
    return f"{rest or name} {then} -> {now}"
