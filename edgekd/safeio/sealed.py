"""A sealed folder: its files and a manifest of their sizes and hashes, both on disk; reading it again proves that nothing changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from edgekd.artifact import MANIFEST, FileEntry, Manifest
from edgekd.errors import EdgekdError
from edgekd.safeio.files import fsync_dir, hash_and_sync, sha256_file, write_synced

_MAX_MANIFEST_BYTES = 64 * 2**20


class Corrupt(EdgekdError):
    """A folder that is not what its manifest says; the store turns it into a miss."""


def seal(folder: Path, draft: Manifest) -> Manifest:
    """Syncs and hashes the files of `folder`, then writes their manifest; returns it as a later reader will see it."""
    files = {name: hash_and_sync(folder / name) for name in _file_names(folder)}
    if MANIFEST in files:
        raise Corrupt(f"a stage wrote {MANIFEST}, which is the store's own file", where=draft.key[:12])
    manifest = Manifest.from_json(Manifest(draft.key, draft.kind, files, draft.meta, draft.recipe).to_json())
    write_synced(folder / MANIFEST, _text(manifest).encode())
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            fsync_dir(path)
    return manifest


def verified(folder: Path, key: str) -> Manifest:
    """The manifest, once every file was hashed. Raises FileNotFoundError (no such folder) and Corrupt."""
    manifest = read_manifest(folder, key)
    found = set(_file_names(folder)) - {MANIFEST}
    if found != manifest.files.keys():
        raise Corrupt(f"extra or missing files: {', '.join(sorted(found ^ manifest.files.keys())[:3])}")
    for name, entry in manifest.files.items():
        _check_file(folder / name, name, entry)
    return manifest


def _check_file(path: Path, name: str, entry: FileEntry) -> None:
    if path.lstat().st_size != entry.size:
        raise Corrupt(f"{name} is not {entry.size} bytes long")
    if sha256_file(path) != entry.sha256:
        raise Corrupt(f"the bytes of {name} changed")


def read_manifest(folder: Path, key: str) -> Manifest:
    """The manifest alone, files unchecked. Raises FileNotFoundError (no such folder) and Corrupt."""
    path = folder / MANIFEST
    folder.lstat()  # FileNotFoundError: no entry; a folder without a manifest is a damaged one
    try:
        if path.lstat().st_size > _MAX_MANIFEST_BYTES or path.is_symlink() or folder.is_symlink():
            raise Corrupt(f"{MANIFEST} is not a plain file of sensible size")
        text = path.read_text(encoding="utf-8")
        manifest = Manifest.from_json(text)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
        raise Corrupt(f"{MANIFEST} is missing") from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise Corrupt(f"{MANIFEST} cannot be read") from e
    if manifest.key != key:
        raise Corrupt(f"{MANIFEST} belongs to another key")
    if text != _text(manifest):
        raise Corrupt(f"the bytes of {MANIFEST} changed")
    return manifest


def _text(manifest: Manifest) -> str:
    """The manifest with a hash of itself: without it a flipped bit in `meta` would go unseen."""
    plain = manifest.to_json()
    seal_of = hashlib.sha256(plain.encode()).hexdigest()
    return json.dumps({**json.loads(plain), "seal": seal_of}, sort_keys=True, indent=1)


def _file_names(folder: Path) -> list[str]:
    """Relative posix names of the plain files below a folder; anything else but folders (links, devices) is Corrupt."""
    names = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise Corrupt(f"{path.name} is neither a file nor a folder")
        if path.is_file():
            names.append(path.relative_to(folder).as_posix())
    return names
