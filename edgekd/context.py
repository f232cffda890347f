"""What every stage is given beside its inputs: seed, store, console, threads, the stop flag and decisions to replay."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import INTERRUPTED, TERMINATED, Interrupted

if TYPE_CHECKING:
    from types import FrameType

    from edgekd.console import Console
    from edgekd.store import Store
    from edgekd.train.ranks import Ranks


class Stop:
    """The stop flag. The training loop finishes its step and checkpoints; everything else is interrupted at once, its scratch discarded."""

    def __init__(self) -> None:
        self.code: int | None = None
        self._deferred = 0

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal only sets the flag; the caller polls `check`."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1

    def check(self) -> None:
        """Raises Interrupted when a signal has come."""
        if self.code is not None:
            raise Interrupted("interrupted" if self.code == INTERRUPTED else "terminated", exit_code=self.code)

    def handle(self, number: int, _frame: FrameType | None) -> None:
        if self.code is not None:  # a second signal: at once; what is in scratch is collected later
            os._exit(self.code)
        self.code = INTERRUPTED if number == signal.SIGINT else TERMINATED
        if not self._deferred:
            self.check()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handles SIGINT and SIGTERM inside; only from the main thread."""
        old = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def usable_cores() -> int:
    """Cores that this process may use: fewer than the machine's in a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Context:
    """Passed to every stage."""

    store: Store
    console: Console
    seed: int = 0
    threads: int = field(default_factory=usable_cores)  # of training and evaluation; measuring has its own
    stop: Stop = field(default_factory=Stop)
    replay: dict[str, Any] = field(default_factory=dict)  # step name -> decision, from an earlier run
    work: Path = Path()  # where an unfinished step keeps its checkpoints; set by `execute`
    data_root: Path | None = None  # read only where decoded pixels are not kept
    data_workers: int = 2
    allow_download: bool = False
    ranks: Ranks | None = None  # in a step that several processes under torchrun take together
