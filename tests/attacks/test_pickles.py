"""The reader of graph pickles runs nothing, imports nothing and refuses everything but arrays, sparse matrices and lists of numbers."""

from __future__ import annotations

import collections
import os
import pickle
import pickletools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csc_matrix, csr_matrix

from edgekd.errors import DataRefused, EdgekdError, FileMissing
from edgekd.safeio.arrays import Csr
from edgekd.safeio.pickles import read_pickle


class Calls:
    """Runs `function(*arguments)` when it is unpickled by a reader that trusts."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def written(folder: Path, value: Any, protocol: int = 2) -> Path:
    path = folder / "file"
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["f4", "f8", "i4", "i8", "u1", "?", ">i4", ">f8"])
def test_arrays_are_read(tmp_path: Path, protocol: int, dtype: str) -> None:
    value = (np.arange(12).reshape(3, 4) % 5).astype(dtype)
    for given_ in (value, np.asfortranarray(value), value[:, 0].copy()):
        found = read_pickle(written(tmp_path, given_, protocol))
        assert found.dtype == given_.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found, given_)


@pytest.mark.parametrize("protocol", [2, 4])
def test_sparse_matrices_and_tables_are_read(tmp_path: Path, protocol: int) -> None:
    dense = np.array([[0, 2, 0], [0, 0, 0], [1, 0, 3]], np.float32)
    found = read_pickle(written(tmp_path, csr_matrix(dense), protocol))
    assert isinstance(found, Csr)
    np.testing.assert_array_equal(found.dense(), dense)
    table = collections.defaultdict(list, {0: [1, 2, 1], 1: [], 2: [300_000]})
    assert read_pickle(written(tmp_path, table, protocol)) == table


@pytest.mark.parametrize(
    "value",
    [
        Calls(os.system, "touch PWNED"),
        Calls(eval, "open('PWNED', 'w')"),
        Calls(exec, "open('PWNED', 'w')"),
        Calls(os.mkdir, "PWNED"),
        [Calls(os.mkdir, "PWNED")],
        {"a": Calls(os.mkdir, "PWNED")},
        {0: [Calls(os.mkdir, "PWNED")]},
        (np.zeros(2), Calls(os.mkdir, "PWNED")),
        collections.OrderedDict(a=1),
        collections.Counter("abc"),
        csc_matrix(np.eye(2)),
        np.array([None, 1], dtype=object),
        np.array(["a"]),
        np.zeros(2, dtype="c8"),
        np.zeros(2, dtype=[("a", "i4")]),
        np.datetime64("2020"),
        {0: [1.5]},
        {"a": [1]},
        {0: 1},
        [1, 2],
        "text",
        7,
        None,
        Path("/"),
    ],
    ids=lambda v: type(v).__name__,
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_everything_else_is_refused_and_nothing_runs(tmp_path: Path, value: Any, protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, value, protocol)
    with pytest.raises(DataRefused) as problem:
        read_pickle(path)
    assert problem.value.exit_code == 3
    assert "byte" in problem.value.what
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


RAW = {
    "an unknown name": b"cos\nsystem\n(S'touch PWNED'\ntR.",
    "a name through the stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x05touch\x85R.",
    "an extension": b"\x80\x02\x82\x01.",
    "a persistent id": b"Pabc\n.",
    "an instance": b"(ios\nsystem\n.",
    "an object": b"(cos\nsystem\no.",
    "a build on nothing": b"}}b.",
    "a memo that is not there": b"\x80\x02h\x05.",
    "a pop of nothing": b"\x80\x02\x85.",
    "a tuple without a mark": b"\x80\x02K\x01t.",
    "a list as dict": b"\x80\x02]K\x01K\x02s.",
    "reduce without a tuple": b"\x80\x02cnumpy\ndtype\nK\x01R.",
    "reconstruct of another class": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\x00\x85U\x01b\x87R.",
    "an array without state": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R.",
    "no stop": b"\x80\x02K\x01",
    "nothing": b"",
    "text": b"not a pickle",
    "many marks": b"(" * 20_000 + b".",
    "a key of nothing": b"\x80\x02}(K\x01u.",
}


@pytest.mark.parametrize("name", RAW)
def test_hand_made_pickles_are_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataRefused):
        read_pickle(written(tmp_path, RAW[name]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_an_array_that_claims_more_than_it_has_is_refused_without_room_being_made(tmp_path: Path) -> None:
    whole = pickle.dumps(np.zeros((2, 3), "u1"), protocol=2)
    claim = whole.replace(b"K\x02K\x03\x86", b"J" + struct.pack("<i", 2**30) + b"J" + struct.pack("<i", 2**30) + b"\x86")
    assert claim != whole
    with pytest.raises(DataRefused, match="do not fill its shape"):
        read_pickle(written(tmp_path, claim))


@pytest.mark.parametrize("change", [("indptr", [0, 9, 2, 3]), ("indices", [0, 9, 2]), ("indices", [-1, 1, 2]), ("indptr", [1, 1, 2, 3])])
def test_a_sparse_matrix_whose_arrays_do_not_fit_is_refused(tmp_path: Path, change: tuple[str, list[int]]) -> None:
    matrix = csr_matrix(np.eye(3))
    getattr(matrix, change[0])[:] = change[1]
    with pytest.raises(DataRefused, match="do not fit each other"):
        read_pickle(written(tmp_path, matrix))


def test_a_file_that_is_not_there_or_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileMissing):
        read_pickle(tmp_path / "none")
    monkeypatch.setattr("edgekd.safeio.pickles.MAX_BYTES", 10)
    with pytest.raises(DataRefused, match="too large"):
        read_pickle(written(tmp_path, np.zeros(9)))


@settings(max_examples=300, deadline=None)
@given(drawn=st.data())
def test_damage_is_refused_or_read_never_anything_else(drawn: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Bytes changed anywhere, and cut anywhere."""
    good = pickle.dumps(csr_matrix(np.eye(4, dtype="f4")), protocol=2)
    broken = bytearray(good[: drawn.draw(st.integers(0, len(good)))])
    for _ in range(drawn.draw(st.integers(0, 3))):
        if broken:
            broken[drawn.draw(st.integers(0, len(broken) - 1))] = drawn.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damage") / "file"
    path.write_bytes(bytes(broken))
    try:
        found = read_pickle(path)
    except EdgekdError:
        return
    assert isinstance(found, Csr | np.ndarray | dict)


def test_the_opcodes_that_can_do_harm_are_not_among_those_that_are_known() -> None:
    from edgekd.safeio import pickles

    known = pickles._PUSHES | pickles._CONSTANTS.keys() | pickles._ACTIONS.keys()
    assert known <= {op.name for op in pickletools.opcodes}
    assert not known & {"INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "NEWOBJ_EX", "NEXT_BUFFER", "READONLY_BUFFER"}
