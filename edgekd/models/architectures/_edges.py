"""Adjacency matrices as layers multiply by them: sparse by rows, loops added, weighed."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray


def with_loops(indptr: NDArray[np.int64], neighbours: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(indptr, neighbours) with each node among its own neighbours, ascending."""
    nodes = len(indptr) - 1
    start = np.concatenate([np.repeat(np.arange(nodes), np.diff(indptr)), np.arange(nodes)])
    end = np.concatenate([neighbours.astype(np.int64), np.arange(nodes)])
    order = np.lexsort((end, start))
    return indptr + np.arange(nodes + 1), end[order]


def symmetric(indptr: NDArray[np.int64], neighbours: NDArray[Any]) -> Tensor:
    """D^-1/2 (A + I) D^-1/2. Source: Kipf and Welling 2017, equation 2."""
    pointers, ends = with_loops(indptr, neighbours)
    degree = np.diff(pointers).astype(np.float64)
    return _sparse(pointers, ends, 1 / np.sqrt(np.repeat(degree, np.diff(pointers)) * degree[ends]))


def mean(indptr: NDArray[np.int64], neighbours: NDArray[Any], *, own: int) -> Tensor:
    """(A + own I) / (d + own), each row of sum 1; a row without neighbours and without itself is 0."""
    if not own:
        degree = np.diff(indptr)
        return _sparse(indptr, neighbours.astype(np.int64), 1 / np.repeat(degree, degree))
    pointers, ends = with_loops(indptr, neighbours)
    counts = np.diff(pointers)
    start = np.repeat(np.arange(len(counts)), counts)
    return _sparse(pointers, ends, np.where(start == ends, own, 1) / (np.repeat(counts, counts) - 1 + own))


def listed(indptr: NDArray[np.int64], neighbours: NDArray[Any]) -> Tensor:
    """(2, edges): from the neighbour to the node that reads it, loops added."""
    pointers, ends = with_loops(indptr, neighbours)
    return torch.from_numpy(np.stack([ends, np.repeat(np.arange(len(indptr) - 1), np.diff(pointers))]))


def _sparse(indptr: NDArray[np.int64], ends: NDArray[np.int64], values: NDArray[np.float64]) -> Tensor:
    nodes = len(indptr) - 1
    return sparse(indptr, ends, values.astype(np.float32), (nodes, nodes))


def sparse(indptr: NDArray[np.int64], indices: NDArray[np.int64], values: NDArray[np.float32], shape: tuple[int, int]) -> Tensor:
    """A matrix by rows; torch says once that such tensors are new, which nobody needs to read."""
    parts = (torch.from_numpy(indptr), torch.from_numpy(indices), torch.from_numpy(values))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor(*parts, size=shape, check_invariants=False)
