"""What TensorRT calls while it works: a logger, a watcher of builds, a profiler of layers. Nothing is raised out of them into its C++."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

_NO_DRIVER = re.compile(r"cudaError 35|insufficient for CUDA runtime")
_NOISE = re.compile(rf"catchCudaError|{_NO_DRIVER.pattern}|--- (Begin|End) node ---|^Node name:")
_PLACES = re.compile(r"\.?\s*In \w+ at /_src\S+|^.*?Error Code \d+: |^API Usage Error \(|\[\w+\.cpp:[^\]]*\]\s*")
_KEPT = 100  # messages: a session may live for hours


@contextmanager
def stdout_for_data() -> Iterator[None]:
    """Keeps what the builder's C++ prints past its logger off this process's stdout, which a program may be reading."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        libc.fflush(None)  # what C still holds would come out behind the return
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


@cache
def log_of(trt: Any) -> Any:
    """The one logger of a runtime in this process, which keeps errors: TensorRT warns that it ignores any other while a builder or an engine lives."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=_KEPT)
            self.no_driver = False

        def clear(self) -> Any:
            self.errors.clear()
            self.no_driver = False
            return self

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.no_driver = self.no_driver or _NO_DRIVER.search(message) is not None
                if not _NOISE.search(message):
                    self.errors.append(message)

        def said(self, otherwise: str) -> str:
            """The last error in a person's words."""
            return next((r for e in reversed(self.errors) if (r := first_reason(e))), otherwise)

    return Log()


def first_reason(text: str) -> str:
    """The first line that says something to a person, without source places."""
    lines = [line for line in text.splitlines() if line.strip() and not _NOISE.search(line)]
    told = [_PLACES.sub("", _PLACES.sub("", line)).strip() for line in lines]  # twice: what stands first hides what follows
    return next((t for t in reversed(told) if t and not t.startswith("Invalid Node -")), told[0] if told else "")[:300]


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Progress:
    """How far a build is, 0 to 1: a phase fills one step of the phase that it belongs to. Never goes back."""

    def __init__(self) -> None:
        self.share = 0.0
        self._phases: dict[str, _Phase] = {}

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        self._phases[phase] = _Phase(parent, max(1, steps))

    def step(self, phase: str, number: int) -> float:
        """The share after step `number` of a phase."""
        if phase in self._phases:
            self._phases[phase].done = number + 1
        inner, name, seen = 0.0, phase, set[str]()
        while name in self._phases and name not in seen:
            seen.add(name)
            at = self._phases[name]
            inner, name = min(1.0, (at.done + inner) / at.steps), at.parent or ""
        self.share = max(self.share, inner)
        return self.share


def monitor_of(trt: Any, told: Callable[[float, str], None] | None) -> Any:
    """Tells how far a build is, and ends it at its next step once `stopped` is set."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped, self._progress = False, Progress()

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._progress.start(phase, parent, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            if told is not None:
                with suppress(Exception):  # a bar that cannot be drawn ends no build
                    told(self._progress.step(phase, step), phase)
            return not self.stopped

        def phase_finish(self, phase: str) -> None: ...

    return Monitor()


def profiler_of(trt: Any) -> Any:
    """Keeps the milliseconds of every layer of every run, by name."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.ms: dict[str, list[float]] = defaultdict(list)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.ms[layer_name].append(ms)

    return Profiler()
