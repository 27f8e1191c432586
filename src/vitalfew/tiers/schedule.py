"""When rows are fetched and when they leave: one order of events for simulation and training alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitalfew.core import InputError
from vitalfew.tiers.policies import LookAhead, Policy
from vitalfew.tiers.residency import Residency
from vitalfew.tiers.window import NEVER, Window

__all__ = ["Fetch", "Schedule"]


Leave = Callable[[NDArray[np.int32]], None]


@dataclass(frozen=True, slots=True)
class Fetch:
    """Rows that a batch needs.

    Attributes
    ----------
    slots
        Of all of them, in the order of the batch.
    ids, places, into
        Of those that have to be fetched: row, place below (-1: never written), slot.
    """

    slots: NDArray[np.int32]
    ids: NDArray[np.int64]
    places: NDArray[np.int32]
    into: NDArray[np.int32]


class Schedule:
    """Batches enter the window, are loaded ahead of their turn, and finish, each in order.

    Before batch m finishes the window holds up to batch ``m + depth``; after it has, batch ``m + 1 + ahead`` is
    loaded. All decisions follow from the ids, none from the clock: the same batches give the same counts.

    Parameters
    ----------
    num_rows, num_slots, policy
        As of `Residency`.
    capacity
        Rows to retain between batches at most; None for all the slots that batches in flight leave.
    ahead
        Batches loaded before their turn. Where they do not fit beside each other, fewer are.
    depth
        Batches the window may hold beyond the one that finishes.
    entries
        Size of the window's ring.
    """

    def __init__(
        self, num_rows: int, num_slots: int, policy: Policy, *, ahead: int, depth: int, entries: int,
        capacity: int | None = None,
    ) -> None:  # fmt: skip
        self.ahead = ahead
        self.depth = max(depth, ahead + 1)
        self.capacity = capacity
        self.residency = Residency(num_rows, num_slots, policy, ring=self.depth + 2)
        self.window = Window(entries)
        self._looks = isinstance(policy, LookAhead)
        self._slots: list[NDArray[np.int32]] = []
        self.loaded = 0
        self.finished = 0

    def wants(self) -> bool:
        """Say whether the window should take another batch before the next one finishes."""
        return self.window.entered < self.finished + 1 + self.depth

    def enter(self, ids: NDArray[np.int64]) -> bool:
        """Take the ids of the next batch into the window; False where the ring is full for now."""
        batch = self.window.entered
        if not self.window.enter(ids):
            return False
        if self._looks:
            self.residency.foresee(self.window.rows(batch), batch)
        return True

    def load(self, leave: Leave) -> Fetch | None:
        """Hold the rows of the next batch; returns what to fetch, or None where it is too early for that batch.

        `leave` is called with slots whose rows have to go first.
        """
        n = self.loaded
        if n >= self.window.entered or n > self.finished + self.ahead:
            return None
        rows = self.window.rows(n)
        short = self.residency.short(rows)
        if short is None:
            if n == self.finished and self.residency.num_held == 0:
                raise InputError(
                    f"batch {n} needs {len(rows):,} rows at a time, and the memory holds {self.residency.num_slots:,}",
                    hint="give more memory, or use smaller batches",
                )
            return None
        found = self._bring(rows, n, short, leave)
        self._slots.append(found.slots)
        self.loaded += 1
        return found

    def hold(self, ids: NDArray[Any], leave: Leave) -> Fetch:
        """Hold more rows, without repeats, for the batch whose turn it is; as `load`."""
        short = self.residency.short(ids)
        if short is None:
            raise InputError(
                f"{len(ids):,} rows are needed beside those of batches in flight, and the memory holds "
                f"{self.residency.num_slots:,} in all",
                hint="give more memory, use smaller batches, or evaluate under torch.no_grad()",
            )
        found = self._bring(ids, self.finished, short, leave)
        self._slots[0] = np.concatenate([self._slots[0], found.slots])
        return found

    def _bring(self, rows: NDArray[Any], batch: int, short: int, leave: Leave) -> Fetch:
        residency = self.residency
        slots = residency.hold(rows, batch)
        if short:
            none = np.empty(0, np.int32)
            leave(
                residency.finish(none, none, batch, self.window.entered - 1, residency.retained - short, decays=False)
            )
        return Fetch(slots, *residency.admit(rows, batch, slots))

    def finish(self, *, keep: bool = False) -> NDArray[np.int32]:
        """End the turn of a batch; returns the slots to be left, see `Residency.finish`.

        With `keep` its rows go on to be held, by the turn that follows and must be loaded already.
        """
        m, residency = self.finished, self.residency
        slots, uses = self._slots.pop(0), self.window.leave()
        if len(uses) < len(slots):  # rows held beside those of the batch
            uses = np.concatenate([uses, np.full(len(slots) - len(uses), NEVER, np.int32)])
        self.finished += 1
        if keep:
            residency.held[slots] = np.maximum(residency.held[slots], m + 1)
            self._slots[0] = np.concatenate([self._slots[0], slots])
        room = residency.num_slots if self.capacity is None else self.capacity
        return residency.finish(slots, uses, m, self.window.entered - 1, room)

    def forget(self) -> None:
        """Empty the window, and count its batches from 0 again."""
        assert self.loaded == self.finished, "a batch is in flight"
        self.residency.forget()
        self.window = Window(self.window.size)
        self.loaded = self.finished = 0
