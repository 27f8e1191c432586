"""The next use of every row of a pass, found by reading the pass once beforehand; kept in a file, not in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from vitalfew.core import InputError
from vitalfew.tiers.window import NEVER, distinct

__all__ = ["Rehearsal"]

_LAST_BYTES = 32 << 20
"""Memory for the last batch that used each row; more rows than fit are treated in several rounds over the file."""


@njit(nogil=True, cache=True)
def _uses(rows: Any, batch: Any, first: Any, last: Any, uses: Any) -> None:
    """Fill in the next uses of those rows that lie in the range of `last`, whose batches come later first."""
    for i in range(len(rows)):
        k = rows[i] - first
        if 0 <= k < len(last):
            uses[i] = last[k]
            last[k] = batch


@njit(nogil=True, cache=True)
def _digest(rows: Any) -> Any:
    x = np.uint64(len(rows))
    for row in rows:
        x = (x ^ np.uint64(row)) * np.uint64(0x9E3779B97F4A7C15)
        x ^= x >> np.uint64(29)
    return x


class Rehearsal:
    """What each batch of a pass needs, and when its rows are needed again.

    With it a cache can be run by Belady's rule over the whole pass, however long, for a few bytes per batch.

    Parameters
    ----------
    batches
        The ids of each batch, over all tables, repeats and all. Read once.
    num_rows
        Rows of all tables.
    folder
        For the file, four bytes for each distinct row of each batch, twice while it is made; by default where
        temporary files go. It has no name there and vanishes with this object.

    Examples
    --------
    >>> plan = Rehearsal([np.array([5, 7, 5]), np.array([7])], num_rows=8)
    >>> plan.uses(0, np.array([5, 7], np.int32))
    array([2147483647,          1], dtype=int32)
    >>> plan.close()
    """

    def __init__(
        self,
        batches: Iterable[NDArray[np.int64]],
        num_rows: int,
        *,
        folder: str | os.PathLike[str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._ends, self._digests = [0], list[int]()
        with tempfile.TemporaryFile(dir=folder) as rows_file:
            for ids in batches:
                rows = distinct(ids)
                rows_file.write(rows.tobytes())
                self._ends.append(self._ends[-1] + len(rows))
                self._digests.append(int(_digest(rows)))
                if progress is not None:
                    progress(len(self))
            rows_file.flush()
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  it lives as long as this object
            self._file.truncate(4 * self._ends[-1])
            span = max(min(num_rows, _LAST_BYTES // 4), 1)
            for first in range(0, num_rows, span):
                self._round(rows_file.fileno(), first, np.full(min(span, num_rows - first), NEVER, np.int32), first > 0)

    def _round(self, rows_file: int, first: int, last: NDArray[np.int32], again: bool) -> None:
        """Go through the batches from the last to the first, for one range of rows."""
        for batch in range(len(self) - 1, -1, -1):
            start, count = 4 * self._ends[batch], self._ends[batch + 1] - self._ends[batch]
            rows = np.frombuffer(os.pread(rows_file, 4 * count, start), np.int32)
            uses = self._read(batch) if again else np.full(count, NEVER, np.int32)
            _uses(rows, batch, first, last, uses)
            os.pwrite(self._file.fileno(), uses.tobytes(), start)

    def _read(self, batch: int) -> NDArray[np.int32]:
        start, stop = self._ends[batch], self._ends[batch + 1]
        return np.frombuffer(os.pread(self._file.fileno(), 4 * (stop - start), 4 * start), np.int32).copy()

    def __len__(self) -> int:
        return len(self._digests)

    @property
    def largest(self) -> int:
        """The most distinct rows that a batch needs."""
        return int(np.diff(self._ends).max(initial=0))

    def uses(self, batch: int, rows: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the next batch that needs each row of a batch, or `NEVER`.

        Parameters
        ----------
        rows
            The distinct rows of the batch in the order of their first occurrence.

        Raises
        ------
        InputError
            If they are not those that were read beforehand.
        """
        if batch >= len(self) or _digest(rows) != self._digests[batch]:
            raise InputError(
                f"batch {batch} needs other rows than when the loader was read beforehand",
                hint="let the loader give the same batches each time (seed its shuffling), or use LookAhead()",
            )
        return self._read(batch)

    def close(self) -> None:
        """Give the file back."""
        self._file.close()
