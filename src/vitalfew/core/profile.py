"""Where the work goes: counts per item, over time windows, exact or sketched."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitalfew.core.errors import InputError

__all__ = ["Profile", "profile"]


@dataclass(frozen=True, eq=False)
class Profile:
    """How much work each item did.

    Attributes
    ----------
    name
        What was counted, for people.
    ids
        int64, shape (n,), ascending: the items that were seen, or kept by the sketch.
    counts
        float64, shape (n,): work per item.
    total
        All the work, also that of items a sketch has dropped.
    windows
        float64, shape (w, n): the same by time window; their sum is `counts`.
    error
        0 when exact; else no item's count is more than this below the truth.
    """

    name: str
    ids: NDArray[np.int64]
    counts: NDArray[np.float64]
    total: float
    windows: NDArray[np.float64]
    error: float = 0.0

    @property
    def exact(self) -> bool:
        return self.error == 0

    @cached_property
    def _covered(self) -> NDArray[np.float64]:
        return np.cumsum(-np.sort(-self.counts))

    def coverage(self, k: int) -> float:
        """Return the share of the work that the k busiest items do."""
        if k < 0:
            raise InputError(f"k must not be negative, got {k}", hint="pass a number of items")
        if not self.total or not k or not len(self.counts):
            return 0.0
        return float(self._covered[min(k, len(self.counts)) - 1] / self.total)

    def items_for(self, share: float) -> int:
        """Return the fewest items that do this share of the work (a sketch may have dropped some: then all it has)."""
        if not 0 <= share <= 1:
            raise InputError(f"a share must lie in [0, 1], got {share}", hint="90 % is 0.9")
        if not self.total or share == 0:
            return 0
        return min(int(np.searchsorted(self._covered, share * self.total * (1 - 1e-12))) + 1, len(self.counts))

    def curve(self, points: int = 60) -> list[tuple[float, float]]:
        """Return (share of the items seen, share of the work) at log-spaced points, for a chart."""
        n = len(self.counts)
        if not n:
            return []
        ks = np.unique(np.geomspace(1, n, points).round().astype(int))
        return [(k / n, self.coverage(int(k))) for k in ks]

    def skew(self) -> float:
        """Return the Gini coefficient of the counts: 0 when all items do equal work, towards 1 when one does all."""
        n = len(self.counts)
        if n < 2 or not self.counts.sum():
            return 0.0
        ascending = np.sort(self.counts)
        return float(2 * (np.arange(1, n + 1) @ ascending) / (n * ascending.sum()) - (n + 1) / n)

    def drift(self) -> float:
        """Return the total variation distance between the first and the last window, 0 (same) to 1 (disjoint)."""
        if len(self.windows) < 2:
            return 0.0
        first, last = self.windows[0], self.windows[-1]
        if not first.sum() or not last.sum():
            return 0.0
        return float(np.abs(first / first.sum() - last / last.sum()).sum() / 2)


def profile(windows: Iterable[ArrayLike], *, name: str = "items", capacity: int = 50_000_000) -> Profile:
    """Count how often each id occurs, window by window.

    Parameters
    ----------
    windows
        One array of integer ids per time window, any order inside; read once.
    name
        What is counted, for people.
    capacity
        Counting is exact up to this many distinct ids; beyond it the rarest are dropped (a mergeable Misra-Gries
        summary: Agarwal et al., "Mergeable summaries", PODS 2012) and `Profile.error` bounds what any id may have lost.

    Examples
    --------
    >>> p = profile([[1, 1, 2], [1, 3]])
    >>> p.ids, p.counts, p.items_for(0.6)
    (array([1, 2, 3]), array([3., 1., 1.]), 1)
    """
    if capacity < 1:
        raise InputError(f"capacity must be at least 1, got {capacity}", hint="pass a number of ids")
    ids = np.empty(0, np.int64)
    table = np.empty((0, 0))
    total = error = 0.0
    for window in windows:
        array = np.asarray(window)
        if array.size and not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"ids must be integers, got {array.dtype}", hint="encode them first")
        if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
            raise InputError(f"the id {array.max()} does not fit 64 signed bits", hint="encode them first")
        new, count = np.unique(array.astype(np.int64, copy=False).reshape(-1), return_counts=True)
        total += float(count.sum())
        merged = np.union1d(ids, new)
        grown = np.zeros((len(table) + 1, len(merged)))
        grown[:-1, np.searchsorted(merged, ids)] = table
        grown[-1, np.searchsorted(merged, new)] = count
        ids, table = merged, grown
        if len(ids) > capacity:
            sums = table.sum(axis=0)
            cut = np.partition(sums, -capacity - 1)[-capacity - 1]
            keep = sums > cut
            ids, table = ids[keep], table[:, keep] * (1 - cut / sums[keep])
            error += float(cut)
    return Profile(name, ids, table.sum(axis=0), total, table, error)
