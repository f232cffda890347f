"""What a builder learnt about the kernels of one GPU, kept between builds: one sealed file a runtime, version and GPU below the store's folder.

Only ever a shortcut: a cache that is missing, damaged, foreign or cannot be written costs time and a note, never the build. Files are read from the
user's own folder alone; what another build added meanwhile is merged, not overwritten.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from typing import Any

from edgekd.errors import ResourceError
from edgekd.safeio.files import write_atomic
from edgekd.safeio.locks import flock
from edgekd.store import home

_MAX_BYTES = 256 * 2**20
_SEAL_BYTES = hashlib.sha256().digest_size


class TimingCache:
    """The cache of one runtime, version and GPU; `note` says what was wrong with it, if anything."""

    def __init__(self, runtime: str, version: str, gpu: str):
        words = re.sub(r"[^a-z0-9.]+", "-", f"{runtime} {version} {gpu}".lower()).strip("-")
        self.path = home() / "timing" / f"{words}.cache"
        self.note: str | None = None

    def attach(self, config: Any) -> None:
        """Gives a builder's config what earlier builds learnt, or an empty cache to fill."""
        cache = config.create_timing_cache(self._read())
        if cache is None or not config.set_timing_cache(cache, False):  # of another version or GPU under the same name
            self.note = f"the timing cache {self.path.name} is of another version or GPU: it is replaced"
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def keep(self, config: Any) -> int | None:
        """Writes what this build and others learnt; bytes, or None where nothing could be kept."""
        cache = config.get_timing_cache()
        if cache is None:
            return None
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self.path.with_suffix(".lock").open("ab") as lock:
                flock(lock, exclusive=True)
                before = self._read()
                others = config.create_timing_cache(before)
                if others is not None:
                    cache.combine(others, False)  # refused where it is foreign: then ours alone is kept
                blob = bytes(cache.serialize())
                if blob != before:
                    write_atomic(self.path, hashlib.sha256(blob).digest() + blob)
        except (OSError, ResourceError) as problem:
            self.note = f"the timing cache cannot be kept: {problem}"
            return None
        return len(blob)

    def _read(self) -> bytes:
        """The sealed bytes; none where there is no file, or one that is not what was written."""
        try:
            with open(os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
                info = os.fstat(file.fileno())
                own = stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & 0o022
                data = file.read(_MAX_BYTES + 1) if own and info.st_size <= _MAX_BYTES else b""
        except FileNotFoundError:
            return b""
        except OSError:  # a link, a folder, a failing disk
            data = b""
        seal, blob = data[:_SEAL_BYTES], data[_SEAL_BYTES:]
        if hashlib.sha256(blob).digest() == seal:
            return blob
        self.note = f"the timing cache {self.path.name} is damaged: it is replaced"
        return b""
