"""From keys to rows of an embedding table: an exact vocabulary, hashing, or the ids themselves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from vitalfew.core.errors import InputError
from vitalfew.data._hash import scale
from vitalfew.data._table import count_into, find, index_of, new_table, regrow

__all__ = ["Direct", "Hashed", "Vocabulary", "VocabularyBuilder"]

Keys = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]
Valid = npt.NDArray[np.bool_]

_MOST_ROWS = 2**31  # of a table whose ids are its rows: beyond it the ids were never meant as row numbers


class Vocabulary:
    """An exact map from key to row, the most frequent value first.

    Row 0 is for values that are missing, unseen or rare. Rows 1, 2, ... follow by falling count, equal counts by
    key, so popular rows lie next to each other and the order of the file does not matter.

    Parameters
    ----------
    keys
        The key of row 1, 2, ...
    counts
        How often each row occurred, row 0 first: one more than there are keys.

    Examples
    --------
    >>> builder = VocabularyBuilder()
    >>> builder.add(np.array([7, 9, 7, 8], np.uint64), np.array([True, True, True, False]))
    >>> vocabulary = builder.finish()
    >>> vocabulary.rows(np.array([9, 7, 1000], np.uint64), np.ones(3, np.bool_))
    array([2, 1, 0])
    >>> vocabulary.counts
    array([1, 2, 1], dtype=uint64)

    Notes
    -----
    Whole numbers are exact. Text is known by a fingerprint of 64 bits: with n distinct texts the chance that some
    two are taken for one is about n^2 / 2^65 (3e-6 for ten million). Cost: 24 to 48 bytes a key for the look-up.
    """

    def __init__(self, keys: Keys, counts: npt.NDArray[np.uint64]) -> None:
        self.keys = keys
        self.counts = counts
        self._table: tuple[Keys, Rows] | None = None

    @property
    def num_rows(self) -> int:
        return len(self.counts)

    def rows(self, keys: Keys, valid: Valid) -> Rows:
        """Return the row of each key."""
        if self._table is None:
            self._table = new_table(len(self.keys))
            index_of(self.keys, *self._table)
        rows: Rows = find(*self._table, keys, valid)
        return rows

    def arrays(self) -> dict[str, npt.NDArray[np.uint64]]:
        """Return what has to be kept on the disk."""
        return {"keys": self.keys, "counts": self.counts}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[np.uint64]]) -> Vocabulary:
        """Return the vocabulary that gave these arrays."""
        keys, counts = arrays["keys"], arrays["counts"]
        if keys.dtype != np.uint64 or counts.dtype != np.uint64 or len(counts) != len(keys) + 1:
            raise InputError("the arrays are not those of a vocabulary", hint="write the encoder again")
        return cls(keys, counts)


class VocabularyBuilder:
    """Counts keys as they stream by, then ranks them.

    Examples
    --------
    >>> builder = VocabularyBuilder()
    >>> builder.add(np.array([5, 5, 6], np.uint64), np.ones(3, np.bool_))
    >>> builder.finish(min_count=2).num_rows
    2

    Notes
    -----
    Cost: 16 bytes a slot, 1.4 to 2.9 slots for each distinct key; while it grows, half as much again.
    """

    def __init__(self) -> None:
        self._table, self._counts = new_table(0)
        self._used = 0
        self._num_missing = 0

    def add(self, keys: Keys, valid: Valid) -> None:
        """Count the keys that are valid, and how many are not."""
        self._num_missing += len(keys) - int(np.count_nonzero(valid))
        done = 0
        while True:
            done, self._used = count_into(self._table, self._counts, keys, valid, done, self._used)
            if done == len(keys):
                return
            table, counts = new_table(self._table.size)
            regrow(self._table, self._counts, table, counts)
            self._table, self._counts = table, counts

    def finish(self, min_count: int = 1) -> Vocabulary:
        """Return the vocabulary of the keys that came up at least `min_count` times."""
        if min_count < 1:
            raise InputError(f"min_count must be 1 or more, got {min_count}")
        kept = self._counts >= min_count
        keys, counts = self._table[kept], self._counts[kept]
        num_other = self._num_missing + int(self._counts.sum()) - int(counts.sum())
        by_key = np.argsort(keys)
        keys, counts = keys[by_key], counts[by_key]
        by_count = np.argsort(-counts, kind="stable")
        all_counts = np.concatenate(([num_other], counts[by_count])).astype(np.uint64)
        return Vocabulary(keys[by_count], all_counts)


class Hashed:
    """A map from key to one of a stated number of rows; different values may share a row.

    Row 0 is for missing values, the others are spread evenly over rows 1 to num_rows - 1.

    Examples
    --------
    >>> hashed = Hashed(1000)
    >>> rows = hashed.rows(np.array([1, 2, 3], np.uint64), np.array([True, True, False]))
    >>> int(rows[2]), bool(1 <= rows[:2].min() <= rows[:2].max() < 1000)
    (0, True)
    """

    def __init__(self, num_rows: int, seed: int = 0) -> None:
        if num_rows < 2:
            raise InputError(f"a hashed table needs 2 rows or more, got {num_rows}")
        if seed < 0:
            raise InputError(f"seed must be 0 or more, got {seed}")
        self.num_rows = num_rows
        self.seed = seed

    def rows(self, keys: Keys, valid: Valid) -> Rows:
        """Return the row of each key."""
        rows: Rows = scale(keys, np.uint64(self.num_rows - 1), np.uint64(self.seed))
        return np.where(valid, rows + 1, 0)


class Direct:
    """The ids are the row numbers already; nothing is kept but the number of rows.

    Unlike in the other two, row 0 is a row like any other, so a missing id is an error.

    Examples
    --------
    >>> Direct(3).rows(np.array([0, 2]), np.ones(2, np.bool_), column="user")
    array([0, 2])
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    @staticmethod
    def needed(ids: Rows, valid: Valid, column: str = "values") -> int:
        """Return how many rows a table of these ids needs, or refuse ids that are no row numbers."""
        if not valid.all():
            raise InputError(f"column `{column}` has a missing value, which is no row number", hint=_HINT)
        if not len(ids):
            return 0
        low, high = int(ids.min()), int(ids.max())
        if low < 0:
            raise InputError(f"column `{column}` holds the id {low}, which is no row number", hint=_HINT)
        if high >= _MOST_ROWS:
            raise InputError(
                f"column `{column}` holds the id {high}; used as a row number it needs a table of {_short(high)} rows",
                hint=_HINT,
            )
        return high + 1

    def rows(self, ids: Rows, valid: Valid, column: str = "values") -> Rows:
        """Return the ids, after a check that each is a row of the table."""
        needed = self.needed(ids, valid, column)
        if needed > self.num_rows:
            raise InputError(
                f"column `{column}` holds the id {needed - 1}, but its table has {self.num_rows} rows", hint=_HINT
            )
        return ids


def _short(number: int) -> str:
    """Write a large number as 1.1e12."""
    digits, _, power = f"{number:.1e}".partition("e")
    return f"{digits}e{int(power)}"


_HINT = "drop --direct to build a vocabulary, or hash it"
