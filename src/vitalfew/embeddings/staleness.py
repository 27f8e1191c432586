"""Which rows have stopped moving, and which inputs train little else: functions of a history, without any tables."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitalfew.core import InputError

__all__ = [
    "RowHistory",
    "logit_shift",
    "next_threshold",
    "on_probation",
    "quiet_windows",
    "skippable_inputs",
    "stale_rows",
]

Flags = NDArray[np.bool_]


@dataclass(slots=True)
class RowHistory:
    """What is known of each watched row at the end of a window; one entry per row in every array.

    Attributes
    ----------
    change
        How far the row has moved since its snapshot, relative to its length there.
    recent
        Updates since the snapshot.
    visits
        Updates in all.
    quiet
        Windows before this one, without a break, in which the row was looked at and had hardly moved.
    peak
        The largest change of any window so far, or of the time before it was watched.
    """

    change: NDArray[np.float32]
    recent: NDArray[np.int64]
    visits: NDArray[np.int64]
    quiet: NDArray[np.int32]
    peak: NDArray[np.float32]

    @classmethod
    def of(cls, num_rows: int) -> RowHistory:
        """Return the history of rows of which nothing is known."""
        counts, changes = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.float32)
        return cls(changes, counts, counts.copy(), np.zeros(num_rows, np.int32), changes.copy())

    def __len__(self) -> int:
        return len(self.change)


def quiet_windows(
    history: RowHistory, *, max_change: float, min_visits: int, warm_up: float
) -> NDArray[np.int32]:  # fmt: skip
    """Return for how many windows without a break each row has been quiet, this one included.

    A row is quiet in a window when it was updated often enough and moved less than `max_change`, is warm, and once
    moved by `max_change` or more: what has never moved has not begun to learn. A row that was updated too rarely
    keeps its number.

    Examples
    --------
    >>> h = RowHistory.of(4)
    >>> h.change[:], h.peak[:] = [0.01, 0.5, 0.01, 0.01], [0.8, 0.8, 0.8, 0.01]
    >>> h.recent[:], h.visits[:], h.quiet[:] = [20, 20, 2, 20], 500, 3
    >>> quiet_windows(h, max_change=0.1, min_visits=10, warm_up=100).tolist()
    [4, 0, 3, 0]
    """
    looked_at = history.recent >= min_visits
    settled = (history.change < max_change) & (history.peak >= max_change) & (history.visits >= warm_up)
    return np.where(looked_at, np.where(settled, history.quiet + 1, 0), history.quiet).astype(np.int32)


def stale_rows(
    history: RowHistory, *, max_change: float, min_visits: int = 10, warm_up: float = 100, windows: int = 2
) -> Flags:  # fmt: skip
    """Say of each watched row whether it has stopped moving, so that training it further gains little.

    Parameters
    ----------
    history
        At the end of a window.
    max_change
        Relative change per window below which a row is quiet; 0 makes no row stale.
    min_visits
        Updates since the snapshot that a judgement needs.
    warm_up
        Updates in all before a row may be quiet.
    windows
        Quiet windows it takes, without a break.

    Examples
    --------
    >>> h = RowHistory.of(2)
    >>> h.change[:], h.peak[:], h.recent[:], h.visits[:], h.quiet[:] = 0.02, 0.9, 50, [900, 60], 1
    >>> stale_rows(h, max_change=0.1)
    array([ True, False])

    Notes
    -----
    A row that was not looked at in this window is not stale by it.

    References
    ----------
    Maboud et al., arXiv 2404.04270. Visits, warm-up, windows and the peak are ours.
    """
    _check(max_change, min_visits, warm_up, windows)
    quiet = quiet_windows(history, max_change=max_change, min_visits=min_visits, warm_up=warm_up)
    return (quiet >= windows) & (history.recent >= min_visits)


def _check(max_change: float, min_visits: int, warm_up: float, windows: int) -> None:
    if not (math.isfinite(max_change) and max_change >= 0):
        raise InputError(f"max_change must be finite and not negative, got {max_change}", hint="0.1 is a tenth")
    if min_visits < 1 or windows < 1:
        raise InputError(
            f"min_visits and windows must be 1 or more, got {min_visits} and {windows}", hint="10 and 2 are usual"
        )
    if not warm_up >= 0:
        raise InputError(f"warm_up must not be negative, got {warm_up}", hint="float('inf') keeps all rows in training")


def on_probation(rows: ArrayLike, window: int, revisit: int, seed: int = 0) -> Flags:
    """Say which stale rows are trained in a window all the same: each of them in one of `revisit` windows.

    Examples
    --------
    >>> sum(on_probation([7, 8], window, 4).astype(int) for window in range(4)).tolist()
    [1, 1]
    """
    if revisit < 1:
        raise InputError(f"revisit must be 1 or more, got {revisit}", hint="8 looks at a row in every eighth window")
    mixed = np.asarray(rows, np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    turn = (mixed >> np.uint64(33)) % np.uint64(revisit)
    chosen: Flags = (turn + np.uint64(window % revisit)) % np.uint64(revisit) == 0
    return chosen


def skippable_inputs(rows: ArrayLike, offsets: ArrayLike | None, width: int, stale: ArrayLike, share: float) -> Flags:
    """Say of each sample whether a share of its lookups, or more, are of stale rows.

    Parameters
    ----------
    rows
        Row of each lookup, sample by sample.
    offsets
        Where each bag begins, and the end; None for one lookup per feature.
    width
        Features of a sample.
    stale
        One flag per row.
    share
        In (0, 1].

    Examples
    --------
    >>> skippable_inputs([0, 1, 0, 2], None, 2, [True, True, False], 1.0)
    array([ True, False])

    Notes
    -----
    A sample without lookups is never skipped. Cost: one pass over the lookups.
    """
    from vitalfew.embeddings import _kernels_stale as kernels

    if not 0 < share <= 1:
        raise InputError(f"share must lie in (0, 1], got {share}", hint="0.8 skips inputs with 4 of 5 rows stale")
    flat = np.ascontiguousarray(rows, np.int64).reshape(-1)
    flags = np.ascontiguousarray(stale).view(np.uint8)
    edges = np.empty(0, np.int64) if offsets is None else np.ascontiguousarray(offsets, np.int64)
    count, rest = divmod(len(flat) if offsets is None else len(edges) - 1, width)
    if rest:
        raise InputError(f"the lookups do not divide among {width} features", hint="pass whole samples")
    if len(flat) and not 0 <= flat.min() <= flat.max() < len(flags):
        raise InputError(f"row {flat.max()} has no flag, there are {len(flags)}", hint="pass one flag per row")
    out = np.empty(count, np.bool_)
    kernels.skippable(flat, edges, width, flags, share, out)
    return out


def next_threshold(
    threshold: float, ceiling: float, loss: float, best: float, change: NDArray[np.float32],
    visits: NDArray[np.int64], *, target: float = 0.5, tolerance: float = 0.001,
) -> tuple[float, float]:  # fmt: skip
    """Return the largest change at which rows are stale in the next window, and the ceiling for all to come.

    While the loss holds, the threshold is the largest at which the rows below it take no more than a share `target`
    of the visits. A loss worse than the best by more than `tolerance` halves it, and it never rises above that again.

    Examples
    --------
    >>> import numpy as np
    >>> change, visits = np.float32([0.1, 0.2, 0.4, 0.8]), np.array([10, 10, 10, 10])
    >>> threshold, ceiling = next_threshold(0.0, float("inf"), 0.50, 0.50, change, visits)
    >>> round(threshold, 3), ceiling
    (0.4, inf)
    >>> next_threshold(0.4, float("inf"), 0.51, 0.50, change, visits)  # worse: back to half
    (0.2, 0.2)
    """
    if not 0 < target < 1:
        raise InputError(f"target must lie between 0 and 1, got {target}", hint="0.5 skips half of the work at most")
    if not math.isfinite(loss):
        raise InputError(f"the validation loss is {loss}", hint="lower the learning rate, or mend validate=")
    if loss > best + tolerance * abs(best):
        half = min(threshold, ceiling) / 2
        return half, half
    if not len(change):
        return min(threshold, ceiling), ceiling
    order = np.argsort(change, kind="stable")
    shares = np.cumsum(visits[order]) / max(int(visits.sum()), 1)
    first = int(np.searchsorted(shares, target, side="right"))  # of those that must go on
    proposal = float(change[order[min(first, len(order) - 1)]])
    return min(proposal, ceiling), ceiling


def logit_shift(seen: tuple[int, float], kept: tuple[int, float]) -> float:
    """Return what to add to the last bias of a model that was trained on the inputs kept of all that were seen.

    Parameters
    ----------
    seen, kept
        Inputs, and how many of them have label 1.

    Examples
    --------
    >>> round(logit_shift((1000, 200), (500, 150)), 4)  # clicks were 20 % of all, and 30 % of what was kept
    -0.539
    """

    def logit(count: int, clicks: float) -> float:
        return math.log((clicks + 0.5) / (count - clicks + 0.5))  # finite also where all labels are the same

    return logit(*seen) - logit(*kept) if seen != kept else 0.0
