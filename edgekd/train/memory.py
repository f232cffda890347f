"""Freed memory stays with the process while it trains.

glibc gives large buffers back to the kernel as soon as they are freed and asks for them again in the next step; each return costs page faults, a
quarter of a step of a small CNN on two cores (tools/bench_distill.py).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of mallopt(3)
_KEEP = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 * 2**20))
_DEFAULTS = ((_MMAP_MAX, 65_536), (_TRIM_THRESHOLD, 128 * 2**10), (_TOP_PAD, 128 * 2**10))


@contextmanager
def kept_memory() -> Iterator[None]:
    """Inside, malloc keeps what is freed; at the end it is given back. Does nothing where the C library is not glibc."""
    libc = _glibc()
    if libc is None:
        yield
        return
    for name, value in _KEEP:
        libc.mallopt(name, value)
    try:
        yield
    finally:
        for name, value in _DEFAULTS:
            libc.mallopt(name, value)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
        return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") and hasattr(libc, "gnu_get_libc_version") else None
    except OSError:  # musl
        return None
