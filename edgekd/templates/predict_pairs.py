"""Says how likely two nodes are to be linked, with the model of this bundle: python predict.py FIRST SECOND

FIRST and SECOND are .npy arrays (rows, features), or .csv files of numbers, a row a line; a first line that is not numbers is taken for a header. Row by row, they
are the two nodes of a pair. Needs Python 3.8 or newer, onnxruntime and numpy; nothing of edgekd. Prints a line a pair: its number, label, probability of a link.
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
    if 2 * x.shape[1] != settings["features"]:
        raise ValueError(f"its rows have {x.shape[1]} features, the model takes {settings['features'] // 2} of each node")
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
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    bundle = json.loads((HERE / "bundle.json").read_text(encoding="utf-8"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = bundle["threads"]
    session = onnxruntime.InferenceSession(str(HERE / bundle["model_file"]), options, providers=["CPUExecutionProvider"])
    size, sides = bundle["fixed_batch"] or BATCH, []
    for path in map(Path, sys.argv[1:]):
        try:
            sides.append(preprocess(read(path), bundle["preprocess"]))
        except (OSError, ValueError) as error:
            sys.exit(f"{path}: cannot be used: {error}")
    if len(sides[0]) != len(sides[1]):
        sys.exit(f"{sys.argv[1]} has {len(sides[0])} rows, {sys.argv[2]} {len(sides[1])}: a pair is a row of each")
    pairs = np.concatenate(sides, axis=1)
    for start in range(0, len(pairs), size):
        x = pairs[start : start + size]
        given = x if not bundle["fixed_batch"] else np.resize(x, (size, x.shape[1]))
        shares = softmax(session.run(None, {bundle["input"]: given})[0][: len(x)].astype(np.float64))
        for row, share in enumerate(shares, start):
            print(f"{row}\t{bundle['labels'][int(share.argmax())]}\t{share[1]:.4f}")


if __name__ == "__main__":
    main()
