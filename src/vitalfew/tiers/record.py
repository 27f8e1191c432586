"""One row as bytes: weights, optimizer state and statistics side by side, so that they move as a unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from vitalfew.tiers.lower import Bytes

__all__ = ["Record"]


@njit(nogil=True, cache=True)
def _take(column: Any, slots: Any, records: Any, at: Any) -> None:
    width = column.shape[1]
    for i in range(len(slots)):
        source, target = column[slots[i]], records[i]
        for d in range(width):
            target[at + d] = source[d]


@njit(nogil=True, cache=True)
def _put(column: Any, slots: Any, records: Any, at: Any) -> None:
    width = column.shape[1]
    for i in range(len(slots)):
        target, source = column[slots[i]], records[i]
        for d in range(width):
            target[d] = source[at + d]


@njit(nogil=True, cache=True)
def _clear(column: Any, slots: Any) -> None:
    for slot in slots:
        column[slot] = 0


class Record:
    """How the columns of a slab lie in a record.

    Parameters
    ----------
    columns
        Two-dimensional arrays with one line per slot, items of 2 or 4 bytes.

    Examples
    --------
    >>> weight, state = np.ones((4, 3), np.float32), np.zeros((4, 1), np.float32)
    >>> record = Record([weight, state])
    >>> record.nbytes
    16
    >>> out = np.empty((1, 16), np.uint8)
    >>> record.take(np.array([2], np.int32), out)
    >>> out.view(np.float32)
    array([[1., 1., 1., 0.]], dtype=float32)
    """

    def __init__(self, columns: Sequence[NDArray[Any]]) -> None:
        self.columns: list[tuple[NDArray[Any], int]] = []
        """Each column as words, and the word of a record where it begins."""
        at = 0
        for column in columns:
            width = column.shape[1] * column.itemsize
            # Copied in words of the widest kind that fits; a record's fields begin at multiples of 4 bytes.
            word = np.uint32 if width % 4 == 0 else np.uint16
            self.columns.append((column.view(word), at // np.dtype(word).itemsize))
            at += -(-width // 4) * 4
        self.nbytes = at

    def take(self, slots: NDArray[np.int32], records: Bytes) -> None:
        """Copy slots of the slab into records."""
        for column, at in self.columns:
            _take(column, slots, records.view(column.dtype), at)

    def put(self, slots: NDArray[np.int32], records: Bytes) -> None:
        """Copy records into slots of the slab."""
        for column, at in self.columns:
            _put(column, slots, records.view(column.dtype), at)

    def clear(self, slots: NDArray[np.int32]) -> None:
        """Fill slots of the slab with zeros."""
        for column, _ in self.columns:
            _clear(column, slots)
