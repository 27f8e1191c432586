"""How many rows an LRU cache would read, exactly, for every capacity at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from vitalfew.core.errors import InputError

__all__ = ["MissCurve", "lru_curve"]

_WORD = 64  # places of the time line that share one count of the tree
_SMALLEST = 1024  # rows that fit before the first growth


@dataclass(frozen=True, slots=True, eq=False)
class MissCurve:
    """Rows read from the slow tier as a function of the rows retained between batches.

    Examples
    --------
    >>> curve = MissCurve(np.array([7, 5, 4]))
    >>> curve.misses_at(1), curve.misses_at(100)
    (5, 4)
    """

    misses: NDArray[np.int64]
    """One count for each capacity from 0 to the number of distinct rows. The first is the number of uses: of the
    distinct rows of each batch, summed over batches. The last is the number of distinct rows."""

    @property
    def capacities(self) -> NDArray[np.int64]:
        """Rows retained between batches, one for each entry of `misses`."""
        return np.arange(len(self.misses))

    @property
    def uses(self) -> int:
        """Distinct rows of each batch, summed over batches."""
        return int(self.misses[0])

    @property
    def distinct(self) -> int:
        """Distinct rows of the trace."""
        return len(self.misses) - 1

    def misses_at(self, capacity: int) -> int:
        """Return the rows read with this capacity; beyond the distinct rows of the trace nothing more is saved."""
        if capacity < 0:
            raise InputError(f"capacity must be >= 0 rows, got {capacity}", hint="0 retains nothing between batches")
        return int(self.misses[min(capacity, self.distinct)])


def lru_curve(ids: ArrayLike, batch_offsets: ArrayLike) -> MissCurve:
    """Return the exact misses of an LRU cache for every capacity, in one pass over a trace.

    The rows of a batch are held while it is in use. Then they join the retained rows, in the order of their first
    occurrence in the batch, and the capacity counts the rows retained until the next batch.

    Parameters
    ----------
    ids
        Row ids of all batches, one after the other, whole numbers >= 0; a batch may repeat an id.
    batch_offsets
        Where batches begin and end: batch b uses ``ids[batch_offsets[b] : batch_offsets[b + 1]]``.

    Returns
    -------
    MissCurve
        Misses for capacities from 0 to the number of distinct rows. First uses count as misses.

    Raises
    ------
    InputError
        If an id is negative, or the offsets do not run from 0 to the number of ids.

    Examples
    --------
    >>> curve = lru_curve([1, 2, 1, 2, 3, 1], [0, 2, 3, 5, 6])
    >>> curve.misses
    array([6, 6, 4, 3])
    >>> curve.misses_at(2)
    4

    Notes
    -----
    LRU is a stack algorithm (Mattson, Gecsei, Slutz and Traiger, Evaluation techniques for storage hierarchies, 1970):
    a cache of C rows retains the C most recently used ones, whatever C is. So a row hits exactly if C is at least its
    distance: itself and the retained rows that were used after it. A row's distance is taken before any row of the
    same batch moves to the front, because all of them are looked up before any is given back.

    Cost: some 100 ns an id on one core, up to three times that with millions of distinct rows; 70 to 130 bytes for
    each distinct row, and nothing that grows with the length of the trace.
    """
    flat, offsets = np.ascontiguousarray(ids), np.ascontiguousarray(batch_offsets)
    for name, values in (("ids", flat), ("batch_offsets", offsets)):
        if values.ndim != 1 or not (np.issubdtype(values.dtype, np.integer) or values.size == 0):
            raise InputError(
                f"{name} must be one row of whole numbers, got {values.dtype} of shape {values.shape}",
                hint="put the ids of all batches one after the other, and say where each batch begins",
            )
    flat, offsets = flat.astype(np.int64, copy=False), offsets.astype(np.int64, copy=False)
    if not offsets.size or offsets[0] != 0 or offsets[-1] != flat.size or (np.diff(offsets) < 0).any():
        raise InputError(
            f"batch_offsets must rise from 0 to the {flat.size} ids, got {np.array2string(offsets, threshold=8)}",
            hint="batch b uses ids[batch_offsets[b]:batch_offsets[b + 1]], so there is one offset more than batches",
        )
    if flat.size and flat.min() < 0:
        raise InputError(f"ids must be >= 0, got {flat.min()}", hint="leave missing ids out of their batch")
    count = _count_distances(flat, offsets)
    # A capacity spares the distances up to it; first uses have no distance, and are never spared.
    return MissCurve(count.sum() - np.concatenate([[0], np.cumsum(count[1:])]))


# Distinct rows are numbered as they appear: a hash table leads from an id to its number, `last` from there to the
# place of its last use on a time line and to its last batch, and `row_at` from a place back to the row. The line is a
# set of bits, with a Fenwick tree over the counts of its words, so that rows used after a place are counted in a few
# steps within the cache. When the line is full, its rows are moved together at the start; that leaves as many free
# places again, so it happens rarely.


@njit(nogil=True, cache=True)
def _count_distances(ids: Any, offsets: Any) -> Any:
    """Return how often each distance occurs, from 1 on; entry 0 counts first uses."""
    largest = 0
    for b in range(len(offsets) - 1):
        largest = max(largest, offsets[b + 1] - offsets[b])
    room = _SMALLEST
    table = np.full((2 * room, 2), -1, np.int64)  # id, number: side by side, as they are needed together
    last = np.empty((room, 2), np.int64)  # place, batch
    count = np.zeros(room + 1, np.int64)
    words, tree, row_at = _line(2 * room + largest)
    batch = np.empty(largest, np.int32)
    rows = 0  # distinct so far
    end = 0  # first free place
    for b in range(len(offsets) - 1):
        size = 0
        known = rows
        for i in range(offsets[b], offsets[b + 1]):
            at = _find(table, ids[i])
            if table[at, 0] == -1:
                if rows == room:
                    room *= 2
                    table = _rehash(table)
                    last, count = _longer(last, room), _longer(count, room + 1)
                    at = _find(table, ids[i])
                table[at, 0], table[at, 1] = ids[i], rows
                last[rows, 1] = b
                batch[size] = rows
                size += 1
                rows += 1
                count[0] += 1
            else:
                row = table[at, 1]
                if last[row, 1] != b:
                    last[row, 1] = b
                    batch[size] = row
                    size += 1
                    # Rows before this batch are all on the line; those up to here are older or the row itself.
                    count[known - _up_to(words, tree, last[row, 0]) + 1] += 1
        if end + size > len(row_at):
            words, tree, row_at, end = _together(words, row_at, last, 2 * room + largest)
        for i in range(size):
            row = batch[i]
            if row < known:
                _change(words, tree, last[row, 0], -1)
            last[row, 0] = end
            row_at[end] = row
            _change(words, tree, end, 1)
            end += 1
    return count[: rows + 1]


@njit(nogil=True, cache=True)
def _find(table: Any, id_: Any) -> Any:
    """Return where an id is in the table, or the free entry that it would take."""
    mask = len(table) - 1
    # High bits of the id are folded down first, and those of the product are used: ids that differ in few bits spread.
    folded = np.uint64(id_) ^ (np.uint64(id_) >> np.uint64(32))
    at = np.int64((folded * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) & mask
    while table[at, 0] != id_ and table[at, 0] != -1:
        at = (at + 1) & mask
    return at


@njit(nogil=True, cache=True)
def _rehash(table: Any) -> Any:
    """Return a table of twice the size."""
    larger = np.full((2 * len(table), 2), -1, np.int64)
    for i in range(len(table)):
        if table[i, 0] != -1:
            larger[_find(larger, table[i, 0])] = table[i]
    return larger


@njit(nogil=True, cache=True)
def _longer(values: Any, length: Any) -> Any:
    longer = np.zeros((length, *values.shape[1:]), values.dtype)
    longer[: len(values)] = values
    return longer


@njit(nogil=True, cache=True)
def _line(places: Any) -> Any:
    """Return an empty time line: its bits, the tree of their counts, and room for a row at each place."""
    num_words = -(-places // _WORD)
    return np.zeros(num_words, np.uint64), np.zeros(num_words + 1, np.int32), np.empty(num_words * _WORD, np.int32)


@njit(nogil=True, cache=True)
def _together(words: Any, row_at: Any, last: Any, places: Any) -> Any:
    """Return a line of at least `places` with the same rows in the same order, from its start on, and its end."""
    new_words, tree, new_row_at = _line(places)
    end = 0
    for place in range(len(row_at)):
        if (words[place // _WORD] >> np.uint64(place % _WORD)) & np.uint64(1):
            row = row_at[place]
            last[row, 0] = end
            new_row_at[end] = row
            new_words[end // _WORD] |= np.uint64(1) << np.uint64(end % _WORD)
            end += 1
    for i in range(1, len(tree)):
        tree[i] += _bits(new_words[i - 1])
        parent = i + (i & -i)
        if parent < len(tree):
            tree[parent] += tree[i]
    return new_words, tree, new_row_at, end


@njit(nogil=True, cache=True)
def _up_to(words: Any, tree: Any, place: Any) -> Any:
    """Return the number of rows at this place and before."""
    word = place // _WORD
    total = _bits(words[word] << np.uint64(_WORD - 1 - place % _WORD))
    while word > 0:
        total += tree[word]
        word &= word - 1
    return total


@njit(nogil=True, cache=True)
def _change(words: Any, tree: Any, place: Any, by: Any) -> None:
    """Put a row on a place (by = 1) or take it away (-1)."""
    words[place // _WORD] ^= np.uint64(1) << np.uint64(place % _WORD)
    i = place // _WORD + 1
    while i < len(tree):
        tree[i] += by
        i += i & -i


@njit(nogil=True, cache=True)
def _bits(word: Any) -> Any:
    """Return the number of bits that are set; the compiler knows this form as one instruction."""
    word -= (word >> np.uint64(1)) & np.uint64(0x5555555555555555)
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))
