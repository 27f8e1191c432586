"""When rows are fetched and when they leave: one order of events for simulation and training alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitalfew.core import InputError
from vitalfew.tiers.policies import LookAhead, Policy
from vitalfew.tiers.rehearsal import Rehearsal
from vitalfew.tiers.residency import Residency
from vitalfew.tiers.window import NEVER, Window, distinct

__all__ = ["Fetch", "Schedule"]


Leave = Callable[[NDArray[np.int32]], None]
Begin = Callable[[], None]
_NO_SLOTS = np.empty(0, np.int32)


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
        self.rehearsal: Rehearsal | None = None
        self._uses: list[NDArray[np.int32]] = []
        self._slots: list[NDArray[np.int32]] = []
        self._kept = _NO_SLOTS
        self.loaded = 0
        self.finished = 0

    def wants(self) -> bool:
        """Say whether the window should take another batch before the next one finishes."""
        return self.window.entered < self.finished + 1 + self.depth

    def enter(self, ids: NDArray[np.int64]) -> bool:
        """Take the ids of the next batch into the window; False where the ring is full for now."""
        batch = self.window.entered
        if not (self.window.enter(ids) or self.window.enter(distinct(ids))):
            return False
        if self.rehearsal is not None:
            self._uses.append(self.rehearsal.uses(batch, self.window.rows(batch)))
        if self._looks:
            self.residency.foresee(self.window.rows(batch), batch)
        return True

    def load(self, leave: Leave, begin: Begin | None = None) -> Fetch | None:
        """Hold the rows of the next batch; returns what to fetch, or None where it is too early for that batch.

        `leave` is called with slots whose rows have to go first; before that `begin`, when those rows of the batch are
        held that are here.
        """
        n = self.loaded
        if n >= self.window.entered or n > self.finished + self.ahead:
            return None
        rows = self.window.rows(n)
        short = self.residency.short(rows)
        if short is None:
            if n == self.finished and len(self._kept):
                raise InputError(
                    f"gradients wait for a step, and the {len(self._kept):,} rows of theirs leave no room for the "
                    f"{len(rows):,} of batch {n}: the memory holds {self.residency.num_slots:,}",
                    hint="step more often, give more memory, or use smaller batches",
                )
            if n == self.finished:
                raise InputError(
                    f"batch {n} needs {len(rows):,} rows at a time, and the memory holds {self.residency.num_slots:,}",
                    hint="give more memory, or use smaller batches",
                )
            return None
        found = self._bring(rows, n, short, leave, begin)
        self._slots.append(found.slots)
        if len(self._kept):
            self._slots[0] = np.concatenate([found.slots, np.setdiff1d(self._kept, found.slots)])
            self._kept = _NO_SLOTS
        self.loaded += 1
        return found

    def hold(self, ids: NDArray[Any], leave: Leave, turn: int | None = None) -> Fetch:
        """Hold more rows, without repeats, for a loaded batch, by default the one whose turn it is; as `load`."""
        turn = self.finished if turn is None else turn
        if turn >= self.loaded:
            raise InputError(f"the rows of batch {turn} have not come", hint="leave the loop: its thread has failed")
        short = self.residency.short(ids)
        if short is None:
            raise InputError(
                f"{len(ids):,} rows are needed beside those of batches in flight, and the memory holds "
                f"{self.residency.num_slots:,} in all",
                hint="give more memory, use smaller batches, or evaluate under torch.no_grad()",
            )
        found = self._bring(ids, turn, short, leave)
        at = turn - self.finished
        self._slots[at] = np.concatenate([self._slots[at], found.slots])
        return found

    def _bring(self, rows: NDArray[Any], batch: int, short: int, leave: Leave, begin: Begin | None = None) -> Fetch:
        residency = self.residency
        last_known = self._last_known()
        slots = residency.hold(rows, batch)
        if begin is not None:
            begin()
        if short:
            none = _NO_SLOTS
            leave(residency.finish(none, none, batch, last_known, residency.retained - short, decays=False))
        return Fetch(slots, *residency.admit(rows, batch, slots))

    def _last_known(self) -> int:
        return (self.window.entered if self.rehearsal is None else len(self.rehearsal)) - 1

    def finish(self, *, keep: bool = False) -> NDArray[np.int32]:
        """End the turn of a batch; returns the slots to be left, see `Residency.finish`.

        With `keep` its rows go on to be held, by the turn that follows.
        """
        m, residency = self.finished, self.residency
        slots, uses = self._slots.pop(0), self.window.leave()
        last_known = self._last_known()
        if self.rehearsal is not None:
            uses = self._uses.pop(0)
        if len(uses) < len(slots):  # rows held beside those of the batch
            uses = np.concatenate([uses, np.full(len(slots) - len(uses), NEVER, np.int32)])
        self.finished += 1
        if keep:
            kept = np.unique(slots[residency.held[slots] <= m])  # the others belong to a later batch as well
            residency.held[kept] = m + 1
            if self._slots:
                self._slots[0] = np.concatenate([self._slots[0], kept])
            else:
                self._kept = kept
        room = residency.num_slots if self.capacity is None else self.capacity
        return residency.finish(slots, uses, m, last_known, room)

    def forget(self, rehearsal: Rehearsal | None = None) -> NDArray[np.int32]:
        """Empty the window, and count its batches from 0 again; maybe with a pass that is known beforehand.

        Returns slots to be left, as `finish`.
        """
        assert self.loaded == self.finished, "a batch is in flight"
        # Rows kept for a turn that never came, and those of a batch whose loading has failed.
        held = self.residency.all_held()
        self.residency.held[held] = -1
        room = self.residency.num_slots if self.capacity is None else self.capacity
        never = np.full(len(held), NEVER, np.int32)
        gone = self.residency.finish(held, never, 0, self._last_known(), room, decays=False)
        self._kept = _NO_SLOTS
        self.rehearsal = rehearsal
        self._uses = []
        self.residency.forget(None if rehearsal is None else len(rehearsal) + 1)
        self.window = Window(self.window.size)
        self.loaded = self.finished = 0
        return gone
