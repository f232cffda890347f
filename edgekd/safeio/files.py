"""Whole or not at all: hashing, atomic writes, containment of paths, and one error for every full or failing disk."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from edgekd.artifact import FileEntry
from edgekd.errors import InputRefused, ResourceError

_RESOURCE_ERRNOS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ENOMEM),
        *(errno.EMFILE, errno.ENFILE, errno.ENOLCK, errno.EACCES, errno.EPERM),
    }
)


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces `path` by `data`: after a crash at any instant it holds the old bytes or the new ones. Raises ResourceError."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    with resource_errors(path, len(data)):
        try:
            write_synced(scratch, data)
            os.replace(scratch, path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
        fsync_dir(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Writes a new file and waits until the disk has it."""
    with path.open("xb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def sha256_file(path: Path) -> str:
    """SHA-256 in hex of the file's bytes; a symlink is not followed (OSError)."""
    return _entry(path, sync=False).sha256


def hash_and_sync(path: Path) -> FileEntry:
    """Size and SHA-256 of a file that is on disk when this returns."""
    return _entry(path, sync=True)


def fsync_dir(path: Path) -> None:
    """Makes the names in a folder (created, renamed, removed) survive power loss."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def contained(path: Path, roots: Sequence[Path]) -> Path:
    """`path` with symlinks resolved, if it lies under one of `roots` by whole parts (`/a/bc` is not under `/a/b`); else InputRefused."""
    expected = f"a path under {' or '.join(str(r) for r in roots) or 'an allowed folder'}"
    shown = ascii(str(path))
    try:
        real = path.resolve()
        if any(real.is_relative_to(root.resolve()) for root in roots):
            return real
    except (OSError, ValueError, RuntimeError) as e:  # NUL bytes, over-long names, symlink loops
        raise InputRefused("the path cannot be resolved", where=shown, expected=expected, hint="correct the path") from e
    hint = "move the file there, or name its folder on the command line"
    raise InputRefused("the path leaves the folders it may use", where=shown, expected=expected, hint=hint)


def free_bytes(path: Path) -> int:
    """Bytes free for this user on the file system of `path` or of its nearest existing parent."""
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    return shutil.disk_usage(place).free


@contextmanager
def resource_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turns disk-full, quota, I/O, file-handle and permission errors into ResourceError with the path, needed and free bytes."""
    try:
        yield
    except OSError as e:
        if e.errno not in _RESOURCE_ERRNOS:
            raise
        raise _resource_error(e, path, needed) from e


def _resource_error(e: OSError, path: Path, needed: int | None) -> ResourceError:
    place = Path(os.fsdecode(e.filename)) if isinstance(e.filename, (str, bytes)) and e.filename else path
    try:
        free = f"{free_bytes(place)} bytes free"
    except OSError:
        free = "free bytes unknown"
    need = f"{needed} bytes needed, " if needed is not None else ""
    hint = {
        errno.EMFILE: "raise the limit of open files: ulimit -n 4096",
        errno.ENFILE: "close other programs: the system has no file handles left",
        errno.EROFS: "point EDGEKD_HOME at a writable folder",
        errno.EACCES: "correct the permissions, or point EDGEKD_HOME at a folder of your own",
        errno.EPERM: "correct the permissions, or point EDGEKD_HOME at a folder of your own",
        errno.EIO: "check the disk, then run: edgekd store verify",
    }.get(e.errno or 0, "free some space: edgekd store gc")
    return ResourceError(f"{os.strerror(e.errno or errno.EIO).lower()} ({need}{free})", where=str(place), hint=hint)


def _entry(path: Path, *, sync: bool) -> FileEntry:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(fd, "rb", buffering=0) as f:
        if sync:
            os.fsync(fd)
        return FileEntry(os.fstat(fd).st_size, hashlib.file_digest(f, "sha256").hexdigest())
