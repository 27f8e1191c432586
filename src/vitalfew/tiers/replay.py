"""What a training run over `Prefetch` will move, counted on its batches without moving anything."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitalfew.core import InputError
from vitalfew.tiers.schedule import Schedule

__all__ = ["Replayed", "replay"]


@dataclass(slots=True)
class Replayed:
    """What a run moves, in rows; the fields of `Moves`, counted beforehand.

    Attributes
    ----------
    steps
        Batches.
    needed, missed, fresh, left
        Distinct rows that batches need, those of them that are fetched, those of these that were never written, and
        rows that have to leave.
    """

    steps: int = 0
    needed: int = 0
    missed: int = 0
    fresh: int = 0
    left: int = 0

    @property
    def miss_ratio(self) -> float:
        """Rows fetched per row that a batch needs."""
        return self.missed / self.needed if self.needed else 0.0


def replay(
    batches: Iterable[tuple[NDArray[np.int64], int]],
    schedule: Schedule,
    *,
    queue_bytes: int = sys.maxsize,
    below: NDArray[Any] | None = None,
) -> Replayed:
    """Count what a run over these batches moves, in the order of events of `Prefetch`.

    Parameters
    ----------
    batches
        Row ids over all tables, with the bytes of the whole batch. Read once; no more of them are held than the run
        would hold.
    schedule
        As the run's: same slots, policy, depth and window. It is used up.
    queue_bytes
        How many bytes of batches may wait for their turn.
    below
        Rows that lie below at the start, as ids or flags; the others are fresh when they are first needed.

    Raises
    ------
    InputError
        If a batch needs more rows at a time than there is room for.

    Examples
    --------
    >>> from vitalfew.tiers import LRU
    >>> batches = [(np.array([1, 2]), 16), (np.array([3, 4]), 16), (np.array([1, 2]), 16)]
    >>> schedule = Schedule(5, num_slots=2, policy=LRU(), ahead=0, depth=1, entries=8)
    >>> replay(batches, schedule)
    Replayed(steps=3, needed=6, missed=6, fresh=4, left=4)

    Notes
    -----
    The counts are those of the run, but for one case: a batch that is given late, because its rows come late, may
    still count against `queue_bytes` when the window is filled again, and the window then sees one batch less.
    """
    if below is not None:
        schedule.residency.where[below] = -2
    return _Replay(batches, schedule, queue_bytes).run()


class _Replay:
    """The steps of the thread of `Prefetch`, with a loop that takes each batch as soon as its rows are there."""

    def __init__(self, batches: Iterable[tuple[NDArray[np.int64], int]], schedule: Schedule, queue_bytes: int) -> None:
        self._source, self._schedule, self._queue_bytes = iter(batches), schedule, queue_bytes
        self._sizes: list[int] = []  # of batches that have entered and were not given
        self._parked: tuple[NDArray[np.int64], int] | None = None
        self._ended = False
        self._found = Replayed()

    def run(self) -> Replayed:
        schedule, found = self._schedule, self._found
        self._fill(schedule.ahead + 1)
        self._load()
        self._fill()
        while True:
            self._load()
            if schedule.loaded == schedule.finished:
                break
            self._vacate(schedule.finish())
            found.steps += 1
            self._load()
            self._fill()
        return found

    def _vacate(self, slots: NDArray[np.int32]) -> None:
        self._schedule.residency.vacate(slots, np.zeros(len(slots), np.int32))
        self._found.left += len(slots)

    def _load(self) -> None:
        found = self._found
        while (fetch := self._schedule.load(self._vacate)) is not None:
            self._schedule.residency.arrived(fetch.into)
            found.needed += len(fetch.slots)
            found.missed += len(fetch.ids)
            found.fresh += int((fetch.places < 0).sum())
        given = min(self._schedule.finished + 1, self._schedule.loaded)
        del self._sizes[: len(self._sizes) - (self._schedule.window.entered - given)]

    def _fill(self, at_most: int | None = None) -> None:
        schedule = self._schedule
        while not self._ended:
            entered = schedule.window.entered
            if (at_most is not None and entered >= at_most) or not schedule.wants():
                return
            if sum(self._sizes) >= self._queue_bytes and entered > schedule.loaded + 1:
                return
            if self._parked is None and (found := next(self._source, None)) is not None:
                self._parked = found
            if self._parked is None:
                self._ended = True
                return
            ids, size = self._parked
            if not schedule.enter(ids):
                if entered == schedule.loaded == schedule.finished:
                    raise InputError(f"a batch of {len(ids):,} ids does not fit the window", hint="give more memory")
                return
            self._parked = None
            self._sizes.append(size)
