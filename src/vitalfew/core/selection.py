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
        A newcomer replaces a kept item only when its score is more than ``1 + bonus`` times as high.

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
    if bonus < 0:
        raise InputError(f"bonus must not be negative, got {bonus}", hint="0 turns it off")
    if limit.kind == "bytes" and costs is None:
        raise InputError("a size budget needs the bytes per item", hint="pass costs=")
    cost = np.broadcast_to(np.asarray(1.0 if costs is None else costs, np.float64), score.shape)
    if np.any(~np.isfinite(cost) | (cost <= 0)):
        raise InputError("costs must be finite and positive", hint="drop items that cost nothing")

    rank = score.copy()
    if kept is not None:
        ids = np.asarray(kept, np.int64).reshape(-1)
        if len(ids) and (ids.min() < 0 or ids.max() >= len(score)):
            raise InputError(f"kept names item {ids.max()}, there are {len(score)}", hint="pass ids of these scores")
        rank[ids] *= 1 + bonus
    if limit.kind == "bytes":
        rank = rank / cost
    order = np.argsort(-rank, kind="stable")

    total = float(score.sum())
    if limit.kind == "coverage":
        covered = np.cumsum(score[order])
        count = int(np.searchsorted(covered, limit.value * total * (1 - 1e-12))) + 1 if limit.value * total > 0 else 0
    elif limit.kind == "bytes":
        count = int(np.searchsorted(np.cumsum(cost[order]), limit.value, side="right"))
    elif limit.kind == "share":
        count = int(limit.value * len(score) + 1e-9)
    else:
        count = int(limit.value)
    chosen = order[: min(count, len(order))]
    coverage = float(score[chosen].sum()) / total if total else 0.0
    return Selection(chosen, min(coverage, 1.0), float(cost[chosen].sum()), len(score))
