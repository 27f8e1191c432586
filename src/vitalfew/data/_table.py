"""Hash tables of 64-bit keys: open addressing with linear probing, in flat arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["count_into", "find", "index_of", "new_table", "regrow"]

Keys = npt.NDArray[np.uint64]
Slots = npt.NDArray[np.int64]
Valid = npt.NDArray[np.bool_]

_MOST_FULL = 0.7


def new_table(num_keys: int) -> tuple[Keys, Slots]:
    """Return an empty table with room for `num_keys`: keys, and a number for each slot (0 in a free one)."""
    size = 1 << max(10, int(num_keys / _MOST_FULL).bit_length())
    return np.zeros(size, np.uint64), np.zeros(size, np.int64)


@njit(cache=True, nogil=True)
def _slot(table: Keys, numbers: Slots, key: np.uint64) -> np.int64:
    """Return where the key is, or the free slot where it would go."""
    mask = np.uint64(table.size - 1)
    at = key & mask  # the keys are well mixed already
    while numbers[at] != 0 and table[at] != key:
        at = (at + np.uint64(1)) & mask
    return np.int64(at)


@njit(cache=True, nogil=True)
def count_into(table: Keys, counts: Slots, keys: Keys, valid: Valid, start: int, used: int) -> tuple[int, int]:
    """Count keys until the table is too full; return how far it came and the slots in use."""
    room = np.int64(table.size * _MOST_FULL)
    for i in range(start, keys.size):
        if used >= room:
            return i, used
        if valid[i]:
            at = _slot(table, counts, keys[i])
            if counts[at] == 0:
                table[at] = keys[i]
                used += 1
            counts[at] += 1
    return keys.size, used


@njit(cache=True, nogil=True)
def regrow(table: Keys, counts: Slots, new_table: Keys, new_counts: Slots) -> None:
    """Move every key of a table with its count into a larger one."""
    for i in range(table.size):
        if counts[i] != 0:
            at = _slot(new_table, new_counts, table[i])
            new_table[at] = table[i]
            new_counts[at] = counts[i]


@njit(cache=True, nogil=True)
def index_of(keys: Keys, table: Keys, rows: Slots) -> None:
    """Give the keys the rows 1, 2, ... in a table."""
    for i in range(keys.size):
        at = _slot(table, rows, keys[i])
        table[at] = keys[i]
        rows[at] = i + 1


@njit(cache=True, nogil=True)
def find(table: Keys, rows: Slots, keys: Keys, valid: Valid) -> Slots:
    """Return the row of each key; 0 where it is not in the table, or not valid."""
    out = np.zeros(keys.size, np.int64)
    for i in range(keys.size):
        if valid[i]:
            out[i] = rows[_slot(table, rows, keys[i])]
    return out
