"""Choose the few: the highest scores that fit a budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitalfew.core.budget import Budget
from vitalfew.core.errors import InputError

__all__ = ["Selection", "select"]


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """The chosen items, best first.

    Attributes
    ----------
    ids
        int64, shape (k,), best first.
    coverage
        Share of the total score that the chosen items hold, in [0, 1].
    cost
        Sum of their costs: bytes where costs are bytes, else the number of items.
    num_items
        How many items there were to choose from.
    """

    ids: NDArray[np.int64]
    coverage: float
    cost: float
    num_items: int

    def __len__(self) -> int:
        return len(self.ids)

    def mask(self) -> NDArray[np.bool_]:
        """Return one flag per item, True where it is chosen."""
        flags = np.zeros(self.num_items, bool)
        flags[self.ids] = True
        return flags


def _scores(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise InputError(f"{name} must have one dimension, got shape {array.shape}", hint="pass one number per item")
    bad = np.flatnonzero(~np.isfinite(array) | (array < 0))
    if len(bad):
        raise InputError(
            f"{name} must be finite and not negative, item {bad[0]} has {array[bad[0]]}", hint="mend or drop that item"
        )
    return array


def _costs(values: ArrayLike, n: int) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.shape not in ((), (n,)):
        raise InputError(f"costs have shape {array.shape}, there are {n} scores", hint="pass one, or one per score")
    array = np.broadcast_to(array, n)
    bad = np.flatnonzero(~np.isfinite(array) | (array <= 0))
    if len(bad):
        raise InputError(
            f"costs must be finite and positive, item {bad[0]} has {array[bad[0]]}", hint="drop items that cost nothing"
        )
    return array


def _kept(values: ArrayLike, n: int) -> NDArray[np.int64]:
    array = np.asarray(values).reshape(-1)
    if len(array) and not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"kept must hold ids, got {array.dtype}", hint="pass Selection.ids of the last time")
    bad = array[(array < 0) | (array >= n)]
    if len(bad):
        raise InputError(f"kept names item {bad[0]}, there are {n}", hint="pass ids of these scores")
    return array.astype(np.int64)


def select(
    scores: ArrayLike,
    budget: Budget | float | int | str,
    *,
    costs: ArrayLike | float | None = None,
    kept: ArrayLike | None = None,
    bonus: float = 0.0,
) -> Selection:
    """Return the highest scores that fit the budget, best first.

    Parameters
    ----------
    scores
        One number per item, finite and not negative.
    budget
        A share (0.1), a count (512), a size ("256 MiB") or a `Budget`.
    costs
        Bytes per item, one number or one per item; needed for a size. With unequal costs the items are taken by
        score per byte, up to the first that does not fit: more budget never covers less.
    kept
        Ids chosen the last time. Together with `bonus` they make the choice calm.
    bonus
        A newcomer replaces a kept item only when its score (for a size: per byte) is more than ``1 + bonus`` times as
        high; 0 is off, and `kept` then changes nothing.

    Raises
    ------
    InputError
        For NaN, infinite or negative scores, costs that are not positive, or a size without costs.

    Examples
    --------
    >>> select([5, 0, 9], 2).ids
    array([2, 0])
    >>> select([5, 4, 1], 1, kept=[1], bonus=0.5).ids
    array([1])

    Notes
    -----
    Ties go to the lower id. Cost: one sort, O(n log n), on the host.
    """
    score = _scores(scores, "scores")
    limit = Budget.of(budget)
    if not 0 <= bonus < np.inf:
        raise InputError(f"bonus must be finite and not negative, got {bonus}", hint="0 turns it off")
    if limit.kind == "bytes" and costs is None:
        raise InputError(f"a budget of {limit} needs the bytes per item", hint="pass costs=")
    cost = _costs(1.0 if costs is None else costs, len(score))

    rank = score / cost if limit.kind == "bytes" else score.copy()
    if kept is not None:
        ids = _kept(kept, len(score))
        if bonus:
            rank[ids] = np.nextafter(rank[ids] * (1 + bonus), np.inf)  # a tie stays with the kept
    order = np.argsort(-rank, kind="stable")

    total = float(score.sum())
    if limit.kind == "coverage":
        covered = np.cumsum(score[order])
        count = int(np.searchsorted(covered, limit.value * covered[-1] * (1 - 1e-12))) + 1 if limit.value * total else 0
    elif limit.kind == "bytes":
        count = int(np.searchsorted(np.cumsum(cost[order]), limit.value, side="right"))
    elif limit.kind == "share":
        count = int(limit.value * len(score) * (1 + 1e-12))
    else:
        count = int(limit.value)
    chosen = order[: min(count, len(order))]
    coverage = float(score[chosen].sum()) / total if total else 0.0
    return Selection(chosen, min(coverage, 1.0), float(cost[chosen].sum()), len(score))
