"""Classifies rows of features with the model of this bundle: python predict.py FILE...

A FILE is a .npy array (rows, features), or a .csv of numbers, a row a line; a first line that is not numbers is taken for a header. Rows need no neighbours.
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


def preprocess(rows: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """The same steps as in training: divided by the sum of the row, where the model was trained so."""
    x: np.ndarray = np.ascontiguousarray(rows, np.float32)
    if x.shape[1] != settings["features"]:
        raise ValueError(f"its rows have {x.shape[1]} features, the model takes {settings['features']}")
    if not np.isfinite(x).all():
        raise ValueError("a feature is not a finite number")
    if settings["divide_by_sum"]:
        sums = x.sum(1, keepdims=True)
        x = x / np.where(sums == 0, 1, sums)
    given: np.ndarray = np.ascontiguousarray(x, np.float32)
    return given


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
            rows = read(path)
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
