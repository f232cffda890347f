"""Small graphs in every layout, for tests."""

from __future__ import annotations

import io
import pickle  # the tests write what the reader must read, and what it must refuse
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from edgekd.data.nodes import Nodes, build
from edgekd.data.nodes_config import NodesConfig
from edgekd.graph._distiller import Teaching


def save_planetoid(folder: Path, *, nodes: int = 40, test: int = 10, lost: int = 0, seed: int = 0) -> dict[str, Any]:
    """A Planetoid data set `toy`: two classes, six features; `lost` ids of the test range are in no file. Returns what it holds, by node."""
    rng = np.random.default_rng(seed)
    total, known = nodes + lost, nodes - test
    order = known + rng.permutation(test + lost)[:test]
    x = (rng.random((total, 6)) < np.where(np.arange(6) // 3 == np.arange(total)[:, None] % 2, 0.9, 0.1)).astype(np.float32)
    y = np.eye(2)[np.arange(total) % 2]
    table = {i: [int(j) for j in {(i + 2) % total, (i - 2) % total, (i + 2 * int(rng.integers(total // 2))) % total}] for i in range(total)}
    parts = {"x": csr_matrix(x[:4]), "allx": csr_matrix(x[:known]), "tx": csr_matrix(x[order])}
    parts |= {"y": y[:4], "ally": y[:known], "ty": y[order], "graph": table}
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in parts.items():
        (folder / f"ind.toy.{name}").write_bytes(pickle.dumps(value, protocol=2))
    (folder / "ind.toy.test.index").write_text("".join(f"{i}\n" for i in order))
    return {"x": x, "y": y.argmax(1), "test": order, "known": known, "total": total, "table": table}


def opened(folder: Path, **settings: Any) -> Nodes:
    """A graph, built into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build(NodesConfig(**settings), 0, folder)
    return Nodes.open(folder)


def save_npz(path: Path, **arrays: Any) -> Path:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    path.write_bytes(buffer.getvalue())
    return path


def taught(logits: Tensor, *, student_width: int = 8, seed: int = 5) -> Teaching:
    """Everything that a method may want of a teacher with these logits, made up."""
    draw = torch.Generator().manual_seed(seed)
    hidden, nearness, codebook = (
        torch.randn(*shape, generator=draw, dtype=torch.float64).to(logits.dtype) for shape in ((len(logits), 5), (len(logits), 6), (6, 4))
    )
    noisy = torch.linspace(0, 1, len(logits), dtype=logits.dtype)
    return Teaching(logits, noisy, hidden, nearness, codebook, student_width)


def toy_arrays(nodes: int = 60, seed: int = 0) -> dict[str, Any]:
    """x, edge_index, y and masks of a ring with chords, three classes."""
    rng = np.random.default_rng(seed)
    y = np.arange(nodes) % 3
    start = np.arange(nodes)
    edges = np.concatenate([np.stack([start, (start + 3) % nodes]), np.stack([start, (start + 6) % nodes])], axis=1)
    parts = rng.permutation(nodes)
    masks = {f"{n}_mask": np.isin(np.arange(nodes), p) for n, p in zip(("train", "val", "test"), np.split(parts, [20, 40]), strict=True)}
    return {
        "x": rng.standard_normal((nodes, 5)).astype(np.float32) + np.eye(3)[y] @ rng.standard_normal((3, 5)),
        "edge_index": edges,
        "y": y,
    } | masks
