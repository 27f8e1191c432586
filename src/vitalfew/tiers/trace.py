"""The rows that batches need, kept in a file, so that many policies and budgets can be tried on them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from vitalfew.tiers.window import Window

__all__ = ["Trace"]


class Trace:
    """What `replay` reads, to be read as often as needed: the distinct rows of each batch, four bytes each, on disk.

    Parameters
    ----------
    batches
        Row ids over all tables with the bytes of the whole batch. Read once.
    folder
        For the file, which has no name there and vanishes with this object; by default where temporary files go.
    progress
        Called with the number of batches read so far.

    Attributes
    ----------
    uses, largest
        Distinct rows of each batch: summed over batches, and the most of one.

    Examples
    --------
    >>> trace = Trace([(np.array([5, 7, 5]), 24), (np.array([7]), 8)])
    >>> len(trace), trace.uses, trace.largest
    (2, 3, 2)
    >>> [ids.tolist() for ids, _ in trace]
    [[5, 7, 5], [7]]
    >>> trace.close()
    """

    def __init__(
        self,
        batches: Iterable[tuple[NDArray[np.int64], int]],
        *,
        folder: str | os.PathLike[str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  `close` closes it
        self._about: list[tuple[int, int, int]] = []  # distinct rows, ids with repeats, bytes
        for ids, nbytes in batches:
            window = Window(max(len(ids), 1))
            window.enter(ids)
            rows = window.rows(0)
            self._file.write(rows.tobytes())
            self._about.append((len(rows), len(ids), nbytes))
            if progress is not None:
                progress(len(self))
        self._file.flush()
        self.uses = sum(rows for rows, _, _ in self._about)
        self.largest = max((rows for rows, _, _ in self._about), default=0)

    def __len__(self) -> int:
        return len(self._about)

    def __iter__(self) -> Iterator[tuple[NDArray[np.int64], int]]:
        at = 0
        for count, length, nbytes in self._about:
            ids = np.empty(length, np.int64)
            ids[:count] = self._rows(at, count)
            ids[count:] = ids[:1]  # repeats: which row they are of makes no difference, but how many there are does
            yield ids, nbytes
            at += count

    def _rows(self, start: int, count: int) -> NDArray[np.int32]:
        return np.frombuffer(os.pread(self._file.fileno(), 4 * count, 4 * start), np.int32)

    def flat(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the rows of all batches one after the other, mapped from the file, and where each batch begins."""
        offsets = np.cumsum([0, *(count for count, _, _ in self._about)])
        if not self.uses:
            return np.empty(0, np.int32), offsets
        return np.memmap(self._file, np.int32, "r", shape=(self.uses,)), offsets

    def counts(self, num_rows: int) -> NDArray[np.int64]:
        """Return how many batches need each row."""
        found = np.zeros(num_rows, np.int64)
        at = 0
        for count, _, _ in self._about:
            found[self._rows(at, count)] += 1  # distinct
            at += count
        return found

    def close(self) -> None:
        """Give the file back."""
        self._file.close()

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()
