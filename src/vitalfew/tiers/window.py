"""The coming batches: each without repeats, and for each of its rows the next batch that needs it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from vitalfew.core import InputError

__all__ = ["NEVER", "Window", "distinct"]

NEVER = 2**31 - 1
"""The next use of a row that no batch of the window needs again."""

_GOLD = np.uint64(0x9E3779B97F4A7C15)


@njit(inline="always")
def _home(row: Any, bits: Any) -> Any:
    return np.int64((np.uint64(row) * _GOLD) >> np.uint64(64 - bits))


@njit(nogil=True, cache=True)
def _enter(ids: Any, batch: Any, end: Any, rows: Any, uses: Any, keys: Any, values: Any, bits: Any) -> Any:
    """Append the distinct ids of a batch to the ring, and tell their previous entries; returns the new end.

    `values` has for each row the ring's line of its last entry.
    """
    size, mask, first = len(rows), len(keys) - 1, end % len(rows)
    begin = end
    for id_ in ids:
        h = _home(id_, bits)
        while keys[h] >= 0 and keys[h] != id_:
            h = (h + 1) & mask
        if keys[h] < 0:
            keys[h] = id_
        elif (values[h] - first) % size < end - begin:
            continue
        else:
            uses[values[h]] = batch
        values[h] = end % size
        rows[end % size] = id_
        uses[end % size] = NEVER
        end += 1
    return end


@njit(nogil=True, cache=True)
def _leave(first: Any, last: Any, rows: Any, uses: Any, keys: Any, values: Any, bits: Any, out: Any) -> None:
    """Take a batch out of the ring and copy its next uses; rows the window does not need again leave its index."""
    size, mask = len(rows), len(keys) - 1
    for i in range(first, last):
        use = uses[i % size]
        out[i - first] = use
        if use != NEVER:
            continue
        row = rows[i % size]
        h = _home(row, bits)
        while keys[h] != row:
            h = (h + 1) & mask
        # What stands behind moves up, so that no search ends too early at the hole.
        gap = h
        while True:
            h = (h + 1) & mask
            if keys[h] < 0:
                break
            if ((h - _home(keys[h], bits)) & mask) >= ((h - gap) & mask):
                keys[gap], values[gap] = keys[h], values[h]
                gap = h
        keys[gap] = -1


def _bits(entries: int) -> int:
    """Return the logarithm of the size of an index that so many rows fill to three quarters at most."""
    return max(-(-4 * entries // 3) - 1, 1).bit_length()


def distinct(ids: NDArray[Any]) -> NDArray[np.int32]:
    """Return ids without their repeats, in the order of their first occurrence."""
    window = Window(max(len(ids), 1))
    window.enter(ids)
    return window.rows(0)


class Window:
    """A ring of batches, oldest first. Numbers count the batches from 0.

    Parameters
    ----------
    entries
        Rows it can hold, each counted once per batch that needs it.

    Examples
    --------
    >>> window = Window(8)
    >>> window.enter(np.array([5, 7, 5])), window.enter(np.array([7]))
    (True, True)
    >>> window.rows(0)
    array([5, 7], dtype=int32)
    >>> window.leave()  # for 5 and 7
    array([2147483647,          1], dtype=int32)
    """

    def __init__(self, entries: int) -> None:
        if entries < 1:
            raise InputError(f"a window needs room for rows, got {entries}", hint="pass a positive number")
        self._bits = _bits(entries)
        self._rows = np.empty(entries, np.int32)
        self._uses = np.empty(entries, np.int32)
        self._keys = np.full(1 << self._bits, -1, np.int32)
        self._values = np.empty(1 << self._bits, np.int32)
        self._ends = [0]
        self._left = 0

    @staticmethod
    def bytes_for(entries: int) -> int:
        """Return the bytes of memory a window of that many entries takes."""
        return 8 * entries + 8 * (1 << _bits(entries))

    @staticmethod
    def entries_for(nbytes: int) -> int:
        """Return how many entries such a number of bytes suffices for; 1536 at least."""
        return 3 << max((nbytes // 56).bit_length() - 1, 9)

    @property
    def size(self) -> int:
        """Rows the ring can hold."""
        return len(self._rows)

    @property
    def entered(self) -> int:
        """How many batches have entered so far."""
        return self._left + len(self._ends) - 1

    @property
    def left(self) -> int:
        """How many batches have left so far: the number of the oldest inside."""
        return self._left

    def enter(self, ids: NDArray[Any]) -> bool:
        """Take the next batch, repeats and all; False, and nothing changed, where the ring has no room for it."""
        end = self._ends[-1]
        if len(ids) > len(self._rows) - (end - self._ends[0]):
            return False
        self._ends.append(_enter(ids, self.entered, end, self._rows, self._uses, self._keys, self._values, self._bits))
        return True

    def rows(self, batch: int) -> NDArray[np.int32]:
        """Return the distinct rows of a batch inside, in the order of their first occurrence."""
        first, last = self._ends[batch - self._left], self._ends[batch - self._left + 1]
        size = len(self._rows)
        if first // size == (last - 1) // size or first == last:
            return self._rows[first % size : first % size + last - first].copy()
        return np.concatenate([self._rows[first % size :], self._rows[: last % size]])

    def leave(self) -> NDArray[np.int32]:
        """Take the oldest batch out; returns for each of its rows the next batch that needs it, or `NEVER`."""
        first, last = self._ends[0], self._ends[1]
        out = np.empty(last - first, np.int32)
        _leave(first, last, self._rows, self._uses, self._keys, self._values, self._bits, out)
        del self._ends[0]
        self._left += 1
        return out
