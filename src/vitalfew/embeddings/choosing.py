"""Which rows are hot: those of small tables, and of the others the most looked up that a budget holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitalfew.core import Budget, InputError, select
from vitalfew.core.intervals import Interval, mean_interval
from vitalfew.embeddings._kernels_choose import all_flagged

__all__ = ["HotSet", "estimate_hot_rows", "hot_inputs", "hot_rows"]


@dataclass(frozen=True, slots=True, eq=False)
class HotSet:
    """The rows to keep in fast memory.

    Attributes
    ----------
    ids
        int64, ascending, numbered over all tables.
    threshold
        Lookups of the least popular row that was taken for its lookups; infinite where none was.
    coverage
        Share of the counted lookups that go to these rows.
    nbytes
        What they take with their optimizer state.
    num_rows
        Rows of all tables.
    """

    ids: NDArray[np.int64]
    threshold: float
    coverage: float
    nbytes: int
    num_rows: int

    def __len__(self) -> int:
        return len(self.ids)

    def mask(self) -> NDArray[np.uint8]:
        """Return one flag per row, 1 where it is hot."""
        flags = np.zeros(self.num_rows, np.uint8)
        flags[self.ids] = 1
        return flags


def hot_rows(
    counts: ArrayLike,
    tables: Sequence[int],
    budget: Budget | float | int | str,
    *,
    row_bytes: int,
    small: int = 2**20,
) -> HotSet:
    """Return the rows that are looked up most and fit the budget.

    Tables of at most `small` bytes are taken whole, if together they fit. Of the other rows those with the most
    lookups are taken, over all tables, ties by the lower id; rows that were never looked up are left. A budget that
    holds all rows takes all.

    Parameters
    ----------
    counts
        Lookups per row, one table after the other.
    tables
        Rows of each table.
    budget
        A size ("256 MiB"), a share of the rows (0.1), a number of rows, or a `Budget` of these.
    row_bytes
        Bytes of a row with its optimizer state.
    small
        Bytes.

    Examples
    --------
    >>> hot = hot_rows([5, 0, 9, 7, 2], [2, 3], 3, row_bytes=8, small=0)
    >>> hot.ids, hot.threshold, round(hot.coverage, 2), hot.nbytes
    (array([0, 2, 3]), 5.0, 0.91, 24)

    Notes
    -----
    Cost: a few passes over the counts, and a sort of the rows that are taken.
    """
    count = np.asarray(counts)
    num_rows = sum(tables)
    if count.shape != (num_rows,):
        raise InputError(
            f"there are counts of shape {count.shape} for {num_rows:,} rows", hint="pass one per row of every table"
        )
    if row_bytes < 1:
        raise InputError(f"a row cannot take {row_bytes} bytes", hint="weights and optimizer state together")
    room = min(_room(Budget.of(budget), num_rows, row_bytes), num_rows)
    is_hot = np.zeros(num_rows, bool)
    starts = np.cumsum([0, *tables])
    few = [k for k, rows in enumerate(tables) if rows * row_bytes <= small or room == num_rows]
    if sum(tables[k] for k in few) <= room:
        for k in few:
            is_hot[starts[k] : starts[k + 1]] = True
    taken, threshold = _most_looked_up(count, is_hot, room - int(is_hot.sum()))
    is_hot[taken] = True
    ids = np.flatnonzero(is_hot)
    total = float(count.sum())
    coverage = min(float(count[ids].sum()) / total, 1.0) if total else 0.0
    return HotSet(ids, threshold, coverage, len(ids) * row_bytes, num_rows)


def _room(budget: Budget, num_rows: int, row_bytes: int) -> int:
    if budget.kind == "coverage":
        raise InputError(f"hot rows need a limit, not {budget}", hint='pass a size ("256 MiB"), a share or a number')
    room = {
        "bytes": int(budget.value) // row_bytes,
        "share": int(budget.value * num_rows * (1 + 1e-12)),
        "count": int(budget.value),
    }[budget.kind]
    if room < 1:
        raise InputError(
            f"a budget of {budget} holds none of {num_rows:,} rows of {row_bytes:,} bytes", hint="give more"
        )
    return room


def _most_looked_up(
    count: NDArray[np.number], left_out: NDArray[np.bool_], room: int
) -> tuple[NDArray[np.int64], float]:
    """Return the rows with the highest counts above 0, and the lowest of their counts."""
    total = float(count.sum())
    if not 0 <= total < math.inf or (len(count) and count.min() < 0):
        raise InputError("a count is negative, NaN or infinite", hint="count lookups, such as with numpy.bincount")
    found = np.flatnonzero((count > 0) & ~left_out)
    if room <= 0 or not len(found):
        return np.empty(0, np.int64), math.inf
    if len(found) > room:  # sort only those that may be taken: a log has many rows and few hot ones
        each = count[found]
        found = found[each >= np.partition(each, -room)[-room]]
    taken = found[select(count[found], room).ids]
    return taken, float(count[taken].min())


def estimate_hot_rows(
    counts: ArrayLike,
    threshold: float,
    *,
    chunks: int = 35,
    chunk_rows: int = 1024,
    confidence: float = 0.999,
    seed: int = 0,
) -> Interval:
    """Estimate how many rows have at least `threshold` lookups, from a few of them.

    Each chunk is `chunk_rows` rows drawn at random. The interval is Student's over the chunks, and no narrower than
    the binomial one, which holds also where hardly any row is found.

    Parameters
    ----------
    counts
        Lookups per row; may be a mapped file, of which only the drawn rows are read.
    threshold
        As in `HotSet`.
    chunks, chunk_rows
        With no more rows than these would draw, all are counted.
    confidence
        That the number lies below the upper end; and, likewise, above the lower one.
    seed
        Of the draw.

    Examples
    --------
    >>> counts = np.arange(1_000_000) % 100
    >>> found = estimate_hot_rows(counts, 90)
    >>> found.low < 100_000 < found.high
    True

    References
    ----------
    Adnan et al., Accelerating Recommendation System Training by Leveraging Popular Choices, VLDB 2021, section 4.
    """
    count = np.asarray(counts) if not isinstance(counts, np.ndarray) else counts
    if count.ndim != 1 or not len(count):
        raise InputError(f"counts have shape {count.shape}", hint="pass one number per row")
    if chunks < 2 or chunk_rows < 1:
        raise InputError(f"cannot estimate from {chunks} chunks of {chunk_rows} rows", hint="35 of 1024 are usual")
    if not 0.5 < confidence < 1:
        raise InputError(f"confidence must lie between 0.5 and 1, got {confidence}", hint="0.999 is usual")
    n, drawn = len(count), chunks * chunk_rows
    if n <= drawn:
        exact = float(np.count_nonzero(count >= threshold))
        return Interval(exact, exact, exact)
    rows = np.random.default_rng(seed).integers(0, n, (chunks, chunk_rows))
    found = np.count_nonzero(count[np.sort(rows, axis=1)] >= threshold, axis=1)
    student = mean_interval((found / chunk_rows).tolist(), 2 * confidence - 1)
    low, high = _binomial_bounds(int(found.sum()), drawn, 1 - confidence)
    return Interval(n * student.mean, n * max(min(student.low, low), 0.0), n * min(max(student.high, high), 1.0))


def _binomial_bounds(hits: int, draws: int, tail: float) -> tuple[float, float]:
    """Return the shares that leave so much probability to fewer hits or more (Clopper and Pearson)."""
    logs = np.cumsum(np.log(np.arange(1, draws + 1)))  # of factorials
    logs = np.concatenate(([0.0], logs))

    def at_most(k: int, share: float) -> float:
        i = np.arange(k + 1)
        chances = logs[draws] - logs[i] - logs[draws - i] + i * math.log(share) + (draws - i) * math.log1p(-share)
        return float(np.exp(chances).sum())

    def where(k: int, chance: float) -> float:
        """Return the share at which `k` hits or fewer have this chance, which falls as the share rises."""
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if at_most(k, middle) > chance else (low, middle)
        return (low + high) / 2

    return (where(hits - 1, 1 - tail) if hits else 0.0), (where(hits, tail) if hits < draws else 1.0)


def hot_inputs(
    rows: NDArray[np.int64], offsets: NDArray[np.int64] | None, width: int, hot: HotSet
) -> NDArray[np.bool_]:
    """Tell for each sample whether all the rows it looks up are hot; a sample that looks up none is.

    Parameters
    ----------
    rows
        Numbered over all tables, sample by sample.
    offsets
        Where the rows of each sample begin, and the end; None where each has `width` of them.
    hot
        The rows.

    Examples
    --------
    >>> hot = HotSet(np.array([0, 2]), 1.0, 0.5, 16, num_rows=4)
    >>> hot_inputs(np.array([0, 2, 0, 1]), None, 2, hot)
    array([ True, False])
    """
    if len(rows) and not 0 <= rows.min() <= rows.max() < hot.num_rows:
        raise InputError(
            f"the rows {rows.min()} to {rows.max()} are not all within 0 to {hot.num_rows - 1}",
            hint="number them over all tables",
        )
    check_samples(rows, offsets, width)
    return flags_of(rows, np.empty(0, np.int64) if offsets is None else offsets, width, hot.mask())


def check_samples(rows: NDArray[np.int64], offsets: NDArray[np.int64] | None, width: int) -> None:
    """Refuse lookups that do not divide into samples."""
    if offsets is None:
        right = width > 0 and len(rows) % width == 0
    else:
        right = (
            len(offsets) > 0 and offsets[0] == 0 and offsets[-1] == len(rows) and bool((np.diff(offsets) >= 0).all())
        )
    if not right:
        raise InputError(
            f"{len(rows):,} rows do not divide into samples", hint="width per sample, or offsets from 0 to the end"
        )


def flags_of(
    rows: NDArray[np.int64], offsets: NDArray[np.int64], width: int, flags: NDArray[np.uint8]
) -> NDArray[np.bool_]:
    """As `hot_inputs`, for a mask and rows that are known to be right; offsets are empty where there are none."""
    found: NDArray[np.bool_] = all_flagged(rows, offsets, width, flags)
    return found
