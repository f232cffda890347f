"""Faults of the store: the n-th file operation fails or kills the process, for n = 1, 2, ... until the run succeeds (G1); races (G7).

Run as a program, this file is a laboratory that forks a child per injected fault; without torch and pytest a fork costs milliseconds.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgekd.artifact import MANIFEST, Kind, digest_of
from edgekd.errors import ResourceError
from edgekd.store import Store

REPOSITORY = Path(__file__).parents[2]
KEYS = [digest_of(n) for n in range(4)]
MODES = ("ENOSPC", "EIO", "KILL")
FAST = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # hundreds of stores, each with its fsyncs


# ------------------------------------------------------------------------------------------------------- the laboratory
class Fault:
    """Counts file operations; the n-th fails with an errno or kills the process."""

    def __init__(self, mode: str, at: int):
        self.mode, self.at, self.count = mode, at, 0

    def arm(self) -> None:
        for module, name in [
            *((os, n) for n in ("open", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "utime")),
            (fcntl, "flock"),
        ]:
            setattr(module, name, self._wrapped(getattr(module, name)))
        io.open = self._wrapped(io.open, self._writer)  # what Path.open calls

    def _wrapped(self, function: Callable[..., Any], then: Callable[[Any], Any] = lambda x: x) -> Callable[..., Any]:
        def call(*args: Any, **kw: Any) -> Any:
            self._hit()
            return then(function(*args, **kw))

        return call

    def _writer(self, file: Any) -> Any:
        if not file.writable():
            return file
        fault = self

        class Writer:
            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def write(self, data: Any) -> Any:
                half = data[: len(data) // 2]
                file.write(half)
                file.flush()  # a failed write may leave the first half on disk
                fault._hit()
                return len(half) + file.write(data[len(half) :])

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

        return Writer()

    def _hit(self) -> None:
        self.count += 1
        if self.count == self.at:
            if self.mode == "KILL":
                os.kill(os.getpid(), signal.SIGKILL)
            code = getattr(errno, self.mode)
            raise OSError(code, os.strerror(code))


def build(folder: Path) -> dict[str, Any]:
    for part in range(2):
        with (folder / f"part{part}").open("wb") as f:
            f.write(b"x" * 1000)
    (folder / "sub").mkdir()
    (folder / "sub" / "note").write_text("hello")
    return {"seconds": 1.0}


def put(store: Store) -> None:
    def build_with_checkpoint(folder: Path) -> dict[str, Any]:
        (store.work(KEYS[0]) / "checkpoint").write_text("step 1")
        return build(folder)

    store.put(KEYS[0], Kind.MODEL, build_with_checkpoint)


def gc(store: Store) -> None:
    store.gc(older_than_days=30)


def nothing(_: Path) -> None:
    """put starts from an empty store."""


def rubbish(root: Path) -> None:
    """gc starts from an old entry, a fresh one, a quarantined one, dead scratch and stale work."""
    for key in KEYS[:3]:
        Store(root).put(key, Kind.MODEL, build)
    entry = root / "v1" / KEYS[0][:2] / KEYS[0]
    os.utime(entry / MANIFEST, (1000, 1000))
    (root / "v1" / KEYS[2][:2] / KEYS[2] / "part0").write_text("damaged")
    Store(root).get(KEYS[2])
    for name in (f"tmp/{KEYS[3]}.00000000", f"work/{KEYS[1]}"):
        (root / name / "below").mkdir(parents=True)
        (root / name / "below" / "file").write_text("x")


def forked(action: Callable[[], Any]) -> int:
    """Exit status of `action` in a child: 0 done, 6 clean refusal, 1 anything else, -9 killed."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        action()
        code = 0
    except ResourceError:
        code = 6
    finally:
        os._exit(code)


def inject(mode: str, at: int, prepare: Callable[[Path], None], act: Callable[[Store], None], root: Path) -> int:
    prepare(root)

    def run() -> None:
        fault = Fault(mode, at)
        fault.arm()
        act(Store(root))
        if fault.count < at:
            os._exit(42)  # the run has fewer operations than `at`: every point was tried

    return forked(run)


def laboratory(what: str) -> dict[str, dict[str, int]]:
    prepare, act = {"put": (nothing, put), "gc": (rubbish, gc)}[what]
    return {mode: _every_point(mode, prepare, act) for mode in MODES}


def _every_point(mode: str, prepare: Callable[[Path], None], act: Callable[[Store], None]) -> dict[str, int]:
    seen = dict.fromkeys(("points", "torn", "leaked", "recovered", "unclean"), 0)
    at = 1
    while True:
        with tempfile.TemporaryDirectory(dir=FAST) as folder:
            root = Path(folder) / "home"
            code = inject(mode, at, prepare, act, root)
            if code == 42:
                return seen
            seen["points"] += 1
            seen["unclean"] += code not in ((-9,) if mode == "KILL" else (0, 6))  # 0: an operation that may fail, such as touching a time
            _judge(root, act, seen)
        at += 1


def _judge(root: Path, act: Callable[[Store], None], seen: dict[str, int]) -> None:
    seen["torn"] += len(Store(root).verify())
    recovered = forked(lambda: act(Store(root))) == 0
    Store(root).gc(older_than_days=30)
    leaked = [p for name in ("tmp", "work", "quarantine", "locks") for p in (root / name).iterdir()]
    seen["leaked"] += len(leaked)
    kept = {manifest.key for manifest, *_ in Store(root).entries()}
    seen["recovered"] += recovered and kept == ({KEYS[0]} if act is put else {KEYS[1]})


# ------------------------------------------------------------------------------------------------------------ the races
def racer(root: str, key: str) -> str:
    time.sleep(random.random() * 0.01)
    return "hit" if Store(Path(root)).put(key, Kind.MODEL, build).cached else "built"


def race(root: Path, key: str, n: int) -> list[str]:
    pipes = []
    for _ in range(n):
        read, write = os.pipe()
        if os.fork() == 0:
            os.write(write, racer(str(root), key).encode())
            os._exit(0)
        os.close(write)
        pipes.append(read)
    answers = [os.read(pipe, 10).decode() for pipe in pipes]
    for _ in range(n):
        os.wait()
    return answers


def races() -> list[list[str]]:
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        return [race(Path(folder) / "home", digest_of(n), 8) for n in range(5)]


def killed_holder() -> bool:
    """A build is killed while it holds the lock of its key; the next one starts without waiting for a time limit."""
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        root = Path(folder) / "home"
        code = forked(lambda: Store(root).put(KEYS[0], Kind.MODEL, lambda _: os.kill(os.getpid(), signal.SIGKILL)))
        os.environ["EDGEKD_LOCK_TIMEOUT"] = "0"
        return code == -9 and not Store(root).put(KEYS[0], Kind.MODEL, build).cached


def gc_during_reads() -> int:
    """Readers verify an entry again and again while gc wants everything gone; the number of readers that lost it."""
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        root = Path(folder) / "home"
        Store(root).put(KEYS[0], Kind.MODEL, build)
        ready, go = os.pipe()

        def read() -> None:
            store = Store(root)
            found = store.get(KEYS[0])
            os.write(go, b"r")
            for _ in range(100):
                if found is None or not (found.path / "part0").is_file() or store.get(KEYS[0]) is None:
                    os._exit(1)

        pids = []
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                read()
                os._exit(0)
            pids.append(pid)
        for _ in pids:
            os.read(ready, 1)
        for _ in range(30):
            Store(root).gc(max_bytes=0)
        return sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)


EXPERIMENTS: dict[str, Callable[[], Any]] = {
    "put": lambda: laboratory("put"),
    "gc": lambda: laboratory("gc"),
    "races": races,
    "killed_holder": killed_holder,
    "gc_during_reads": gc_during_reads,
}


def experiment(name: str) -> Any:
    p = subprocess.run(
        [sys.executable, __file__, name],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    if p.returncode:
        raise RuntimeError(p.stderr)
    return json.loads(p.stdout)


# ------------------------------------------------------------------------------------------------------------ the tests
def check_laboratory(name: str, least_points: int) -> None:
    for mode, seen in experiment(name).items():
        assert seen["points"] >= least_points, (mode, seen)
        assert (seen["torn"], seen["leaked"], seen["unclean"]) == (0, 0, 0), (mode, seen)
        assert seen["recovered"] == seen["points"], (mode, seen)


def test_put_survives_a_fault_at_every_file_operation() -> None:
    check_laboratory("put", 40)


def test_gc_survives_a_fault_at_every_file_operation() -> None:
    check_laboratory("gc", 30)


def test_eight_racers_build_once_and_the_others_hit() -> None:
    for answers in experiment("races"):
        assert sorted(answers) == ["built"] + ["hit"] * 7


def test_a_killed_lock_holder_frees_its_key_at_once() -> None:
    assert experiment("killed_holder") is True


def test_gc_during_reads_takes_nothing_from_a_reader() -> None:
    assert experiment("gc_during_reads") == 0


if __name__ == "__main__":
    sys.stdout.write(json.dumps(EXPERIMENTS[sys.argv[1]]()))
