"""What a policy would move, counted on a trace of ids without moving anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitalfew.core import InputError
from vitalfew.tiers.policies import Belady, LookAhead, Policy
from vitalfew.tiers.schedule import Schedule

__all__ = ["Simulated", "lower_bound", "simulate"]


@dataclass(frozen=True, slots=True)
class Simulated:
    """What one policy would move on one trace.

    Attributes
    ----------
    policy, capacity
        What was simulated: its name, and the rows retained between batches.
    accesses, unique
        Ids of the trace, and the same with the repeats inside each batch left out.
    misses
        Rows that had to be fetched, the first use of each included.
    first_uses
        Those of them that no memory could have saved.
    evicted, drained
        Rows given up on the way, and those left at the end.
    per_batch
        Misses of each batch.
    """

    policy: str
    capacity: int
    accesses: int
    unique: int
    misses: int
    first_uses: int
    evicted: int
    drained: int
    per_batch: NDArray[np.int64]

    @property
    def miss_ratio(self) -> float:
        """Misses per row that a batch needs."""
        return self.misses / self.unique if self.unique else 0.0


def simulate(
    ids: ArrayLike,
    offsets: ArrayLike,
    policy: Policy,
    capacity: int,
    *,
    ahead: int = 0,
    slots: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Simulated:
    """Count what a policy would fetch and give up, batch by batch.

    Parameters
    ----------
    ids
        Row ids over all tables, one batch after the other.
    offsets
        Where each batch begins, and the end.
    capacity
        Rows retained between batches. The rows of batches in flight are held beside them.
    ahead
        Batches whose rows are fetched before their turn.
    slots
        Rows there is room for in all, those of batches in flight included; by default as many as that takes.

    Examples
    --------
    >>> from vitalfew.tiers import LRU, LookAhead
    >>> ids, offsets = [1, 2, 3, 1, 4, 1], [0, 1, 2, 3, 4, 5, 6]
    >>> simulate(ids, offsets, LRU(), 1).misses, simulate(ids, offsets, LookAhead(), 1).misses
    (6, 4)

    Notes
    -----
    The same code decides in a training run, so the counts are those of the run.
    """
    flat = np.ascontiguousarray(ids, np.int64)
    edges = np.ascontiguousarray(offsets, np.int64)
    if len(edges) < 1 or edges[0] != 0 or edges[-1] != len(flat) or (np.diff(edges) < 0).any():
        raise InputError("offsets must rise from 0 to the number of ids", hint="one entry per batch and the end")
    if capacity < 0:
        raise InputError(f"capacity must not be negative, got {capacity}", hint="0 retains nothing")
    if len(flat) and flat.min() < 0:
        raise InputError(f"an id is negative: {flat.min()}", hint="number the rows from 0")
    if len(flat) and flat.max() >= max(4 * len(flat), 2**24):  # far apart: number them anew
        _, flat = np.unique(flat, return_inverse=True)
    batches = len(edges) - 1
    sizes = np.diff(edges)
    largest = int(sizes.max(initial=1))
    if isinstance(policy, Belady):
        policy = LookAhead(depth=2**30, decay_every=policy.decay_every)
    depth = min(policy.depth, batches) if isinstance(policy, LookAhead) else 0
    span = max(depth, ahead) + 2
    entries = int(np.convolve(sizes, np.ones(span, np.int64)).max(initial=1)) if batches else 1
    num_rows = int(flat.max(initial=0)) + 1
    schedule = Schedule(
        num_rows, min(capacity, num_rows) + (ahead + 2) * largest if slots is None else slots, policy,
        capacity=capacity, ahead=ahead, depth=depth, entries=entries,
    )  # fmt: skip
    per_batch = np.zeros(batches, np.int64)
    unique = evicted = first_uses = entered = 0

    def vacate(gone: NDArray[np.int32]) -> None:
        nonlocal evicted
        schedule.residency.vacate(gone, np.zeros(len(gone), np.int32))
        evicted += len(gone)

    for done in range(batches + 1):
        while entered < batches and schedule.wants():
            schedule.enter(flat[edges[entered] : edges[entered + 1]])
            entered += 1
        if done:
            vacate(schedule.finish())
        while (found := schedule.load(vacate)) is not None:
            schedule.residency.arrived(found.into)
            per_batch[schedule.loaded - 1] = len(found.ids)
            unique += len(found.slots)
            first_uses += int((found.places < 0).sum())
        if progress is not None and done % 64 == 0:
            progress(done / batches)
    left = schedule.residency.retained
    return Simulated(
        policy.name if depth < batches or not isinstance(policy, LookAhead) else "belady",
        capacity, len(flat), unique, int(per_batch.sum()), first_uses, evicted, left, per_batch,
    )  # fmt: skip


def lower_bound(ids: ArrayLike, offsets: ArrayLike, capacity: int) -> int:
    """Return the fewest rows that any policy could fetch on a trace, with that many retained between batches.

    Keeping the rows with the nearest next use is optimal for rows of one size; each fetched row is also written back
    once, so the bound holds for both ways.

    Examples
    --------
    >>> lower_bound([1, 2, 3, 1, 4, 1], [0, 1, 2, 3, 4, 5, 6], 1)
    4
    """
    return simulate(ids, offsets, Belady(), capacity).misses
