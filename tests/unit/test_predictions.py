"""Files of predictions from outside: what is read, and every way to be refused."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.errors import FileMissing, PredictionsRefused
from edgekd.safeio.arrays import write_arrays
from edgekd.safeio.predictions import read_predictions

IDS = np.array(["a/1.png", "b/2.png"])
VALUES = np.array([[0.5, -1.0, 2.0], [3.0, 0.25, -4.0]], np.float32)


def npz(path: Path, **arrays: Any) -> Path:
    write_arrays(path / "p.npz", {"ids": IDS, "logits": VALUES} | arrays)
    return path / "p.npz"


def text(path: Path, *lines: str) -> Path:
    (path / "p.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path / "p.csv"


def test_both_kinds_of_files_say_the_same(tmp_path: Path) -> None:
    rows = [",".join([str(i), *map(str, v)]) for i, v in zip(IDS, VALUES.tolist(), strict=True)]
    first = read_predictions(npz(tmp_path, classes=np.array(["x", "y", "z"])))
    second = read_predictions(text(tmp_path, "id,x,y,z", *rows))
    for found in (first, second):
        assert (found.ids, found.names) == (tuple(IDS.tolist()), ("x", "y", "z"))
        assert np.array_equal(found.values, VALUES)
    assert (first.kind, second.kind) == ("logits", "")


@pytest.mark.parametrize("kind", ["<f2", "<f8", ">f4"])
def test_floats_of_any_width_and_order_are_read(kind: str, tmp_path: Path) -> None:
    assert np.array_equal(read_predictions(npz(tmp_path, logits=np.asfortranarray(VALUES.astype(kind)))).values, VALUES)


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return Path.write_text, (tmp_path / "ran", "code")

    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.array([Attack(), None], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "p.npz", "w") as archive:
        archive.writestr("ids.npy", buffer.getvalue())
    with pytest.raises(PredictionsRefused, match="holds pickled objects, which could run code; nothing of it was read"):
        read_predictions(tmp_path / "p.npz")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "q.npz").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(PredictionsRefused, match=r"not an \.npz file"):
        read_predictions(tmp_path / "q.npz")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("arrays", "what"),
    [
        ({"ids": np.array(["a", "a"])}, "1 ids come twice, the first 'a'"),
        ({"logits": np.array([[1.0, np.nan, 0], [np.inf, 0, 0]])}, "the predictions of 2 images are not finite, the first 'a/1.png'"),
        ({"logits": np.array([[1e300, 0, 0], [0, 0, 0]])}, "the predictions of 1 images are not finite"),
        ({"probabilities": VALUES}, "it holds ids, logits, probabilities"),
        ({"labels": IDS}, "it holds ids, labels, logits"),
        ({"logits": VALUES[:1]}, "its arrays do not fit"),
        ({"logits": VALUES.astype(np.int64)}, "its arrays do not fit"),
        ({"ids": np.array([1, 2])}, "its arrays do not fit"),
        ({"classes": IDS.reshape(1, 2)}, "its arrays do not fit"),
    ],
)
def test_arrays_that_are_no_predictions_are_refused(arrays: dict[str, Any], what: str, tmp_path: Path) -> None:
    with pytest.raises(PredictionsRefused, match=what):
        read_predictions(npz(tmp_path, **arrays))


def test_a_header_that_claims_more_than_there_is_takes_no_memory(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 1000)})
    with zipfile.ZipFile(tmp_path / "p.npz", "w") as archive:
        archive.writestr("logits.npy", buffer.getvalue() + b"1234")
    with pytest.raises(PredictionsRefused, match="it is damaged"):
        read_predictions(tmp_path / "p.npz")


def test_a_file_cut_or_changed_anywhere_is_refused_or_read_and_never_crashes(tmp_path: Path) -> None:
    data = npz(tmp_path).read_bytes()
    refused = 0
    for at in range(len(data)):
        for damaged in (data[:at], data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :]):
            (tmp_path / "d.npz").write_bytes(damaged)
            try:
                read_predictions(tmp_path / "d.npz")
            except PredictionsRefused:
                refused += 1
    assert refused > len(data)  # every cut, and most changes


@pytest.mark.parametrize(
    ("lines", "what", "where"),
    [
        (["image,x", "a,1"], "its header is 'image,x'", "p.csv:1"),
        (["id", "a"], "its header is 'id'", "p.csv:1"),
        (["id,x,y", "a,1"], "the row has 2 fields", "p.csv:2"),
        (["id,x", "a,1", "b,one"], "the row cannot be read", "p.csv:3"),
        (["id,x", 'a,"1'], "the row cannot be read", "p.csv:"),
        (["id,x"], "it has no rows", "p.csv"),
        (["id,x", "a,nan"], "the predictions of 1 images are not finite, the first 'a'", "p.csv"),
    ],
)
def test_a_list_that_is_no_prediction_is_refused_with_its_line(lines: list[str], what: str, where: str, tmp_path: Path) -> None:
    with pytest.raises(PredictionsRefused) as caught:
        read_predictions(text(tmp_path, *lines))
    assert (what in caught.value.what, where in str(caught.value.where)) == (True, True), caught.value


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.pkl").write_bytes(b"")
    with pytest.raises(PredictionsRefused, match=r"files named \*\.pkl are not read"):
        read_predictions(tmp_path / "p.pkl")
    with pytest.raises(FileMissing):
        read_predictions(tmp_path / "p.npz")
