"""Hostile checkpoints: none runs code, none crashes edgekd, each is CheckpointRefused (T4).

Run as a program, this file is a laboratory: it loads torch once and forks one confined process per file of a folder.
"""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from edgekd.errors import CheckpointRefused
from edgekd.safeio import _child
from edgekd.safeio.checkpoint import import_checkpoint, load_weights

REPOSITORY = Path(__file__).parents[2]
MARKER = "pwned"


# ------------------------------------------------------------------------------------------------------- the laboratory
def laboratory(folder: Path) -> dict[str, list[Any]]:
    torch.set_num_threads(1)
    return {path.name: _confined(path, folder / f"out-{path.name}") for path in sorted(folder.glob("*.pt"))}


def _confined(path: Path, out: Path) -> list[Any]:
    out.mkdir()
    if pid := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        outcome = _child._outcome(out, code)
        return [outcome.started, outcome.problem, (out / "weights.safetensors").exists()]
    try:
        _child.serve("checkpoint", path, out)
    finally:
        os._exit(3)


# ---------------------------------------------------------------------------------------------------- writing by opcode
def text(s: str) -> bytes:
    return b"X" + struct.pack("<I", len(s.encode())) + s.encode()


def call(module: str, name: str, *args: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(args) + b"tR"


def pickled(body: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


def in_dict(*values: bytes) -> bytes:
    return b"}(" + b"".join(text(f"w{n}") + v for n, v in enumerate(values)) + b"u"


def zipped(body: bytes, storages: dict[str, bytes] | None = None, **more: bytes) -> bytes:
    """A file such as torch.save writes, with a data.pkl of ours."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("a/data.pkl", pickled(body))
        z.writestr("a/version", "3\n")
        z.writestr("a/byteorder", "little")
        for name, data in (storages or {}).items():
            z.writestr(f"a/data/{name}", data)
        for name, data in more.items():
            z.writestr(f"a/{name}", data)
    return out.getvalue()


def storage(numel: int, key: str = "0") -> bytes:
    return b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(numel) + b"tQ"


def number(n: int) -> bytes:
    data = n.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tensor(numel: int, offset: int, size: list[int], stride: list[int]) -> bytes:
    """A tensor over storage 0 of four floats, with sizes of ours."""
    dims = [b"(" + b"".join(map(number, dims)) + b"t" for dims in (size, stride)]
    return call("torch._utils", "_rebuild_tensor_v2", storage(numel), number(offset), *dims, b"\x89", b"ccollections\nOrderedDict\n)R")


FOUR = {"0": b"\x00" * 16}


def code_runners(marker: Path) -> dict[str, bytes]:
    touch, python = text(f"touch {marker}"), text(f"open({str(marker)!r}, 'w')")
    system = call("posix", "system", touch)
    instance = b"ccollections\nOrderedDict\n)R"
    return {
        "reduce_system": pickled(system),
        "reduce_in_zip": zipped(in_dict(system)),
        "reduce_in_nest": zipped(b"}" + text("state_dict") + in_dict(system) + b"s"),
        "os_system": zipped(call("os", "system", touch)),
        "eval": zipped(call("builtins", "eval", python)),
        "exec_stack_global": zipped(text("builtins") + text("exec") + b"\x93(" + python + b"tR"),
        "getattr": zipped(call("builtins", "getattr", call("builtins", "__import__", text("os")), text("system"))),
        "popen": zipped(call("subprocess", "Popen", touch)),
        "inst": zipped(b"(" + touch + b"iposix\nsystem\n"),
        "obj": zipped(b"(cposix\nsystem\n" + touch + b"o"),
        "newobj": zipped(b"csubprocess\nPopen\n(" + touch + b"t\x81"),
        "newobj_ex": zipped(b"csubprocess\nPopen\n(" + touch + b"t}\x92"),
        "build_state": zipped(instance + b"}" + text("__reduce__") + system + b"sb"),
        "extension_registry": zipped(b"\x82\x01(" + touch + b"tR"),
        "torch_load": zipped(call("torch.serialization", "load", text(str(marker)))),
        "torch_hub": zipped(call("torch.hub", "load", text("evil/repository"), text("model"))),
        "torch_ops": zipped(call("torch._C", "_jit_set_profiling_mode", b"\x88")),
        "numpy_objects": zipped(call("numpy.core.multiarray", "_reconstruct", b"cnumpy\nndarray\n", b"(K\x00t", text("O"))),
        "storage_type": zipped(in_dict(b"(" + text("storage") + b"cposix\nsystem\n" + text("0") + text("cpu") + b"K\x04tQ"), FOUR),
        "persistent_id_text": zipped(b"Pposix.system\n"),
        "second_pickle_after_the_first": pickled(b"}") + pickled(system),
        "script_archive": zipped(system, **{"constants.pkl": pickled(b"(t"), "code/m.py": b"import os"}),
    }


def liars() -> dict[str, bytes]:
    good = tensor(4, 0, [2, 2], [2, 1])
    whole = zipped(in_dict(good), FOUR)
    return {
        "storage_too_large": zipped(in_dict(tensor(2**40, 0, [4], [1])), FOUR),
        "storage_overflow": zipped(in_dict(tensor(2**62, 0, [4], [1])), FOUR),
        "storage_negative": zipped(in_dict(tensor(-4, 0, [4], [1])), FOUR),
        "storage_absent": zipped(in_dict(good)),
        "size_beyond_storage": zipped(in_dict(tensor(4, 0, [2**20], [1])), FOUR),
        "offset_beyond_storage": zipped(in_dict(tensor(4, 2**40, [4], [1])), FOUR),
        "offset_negative": zipped(in_dict(tensor(4, -4, [4], [1])), FOUR),
        "stride_beyond_storage": zipped(in_dict(tensor(4, 0, [2, 2], [2**40, 1])), FOUR),
        "stride_negative": zipped(in_dict(tensor(4, 3, [4], [-1])), FOUR),
        "expanded_to_a_terabyte": zipped(in_dict(tensor(4, 0, [2**38], [0])), FOUR),
        "setitems_on_a_tensor": zipped(good + b"(K\x00K\x01u", FOUR),
        "setitem_far_outside_a_tensor": zipped(good + number(2**40) + b"K\x01s", FOUR),
        "deep_nesting": zipped(b"]" * 200_000 + b"a" * 199_999),
        "long_number": zipped(b"\x8b" + struct.pack("<i", 2**31 - 1)),
        "empty_stack": zipped(b"R"),
        "memo_of_nothing": zipped(b"h\x07"),
        "truncated": whole[: len(whole) // 2],
        "headless": whole[20:],
        "zip_in_zip": zipped(b"}", None, **{"data.pkl.zip": whole}),
        "empty": b"",
        "junk": b"not a model" * 99,
        "zeros": b"\x00" * 4096,
    }


def test_no_hostile_checkpoint_runs_code_or_is_taken(tmp_path: Path) -> None:
    hostile = code_runners(tmp_path / MARKER) | liars()
    assert len(hostile) >= 40
    for name, data in hostile.items():
        (tmp_path / f"{name}.pt").write_bytes(data)
    (tmp_path / "sound.pt").write_bytes(zipped(in_dict(tensor(4, 0, [2, 2], [2, 1])), FOUR))
    p = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    answers = json.loads(p.stdout)
    assert answers.pop("sound.pt") == [True, None, True], "the laboratory refuses everything, so it says nothing"
    taken = {name: answer for name, answer in answers.items() if not answer[0] or answer[1] is None}
    assert answers.keys() == {f"{name}.pt" for name in hostile}
    assert taken == {}
    assert not (tmp_path / MARKER).exists()


def test_a_hostile_pickle_is_refused_with_the_code_that_it_names(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    path.write_bytes(code_runners(tmp_path / MARKER)["reduce_in_nest"])
    with pytest.raises(CheckpointRefused, match=r"evil\.pt: it refers to code \(posix\.system\), which was not run") as caught:
        load_weights(path)
    assert caught.value.exit_code == 3
    assert "weights_only" not in str(caught.value) + str(caught.value.hint), "torch's advice to switch protection off must not be passed on"
    assert not (tmp_path / MARKER).exists()


def test_a_reader_that_crashes_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash = tmp_path / "crash.py"
    crash.write_text("import os, sys, pathlib\n(pathlib.Path(sys.argv[3]) / 'ready').touch()\nos.abort()\n")
    monkeypatch.setattr(_child, "__file__", str(crash))
    path = tmp_path / "w.pt"
    path.write_bytes(b"x")
    with pytest.raises(CheckpointRefused, match=r"w\.pt: reading it crashed or ran out of its limits \(SIGABRT\)"):
        import_checkpoint(path)


SPY = """import sys, os, json, pathlib
folder = pathlib.Path(sys.argv[3])
(folder / 'ready').touch()
opened = [f for f in os.listdir('/proc/self/fd') if int(f) > 2][:-1]  # the last one lists the folder
seen = {'env': sorted(os.environ), 'open': opened, 'flags': sys.flags.isolated}
(folder / 'reply.json').write_text(json.dumps({'value': seen, 'problem': None, 'expected': None}))
"""


def test_the_reader_has_no_environment_no_files_and_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = tmp_path / "spy.py"
    spy.write_text(SPY)
    monkeypatch.setattr(_child, "__file__", str(spy))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    out = tmp_path / "out"
    out.mkdir()
    with (tmp_path / "held").open("w") as held:
        os.set_inheritable(held.fileno(), True)
        seen = _child.run_confined("checkpoint", tmp_path / "none", out).value
    assert set(seen["env"]) <= {"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TMPDIR", "HOME", "LC_CTYPE"}
    assert (seen["open"], seen["flags"]) == ([], 1)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(laboratory(Path(sys.argv[1]))))
