"""The content-addressed store: an entry is absent or whole, is built once, and is verified each time it is read.

v1/ab/<key>/        published entries: the files of a stage and manifest.json, renamed into place when all is on disk
tmp/<key>.<rand>/   scratch of a build; dead as soon as nobody holds the lock of its key
work/<key>/         checkpoints of an unfinished stage; they survive SIGKILL and go on publish or by age
locks/<key>         one flock per key: the kernel frees it when its holder dies
quarantine/         entries whose bytes differ from their manifest
programs/           what models were compiled to for training, kept by torch
timing/             what TensorRT's builder learnt about kernels (backends/_timing.py): a shortcut that may go at any time
lock                shared while this process uses the store, exclusive for gc
"""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from edgekd.artifact import MANIFEST, Artifact, Kind, Manifest
from edgekd.errors import DataRefused, LockTimeout, ResourceError, UsageError
from edgekd.safeio.files import fsync_dir, resource_errors
from edgekd.safeio.locks import check_locks_work, flock, try_lock
from edgekd.safeio.sealed import Corrupt, read_manifest, seal, verified

_KEY = re.compile(r"[0-9a-f]{64}")
_FOLDERS = ("v1", "tmp", "work", "locks", "quarantine", "programs")
_NOTICE_AFTER_S, _POLL_S, _DAY_S = 2.0, 0.1, 86_400.0
_LOCK_TIMEOUT_S = _DAY_S
_WORK_DAYS = 14.0  # checkpoints untouched for longer belong to a run that nobody will resume

Build = Callable[[Path], dict[str, Any]]


def home() -> Path:
    """EDGEKD_HOME, else ~/.cache/edgekd."""
    return Path(os.environ.get("EDGEKD_HOME") or "~/.cache/edgekd").expanduser().absolute()


@dataclass
class GcReport:
    """What gc removed, or would remove: names below the store's root, bytes; `busy`: a run uses the store, so entries were left alone."""

    removed: list[str] = field(default_factory=list)
    freed_bytes: int = 0
    kept: int = 0
    busy: bool = False


class Store:
    """Artifacts by key below `root` (default: EDGEKD_HOME, else ~/.cache/edgekd). Raises ResourceError where locks do not work."""

    def __init__(self, root: Path | None = None, *, warn: Callable[[str], None] = lambda _: None):
        self.root = root.expanduser().absolute() if root else home()
        self.warn = warn
        self._use: BinaryIO | None = None
        self._handed_out: set[str] = set()
        with resource_errors(self.root):
            _make_private(self.root)
            check_locks_work(self.root / "lock")

    @property
    def programs(self) -> Path:
        """Where models that were compiled for training leave their programs."""
        return self.root / "programs"

    def get(self, key: str) -> Artifact | None:
        """The verified entry, or None; an entry that does not verify goes to quarantine with one warning."""
        self._share()
        path = self._entry(key)
        try:
            with resource_errors(path):
                manifest = self._read(path)
        except FileNotFoundError:
            return None
        except Corrupt as problem:
            self.warn(f"{key[:12]} is damaged ({problem.what}): moved to quarantine, it will be built again")
            return None
        with suppress(OSError):
            os.utime(path / MANIFEST)  # when an entry was last used, for gc
        self._handed_out.add(key)
        return Artifact(key, manifest.kind, path, manifest.digest, manifest.meta)

    def put(self, key: str, kind: Kind, build: Build, *, recipe: dict[str, Any] | None = None, inputs: Sequence[Artifact] = ()) -> Artifact:
        """The entry of `key`, built by `build(folder) -> meta` unless it is there; what build raises is passed on and nothing is kept.

        Raises LockTimeout, ResourceError, and DataRefused when one of `inputs` changed while the build ran.
        """
        self._share()
        with self._locked(key):
            if found := self.get(key):
                return found
            scratch = self.root / "tmp" / f"{key}.{uuid.uuid4().hex[:8]}"
            with resource_errors(scratch):
                try:
                    scratch.mkdir(mode=0o700)
                    manifest = seal(scratch, Manifest(key, kind, {}, build(scratch), recipe or {}))
                    _check_unchanged(inputs)
                    self._publish(scratch, key)
                except BaseException:
                    shutil.rmtree(scratch, ignore_errors=True)
                    raise
            shutil.rmtree(self.root / "work" / key, ignore_errors=True)
        self._handed_out.add(key)
        return Artifact(key, kind, self._entry(key), manifest.digest, manifest.meta, cached=False)

    def peek(self, key: str) -> Manifest | None:
        """The manifest alone, files unchecked; None where there is none or it cannot be read."""
        try:
            return read_manifest(self._entry(key), key)
        except (Corrupt, OSError):
            return None

    def work(self, key: str) -> Path:
        """The folder for checkpoints of the stage that builds `key`; use it inside `build`, where the key's lock is held."""
        self._share()
        path = self.root / "work" / _checked(key)
        with resource_errors(path):
            path.mkdir(mode=0o700, exist_ok=True)
        return path

    def entries(self) -> Iterator[tuple[Manifest, Path, int, float]]:
        """(manifest, folder, bytes, time of last use) of each entry with a readable manifest, by key."""
        for path in self._folders():
            with suppress(Corrupt, OSError):
                manifest = read_manifest(path, path.name)
                own = (path / MANIFEST).stat()
                yield manifest, path, own.st_size + sum(e.size for e in manifest.files.values()), own.st_mtime

    def verify(self) -> list[str]:
        """Reads every byte; one sentence for each damaged entry, which is now in quarantine."""
        self._share()
        problems = []
        for path in self._folders():
            with resource_errors(path), suppress(FileNotFoundError):  # collected by someone else meanwhile
                try:
                    self._read(path)
                except Corrupt as problem:
                    problems.append(f"{path.relative_to(self.root)}: {problem.what}")
        return problems

    def gc(self, *, older_than_days: float | None = None, max_bytes: int | None = None, dry_run: bool = False) -> GcReport:
        """Removes dead scratch, stale work and quarantine, then entries by age and, least recently used first, down to `max_bytes`."""
        report = GcReport()
        with resource_errors(self.root), self._alone() as alone:
            report.busy = not alone
            for path in self._rubbish(_WORK_DAYS if older_than_days is None else older_than_days):
                self._collect(path, report, dry_run)
            for path in self._old_programs(_WORK_DAYS if older_than_days is None else older_than_days) if alone else ():
                self._collect(path, report, dry_run)
            unwanted = self._unwanted(older_than_days, max_bytes) if alone else []
            report.kept = sum(1 for _ in self.entries()) - len(unwanted)
            for path in unwanted:
                self._collect(path, report, dry_run)
            if alone and not dry_run:
                self._drop_lock_files()
        return report

    # ------------------------------------------------------------------------------------------------ entries
    def _read(self, path: Path) -> Manifest:
        """The verified manifest of an entry; a damaged one is in quarantine when Corrupt is raised."""
        inode = path.lstat().st_ino
        try:
            return verified(path, path.name)
        except Corrupt:
            with suppress(FileNotFoundError):  # another process was faster
                if path.lstat().st_ino == inode:  # else it has been built anew since we looked
                    os.rename(path, self.root / "quarantine" / f"{path.name[:64]}.{uuid.uuid4().hex[:8]}")
            raise

    def _publish(self, scratch: Path, key: str) -> None:
        entry = self._entry(key)
        entry.parent.mkdir(mode=0o700, exist_ok=True)
        fsync_dir(entry.parent.parent)
        os.rename(scratch, entry)
        fsync_dir(entry.parent)

    def _entry(self, key: str) -> Path:
        return self.root / "v1" / _checked(key)[:2] / key

    def _folders(self) -> list[Path]:
        return sorted((self.root / "v1").glob("*/*"))

    # ------------------------------------------------------------------------------------------------ locks
    def _share(self) -> None:
        """Holds the store's lock, shared, until this object goes: gc then leaves every entry alone."""
        if self._use is None:
            with resource_errors(self.root):
                use = (self.root / "lock").open("ab")
                flock(use, exclusive=False)
            self._use = use

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """True while no other process uses the store; our own shared lock, if any, comes back afterwards."""
        own, self._use = self._use, None
        if own:
            own.close()
        try:
            with (self.root / "lock").open("ab") as lock:
                yield flock(lock, exclusive=True, wait=False)
        finally:
            if own:
                self._share()

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        start, limit, told = time.monotonic(), _lock_timeout_s(), False
        while (lock := self._try_key(key)) is None:
            waited = time.monotonic() - start
            if waited > limit:
                hint = "wait for the other run, or raise EDGEKD_LOCK_TIMEOUT (seconds)"
                raise LockTimeout("another process is still building this artifact", where=key[:12], hint=hint)
            if waited > _NOTICE_AFTER_S and not told:
                told = True
                self.warn(f"another process is building {key[:12]}; waiting for it")
            time.sleep(_POLL_S)
        with lock:
            yield

    def _try_key(self, key: str) -> BinaryIO | None:
        path = self.root / "locks" / _checked(key)
        with resource_errors(path):
            return try_lock(path)

    def _drop_lock_files(self) -> None:
        for path in (self.root / "locks").iterdir():
            if lock := try_lock(path):
                with lock:
                    path.unlink()

    # ------------------------------------------------------------------------------------------------ collecting
    def _rubbish(self, work_days: float) -> Iterator[Path]:
        """Quarantine, scratch whose builder is dead, and work that is published or too old."""
        yield from (self.root / "quarantine").iterdir()
        for path in [*(self.root / "tmp").iterdir(), *(self.root / "work").iterdir()]:
            key = path.name[:64]
            if lock := try_lock(self.root / "locks" / key):
                with lock:  # a builder holds the lock of its key for as long as it lives: this one is dead
                    stale = path.parent.name == "tmp" or _age_days(path) > work_days or self._published(key)
                    if stale:
                        yield path

    def _old_programs(self, days: float) -> list[Path]:
        """Compiled programs that nothing has added to for so long; only while nobody else may be reading them."""
        return [path for path in self.programs.iterdir() if _age_days(path) > days]

    def _unwanted(self, days: float | None, max_bytes: int | None) -> list[Path]:
        entries = sorted(self.entries(), key=lambda e: e[3])
        total, now, unwanted = sum(size for _, _, size, _ in entries), time.time(), []
        for manifest, path, size, used in entries:
            too_old = days is not None and now - used > days * _DAY_S
            too_much = max_bytes is not None and total > max_bytes
            if manifest.key not in self._handed_out and (too_old or too_much):
                unwanted.append(path)
                total -= size
        return unwanted

    def _collect(self, path: Path, report: GcReport, dry_run: bool) -> None:
        report.removed.append(str(path.relative_to(self.root)))
        report.freed_bytes += _tree_bytes(path)
        if dry_run:
            return
        if path.parent.parent.name == "v1":  # out of sight first, so that a kill while deleting leaves no torn entry
            doomed = self.root / "tmp" / f"{path.name}.{uuid.uuid4().hex[:8]}"
            os.rename(path, doomed)
            path = doomed
        with suppress(FileNotFoundError):  # another gc was faster
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _published(self, key: str) -> bool:
        return bool(_KEY.fullmatch(key)) and self._entry(key).is_dir()


def _check_unchanged(inputs: Sequence[Artifact]) -> None:
    for artifact in inputs:
        try:
            same = verified(artifact.path, artifact.key).digest == artifact.digest
        except (Corrupt, FileNotFoundError):
            same = False
        if not same:
            hint = "stop what writes there and run the same command again"
            raise DataRefused("an input changed while the stage ran, so nothing was published", where=str(artifact.path), hint=hint)


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise UsageError(f"{ascii(key)[:80]} is not a store key", expected="64 hexadecimal digits", hint="list them: edgekd store list")
    return key


def _make_private(root: Path) -> None:
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in _FOLDERS:
            (root / name).mkdir(mode=0o700, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as e:
        raise ResourceError("the store's folder, or one in it, is a file", where=str(root), hint="point EDGEKD_HOME at a folder") from e
    info = root.stat()
    if info.st_uid != os.geteuid() or info.st_mode & 0o022:
        what = "the store's folder belongs to, or can be written by, other users"
        raise ResourceError(what, where=str(root), hint=f"chmod go-w {root}, or point EDGEKD_HOME at a folder of your own")


def _lock_timeout_s() -> float:
    text = os.environ.get("EDGEKD_LOCK_TIMEOUT", "")
    try:
        return float(text) if text else _LOCK_TIMEOUT_S
    except ValueError as e:
        raise UsageError(f"EDGEKD_LOCK_TIMEOUT is {text!a}", expected="seconds", hint="unset EDGEKD_LOCK_TIMEOUT") from e


def _age_days(path: Path) -> float:
    newest = max(p.lstat().st_mtime for p in (path, *path.rglob("*")))
    return (time.time() - newest) / _DAY_S


def _tree_bytes(path: Path) -> int:
    return sum(p.lstat().st_size for p in (path, *path.rglob("*")) if not p.is_dir())
