"""Hold back a slice for testing: the later rows, or rows drawn by a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vitalfew.core.errors import InputError
from vitalfew.data._hash import mix, mix_integers
from vitalfew.data._values import times

if TYPE_CHECKING:
    from vitalfew.data.readers import LogReader

__all__ = ["is_test", "time_cutoff", "time_slices"]

Times = npt.NDArray[np.int64]

_EXACT_ROWS = 50_000_000
_SAMPLE_ROWS = 1_000_000


def time_cutoff(
    reader: LogReader, column: str, test_share: float = 0.2, progress: Callable[[float], None] | None = None
) -> tuple[int, bool]:
    """Return the time after which rows belong to the test slice, and whether it is exact.

    The test slice holds at most `test_share` of the rows where many share a time: rows of one time stay together.
    It is never empty.

    Raises
    ------
    InputError
        If all times are equal.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from vitalfew.data.readers import open_log
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "log.csv"
    >>> _ = file.write_text("click,day" + "".join(chr(10) + f"1,{day}" for day in range(10)))
    >>> time_cutoff(open_log(file), "day", 0.3)
    (6, True)

    Notes
    -----
    Cost: one pass over the column, 8 bytes a row. Beyond 50 million rows the cutoff comes from a sample of one
    million drawn with a fixed seed.
    """
    _check_share(test_share)
    values, exact = _times(reader, column, progress)
    first, last = int(values.min()), int(values.max())
    if first == last:
        raise InputError(f"the time `{column}` is {first} in every row", hint="leave --time out to split at random")
    at = _place(len(values), test_share)
    cutoff = int(np.partition(values, at)[at])
    if cutoff == last:
        cutoff = int(values[values < last].max())
    return cutoff, exact


def time_slices(
    reader: LogReader,
    column: str,
    slices: int,
    first_share: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> tuple[Times, bool]:
    """Return the last time of each slice of a log, and whether these are exact.

    Parameters
    ----------
    slices
        The first slice has `first_share` of the rows, the others are of equal size; all are where it is None. There
        are fewer where many rows share a time, for these stay together; `time_cutoff` cuts at the same place.

    Raises
    ------
    InputError
        If all times are equal.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from vitalfew.data.readers import open_log
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "log.csv"
    >>> _ = file.write_text("click,day" + "".join(chr(10) + f"1,{day}" for day in range(10)))
    >>> time_slices(open_log(file), "day", 3, 0.5)
    (array([4, 7, 9]), True)

    Notes
    -----
    Cost: as for `time_cutoff`.
    """
    if slices < 2:
        raise InputError(f"a log is compared over at least 2 slices, got {slices}", hint="8 is usual")
    share = 1 / slices if first_share is None else first_share
    _check_share(share, "the share of the first slice")
    values, exact = _times(reader, column, progress)
    values.sort()
    if values[0] == values[-1]:
        raise InputError(f"the time `{column}` is {values[0]} in every row", hint="name a column that has the time")
    later = np.linspace(1 - share, 0, slices)
    cuts = values[[_place(len(values), left) for left in later]]
    cuts[0] = min(cuts[0], values[values < values[-1]][-1])  # something has to be later
    return np.unique(cuts), exact


def _place(num_rows: int, later: float) -> int:
    """Return the place of the last of the sorted times when a share of the rows is to be later."""
    return max(num_rows - int(later * num_rows + 1e-6), 1) - 1  # 0.99 * 1000 may fall just short of 990


def _times(reader: LogReader, column: str, progress: Callable[[float], None] | None) -> tuple[Times, bool]:
    sample = _TimeSample(_EXACT_ROWS, _SAMPLE_ROWS)
    row = 0
    for batch in reader.batches([column], progress=progress):
        sample.add(times(batch.column(0), column, row))
        row += batch.num_rows
    return sample.values(), sample.exact


def is_test(rows: npt.NDArray[np.int64], share: float, seed: int = 0) -> npt.NDArray[np.bool_]:
    """Return which row numbers belong to a test slice drawn by a seed, the same on every machine.

    Examples
    --------
    >>> bool(0.18 < is_test(np.arange(10_000), 0.2).mean() < 0.22)
    True
    """
    _check_share(share)
    if seed < 0:
        raise InputError(f"seed must be 0 or more, got {seed}")
    salt = int(mix(np.uint64(seed)))
    return np.asarray(mix_integers(rows.astype(np.uint64), np.uint64(salt)) < np.uint64(int(share * 2**64)))


def _check_share(share: float, name: str = "test_share") -> None:
    if not 0 < share < 1:
        raise InputError(f"{name} must lie between 0 and 1, got {share}", hint="such as 0.2")


class _TimeSample:
    """Every time up to a limit, then a uniform sample of what streams by (a reservoir)."""

    def __init__(self, most_exact: int, sample_size: int) -> None:
        self._limit, self._size = most_exact, sample_size
        self._chunks: list[Times] = []
        self._seen = 0
        self._rng = np.random.default_rng(0)
        self.exact = True

    def add(self, chunk: Times) -> None:
        if self.exact and self._seen + len(chunk) > self._limit:
            seen = self.values()
            self._chunks = [self._rng.permutation(seen)[: self._size].copy()]
            self.exact = False
        if self.exact:
            self._chunks.append(chunk)
        else:
            # Row number i takes a place in the sample with the chance size / (i + 1).
            places = self._rng.integers(0, np.arange(self._seen, self._seen + len(chunk)) + 1)
            taken = places < len(self._chunks[0])
            self._chunks[0][places[taken]] = chunk[taken]
        self._seen += len(chunk)

    def values(self) -> Times:
        return np.concatenate(self._chunks) if self._chunks else np.zeros(0, np.int64)
