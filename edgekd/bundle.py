"""The deployable folder: pack and verify. Every byte is covered by the manifest, and the manifest by its own digest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.artifact import digest_of
from edgekd.errors import BackendError, BundleRefused, FileMissing
from edgekd.safeio.files import fsync_dir, hash_and_sync, sha256_file, write_synced

if TYPE_CHECKING:
    from edgekd.backends import Backend
    from edgekd.profile.schema import DeviceProfile

MANIFEST, FACTS, SAMPLES = "manifest.json", "bundle.json", "samples.npz"
SIGNATURE, _SIGNATURE_BYTES = "manifest.sig", 64  # the one file that the manifest does not cover: it covers the manifest
_ENGINE_FACTS = (
    "runtime",
    "version",
    "provider",
    "compute_capability",
    "max_batch",
    "judged_batch",
    "shapes",
    "options",
    "flags",
    "driver",
)  # what the manifest says of the engine
BUILT = ("model.engine", "model.cache", *(f"{n}.part" for n in ("model.engine", "model.cache", "manifest.json")))
# What a build adds, and what a killed one leaves: the one part of a bundle that can be made again from the rest.
_MAX_MANIFEST_BYTES = 4 * 2**20
_HINT = "do not deploy it; make it again: edgekd compress RECIPE"
_BUILD = "build it again on the device: edgekd verify {folder} --build, or python3 build.py in it"


def write_manifest(folder: Path, facts: dict[str, Any], hashed: Mapping[str, str] | None = None) -> None:
    """Adds manifest.json: size and SHA-256 of every file of the folder, with `facts` about where it comes from. `hashed`: those known already."""
    known = hashed or {}
    paths = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    files = {n: {"size": p.stat().st_size, "sha256": known[n] if n in known else sha256_file(p)} for n, p in paths.items()}
    write_synced(folder / MANIFEST, manifest_bytes({"schema": "edgekd.bundle/1", "files": files, **facts}))


def _on_disk(path: Path) -> dict[str, Any]:
    """A file's entry, when the disk has it."""
    found = hash_and_sync(path)
    return {"size": found.size, "sha256": found.sha256}


def replace_built(folder: Path, new: Path, manifest: Mapping[str, Any]) -> bool:
    """Moves what a build made in `new`, on the same disk, into a bundle, and its manifest with it; returns whether a signature went.

    The manifest comes last: a kill before it leaves an engine that is not the manifest's, which building again completes. An error leaves the bundle
    as it was. The folder itself stays, for it may be a shell's working folder, or lie behind a link.
    """
    made = [name for name in BUILT if (new / name).is_file()]
    files = {n: e for n, e in manifest["files"].items() if n not in BUILT} | {n: _on_disk(new / n) for n in made}
    write_synced(new / MANIFEST, manifest_bytes({**manifest, "files": files}))
    old = new / "old"
    old.mkdir()
    kept = [name for name in (*BUILT, SIGNATURE, MANIFEST) if (folder / name).is_file()]
    try:
        for name in kept[:-1]:  # the manifest is replaced, never gone
            (folder / name).rename(old / name)
        for name in (*made, MANIFEST):
            (new / name).replace(folder / name)
    except BaseException:
        for name in [n for n in made if n not in kept]:
            (folder / name).unlink(missing_ok=True)
        for name in [n for n in kept if (old / n).is_file()]:
            (old / name).rename(folder / name)
        raise
    fsync_dir(folder)
    return SIGNATURE in kept


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Writes bundle.json."""
    (folder / FACTS).write_text(json.dumps(facts, sort_keys=True, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")


def engine_facts(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says of an engine, from what its builder returned. Its file stands here alone: a build changes no file that was packed."""
    return {"file": meta["model_file"]} | {name: meta[name] for name in _ENGINE_FACTS if name in meta}


def verify_files(folder: Path, *, rebuilding: bool = False) -> dict[str, Any]:
    """The manifest of an intact bundle; raises BundleRefused that names what was changed, added or is missing.

    With `rebuilding`, what a build will replace may be missing or damaged.
    """
    body = read_manifest(folder)
    here: dict[str, Path] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise BundleRefused(f"'{name}' is a link or no regular file", where=str(folder), expected="plain files", hint=_HINT)
        if path.is_file():
            here[name] = path
        elif not any(path.iterdir()):
            raise BundleRefused(f"'{name}' is an empty folder", where=str(folder), expected="exactly the files of the manifest", hint=_HINT)
    wanted: dict[str, Any] = body["files"]
    for what, names in (("missing", set(wanted) - set(here)), ("not in the manifest", set(here) - set(wanted) - {MANIFEST, SIGNATURE})):
        if names := {n for n in names if not (rebuilding and n in BUILT)}:
            raise BundleRefused(
                f"{what}: {', '.join(sorted(names)[:5])}",
                where=str(folder),
                expected="exactly the files of the manifest",
                hint=_way_out(folder, names),
            )
    if SIGNATURE in here and here[SIGNATURE].stat().st_size != _SIGNATURE_BYTES:
        raise BundleRefused(
            f"'{SIGNATURE}' is no signature",
            where=str(folder),
            expected=f"{_SIGNATURE_BYTES} bytes",
            hint="remove it, or copy the bundle again",
        )
    for name, entry in wanted.items():
        if rebuilding and name in BUILT:
            continue
        if here[name].stat().st_size != entry["size"] or sha256_file(here[name]) != entry["sha256"]:
            raise BundleRefused(
                f"'{name}' was changed",
                where=str(folder),
                expected=f"SHA-256 {entry['sha256'][:16]}...",
                hint=_way_out(folder, [name]),
            )
    return body


def _way_out(folder: Path, names: Iterable[str]) -> str:
    return _BUILD.format(folder=folder) if all(n in BUILT for n in names) else _HINT


def engine_of(folder: Path, manifest: Mapping[str, Any], facts: Mapping[str, Any], backend: Backend, device: DeviceProfile) -> Path:
    """The engine of a verified bundle, if it is one of this runtime, version and device; else BackendError: nothing of it was read."""
    name, made, hint = str(facts.get("engine_file")), manifest.get("engine", {}), _BUILD.format(folder=folder)
    if name not in manifest["files"] or not name.endswith(backend.suffix) or made.get("runtime") != backend.name:
        raise BackendError(f"the bundle holds no engine of {backend.name}", where=str(folder), hint=hint)
    if (target := manifest.get("target")) != device.id:
        raise BackendError(
            f"its engine was built for {target}", where=str(folder), expected=f"one for {device.id}", hint=f"--device {target}"
        )
    version, lasting = made.get("version"), made.get("options", {}).get("version_compatible", False)
    if version != backend.version() and backend.builds and not lasting:  # others read files of other versions, or say that they do not
        raise BackendError(
            f"its engine was built with {backend.name} {version}",
            where=str(folder),
            expected=f"{backend.version()}, which is here",
            hint=hint,
        )
    return folder / name


def read_facts(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """bundle.json and `engine_file`, with a model file that is the bundle's own and its only graph: it can come from anyone. Raises BundleRefused."""
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    if facts.get("model_file") not in manifest["files"]:
        raise BundleRefused(
            f"its model file '{facts.get('model_file')}' is not in the manifest", where=str(folder), expected="a file of the bundle"
        )
    engine = str(manifest.get("engine", {}).get("file", facts["model_file"]))
    if engine.endswith(".onnx") and engine != facts["model_file"]:  # which is the one that is checked before a runtime opens it
        raise BundleRefused(
            f"its engine '{engine}' is another graph than its model", where=str(folder), expected=f"'{facts['model_file']}'"
        )
    return facts | {"engine_file": engine}


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json, whole and in its own exact bytes; raises FileMissing or BundleRefused."""
    path = folder / MANIFEST
    if not folder.is_dir() or not path.is_file():
        raise FileMissing(
            "this is no bundle: it has no manifest.json",
            where=str(folder),
            expected="a folder that `edgekd compress` made",
            hint=_find(folder),
        )
    raw = path.read_bytes()[: _MAX_MANIFEST_BYTES + 1]
    try:
        body: dict[str, Any] = json.loads(raw)
        digest = body.pop("digest")
        intact = len(raw) <= _MAX_MANIFEST_BYTES and digest == digest_of(body) and raw == manifest_bytes(body)
        names = [str(n) for n in body["files"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact, names = False, []
    if not intact or any(n.startswith("/") or ".." in n.split("/") for n in names):
        raise BundleRefused("'manifest.json' was changed", where=str(folder), hint=_HINT)
    return body


def _find(folder: Path) -> str:
    """Where the bundle may be that somebody meant."""
    inside = sorted(p.parent for p in folder.glob(f"*/{MANIFEST}")) if folder.is_dir() else []
    return f"edgekd verify {inside[0]}" if inside else "a run's bundles are its folders, one a target: edgekd verify RUN/TARGET"


def manifest_bytes(body: Mapping[str, Any]) -> bytes:
    """The exact bytes of manifest.json, from what `verify_files` gave."""
    return json.dumps({**body, "digest": digest_of(body)}, sort_keys=True, indent=1, ensure_ascii=True).encode() + b"\n"
