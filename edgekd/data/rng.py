"""Stateless randomness: every draw is a function of (seed, purpose, epoch, position), never of what was drawn before.

So a resumed run draws what an uninterrupted one draws, and batch composition and worker count change nothing.
Mixing function: splitmix64, Steele et al., Fast Splittable Pseudorandom Number Generators, 2014.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = (np.uint64(s) for s in (30, 27, 31, 11))
_ULP = np.float64(2.0**-53)


def uniform(seed: int, purpose: str, epoch: int, positions: npt.NDArray[np.int64], k: int) -> npt.NDArray[np.float64]:
    """k draws in [0, 1) for each position: (n, k)."""
    base = np.uint64(seed_of(seed, purpose, epoch))
    rows = _mix(base + positions.astype(np.uint64) * _GAMMA)
    columns = np.arange(1, k + 1, dtype=np.uint64) * _GAMMA
    return (_mix(rows[:, None] + columns) >> _S11).astype(np.float64) * _ULP


def seed_of(seed: int, purpose: str, *indices: int) -> int:
    """A 64-bit seed for a generator of another library, used for one thing and dropped."""
    text = "/".join(map(str, (seed, purpose, *indices)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> _S30)) * _MIX_1  # numpy wraps 64-bit products of arrays without a warning, as meant here
    z = (z ^ (z >> _S27)) * _MIX_2
    return z ^ (z >> _S31)
