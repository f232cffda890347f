"""Advisory locks that the kernel frees when their holder dies, however it dies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from edgekd.errors import ResourceError


def flock(file: BinaryIO, *, exclusive: bool, wait: bool = True) -> bool:
    """Locks an open file until it is closed; False if another holds it and `wait` is off."""
    import fcntl  # absent on Windows, where check_locks_work refuses with a sentence

    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def try_lock(path: Path) -> BinaryIO | None:
    """The locked file, or None while another holds it; a lock file that was removed in between does not count."""
    lock = path.open("ab")
    try:
        if flock(lock, exclusive=True, wait=False) and path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            return lock
    except BaseException:
        lock.close()
        raise
    lock.close()
    return None


def check_locks_work(path: Path) -> None:
    """Raises ResourceError where the file system or the platform has no flock."""
    try:
        with path.open("ab") as lock:
            flock(lock, exclusive=False, wait=False)
    except (ImportError, OSError) as e:
        hint = "point EDGEKD_HOME at a local disk (Linux, with flock)"
        raise ResourceError("file locks do not work here, so runs could damage each other", where=str(path.parent), hint=hint) from e
