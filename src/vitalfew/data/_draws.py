"""Kernels that draw numbers by hashing: any draw can be made on its own, in any order and process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from numba import njit

from vitalfew.data._hash import mix

__all__ = ["at", "draw_ids", "keys_of", "normal", "rank_of", "scatter_ids", "uniform"]

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]
Keys: TypeAlias = npt.NDArray[np.uint64]

# Keys stay uint64 throughout: numba would turn a uint64 and an int64 into a float64.
_STEP = np.uint64(0x9E3779B97F4A7C15)


def keys_of(seed: int | Sequence[int], num_keys: int) -> Keys:
    """Return keys that differ from those of every other seed."""
    return np.random.SeedSequence(seed).generate_state(num_keys, np.uint64).astype(np.uint64, copy=False)


@njit(cache=True, nogil=True)
def at(key: np.uint64, index: int) -> np.uint64:
    """Return number `index` of the stream of random bits that starts at the key: SplitMix64, entered anywhere."""
    bits: np.uint64 = mix(key + np.uint64(index) * _STEP)
    return bits


@njit(cache=True, nogil=True)
def uniform(bits: np.uint64) -> float:
    """Return an even number in [0, 1)."""
    return float(bits >> np.uint64(11)) * 2.0**-53


@njit(cache=True, nogil=True)
def normal(bits: np.uint64) -> float:
    """Return about a standard normal number: the sum of the four quarters of the bits, none beyond 3.5."""
    low = np.uint64(0xFFFF)
    total = (bits & low) + (bits >> np.uint64(16) & low) + (bits >> np.uint64(32) & low) + (bits >> np.uint64(48))
    return (float(total) - 131_070.0) / 37_837.2


@njit(cache=True, nogil=True)
def rank_of(covered: float, num_ids: int, row_edges: Floats, use_edges: Floats) -> int:
    """Return the rank of the row at which the curve of popularity covers this share of the lookups."""
    c = 0
    while c < len(use_edges) - 2 and covered >= use_edges[c + 1]:
        c += 1
    part = (covered - use_edges[c]) / (use_edges[c + 1] - use_edges[c])
    depth = -math.log2(1.0 - 0.5 * part)
    share = row_edges[c] + depth * (row_edges[c + 1] - row_edges[c])
    return min(int(share * num_ids), num_ids - 1)


@njit(cache=True, nogil=True)
def draw_ids(key: np.uint64, num_ids: int, row_edges: Floats, use_edges: Floats, ids: Ints) -> None:
    """Fill the array with draws from a curve of popularity."""
    for i in range(len(ids)):
        ids[i] = rank_of(uniform(at(key, i)), num_ids, row_edges, use_edges)


@njit(cache=True, nogil=True)
def scatter_ids(ids: Ints, num_ids: int, keys: Keys, renamed: Ints) -> None:
    """Rename ids by a bijection of the next power of two, again and again until they fall below `num_ids`.

    An odd factor, an addend and a shift to the right are each one to one on that many bits, and so is a walk that
    starts inside the table and ends where it comes back.
    """
    num_bits = 0
    while num_ids - 1 >> num_bits:
        num_bits += 1
    mask = (np.uint64(1) << np.uint64(num_bits)) - np.uint64(1)
    half = np.uint64((num_bits + 1) // 2)
    for i in range(len(ids)):
        x = np.uint64(ids[i])
        while True:
            for k in range(0, len(keys), 2):
                x = (x * (keys[k] | np.uint64(1)) + keys[k + 1]) & mask
                x ^= x >> half
            if x < np.uint64(num_ids):
                break
        renamed[i] = x
