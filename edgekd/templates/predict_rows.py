"""Classifies rows of features with the model of this bundle: python predict.py FILE...

A FILE is a .npy array (rows, features), or a .csv of numbers, a row a line; a first line that is not numbers is taken for a header. Rows need no neighbours,
unless the model was trained with positions (there is a positions.npz here): then FILE.near says of each row, a line a row, the name of its node, or those of its
neighbours between tabs; what is known of them is averaged. Rows that end with their position need no such file.
Needs Python 3.8 or newer, onnxruntime and numpy; nothing of edgekd. Prints a line a row: its number, label, probability.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

HERE = Path(__file__).resolve().parent
BATCH = 4096


def read(path: Path) -> np.ndarray:
    """(rows, features) of numbers."""
    found: np.ndarray
    if path.suffix == ".npy":
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    else:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        rows = [line.split(",") for line in lines if line.strip()]
        if rows and not is_number(rows[0][0]):
            rows = rows[1:]
        if len({len(row) for row in rows}) > 1:
            raise ValueError("its rows have different numbers of fields")
        found = np.array([[float(value) for value in row] for row in rows], np.float32)
    if found.ndim == 1 and found.size:
        found = found[None]
    if found.ndim != 2 or found.dtype.kind not in "fiub":
        raise ValueError(f"it holds {found.dtype} {found.shape}, not rows of numbers")
    return found


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def near(path: Path, rows: int, size: int) -> np.ndarray:
    """(rows, size) mean positions of the nodes that each line names; 0 where none of them is known."""
    beside = path.with_name(path.name + ".near")
    if not beside.is_file():
        raise ValueError(f"its rows have no positions: name their nodes, or the neighbours of new ones, in {beside.name}, a line a row")
    lines = beside.read_text(encoding="utf-8-sig").splitlines()
    if len(lines) != rows:
        raise ValueError(f"{beside.name} has {len(lines)} lines for {rows} rows")
    with np.load(HERE / "positions.npz", allow_pickle=False) as known:
        table, place = known["positions"], {name: i for i, name in enumerate(known["ids"].tolist())}
    found = np.zeros((rows, size), np.float32)
    for row, line in enumerate(lines):
        at = [place[name] for name in line.split("\t") if name in place]
        if at:
            found[row] = table[at].mean(0)
    return found


def preprocess(rows: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """The same steps as in training: features divided by their sum, where the model was trained so; positions stay."""
    x: np.ndarray = np.array(rows, np.float32)
    if x.shape[1] != settings["features"]:
        raise ValueError(f"its rows have {x.shape[1]} features, the model takes {settings['features']}")
    if not np.isfinite(x).all():
        raise ValueError("a feature is not a finite number")
    if settings["divide_by_sum"]:
        own = x[:, : settings["features"] - settings.get("positions", 0)]
        sums = own.sum(1, keepdims=True)
        own /= np.where(sums == 0, 1, sums)
    return x


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(1, keepdims=True))
    shares: np.ndarray = e / e.sum(1, keepdims=True)
    return shares


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    bundle = json.loads((HERE / "bundle.json").read_text(encoding="utf-8"))
    if bundle["postprocess"]["kind"] != "softmax":
        sys.exit("write this task's own post-processing here: " + json.dumps(bundle["postprocess"], sort_keys=True))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = bundle["threads"]
    session = onnxruntime.InferenceSession(str(HERE / bundle["model_file"]), options, providers=["CPUExecutionProvider"])
    size, failed = bundle["fixed_batch"] or BATCH, False
    for path in map(Path, sys.argv[1:]):
        try:
            rows, places = read(path), bundle["preprocess"].get("positions", 0)
            if places and rows.shape[1] == bundle["preprocess"]["features"] - places:
                rows = np.concatenate([rows, near(path, len(rows), places)], axis=1)
            for start in range(0, len(rows), size):
                x = preprocess(rows[start : start + size], bundle["preprocess"])
                given = x if not bundle["fixed_batch"] else np.resize(x, (size, x.shape[1]))
                shares = softmax(session.run(None, {bundle["input"]: given})[0][: len(x)].astype(np.float64))
                for row, share in enumerate(shares, start):
                    best = int(share.argmax())
                    print(f"{row}\t{bundle['labels'][best]}\t{share[best]:.4f}")
        except (OSError, ValueError) as error:
            failed = True
            print(f"{path}: cannot be used: {error}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
