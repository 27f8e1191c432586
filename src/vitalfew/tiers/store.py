"""Rows that live partly in fast memory and partly below: one authoritative copy of each, and a hard number of slots."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitalfew.core import InputError
from vitalfew.tiers.dram import Nowhere
from vitalfew.tiers.lower import Bytes, Ids, Lower, Places
from vitalfew.tiers.record import Record
from vitalfew.tiers.rehearsal import Rehearsal
from vitalfew.tiers.residency import FREE
from vitalfew.tiers.schedule import Fetch, Schedule
from vitalfew.tiers.window import NEVER

__all__ = ["Moves", "RowStore"]

_CHUNK = 2 << 20
"""Bytes of records that are copied at a time."""

Slots = NDArray[np.int32]


@dataclass(slots=True)
class Moves:
    """What has gone between the fast memory and the tier below, in rows."""

    needed: int = 0
    """Distinct rows that batches needed."""
    missed: int = 0
    """Those of them that were not in the fast memory."""
    fresh: int = 0
    """Those of the missed that had never been written: they began here, and nothing was read."""
    left: int = 0
    """Rows that had to leave."""
    clean: int = 0
    """Those of them that had not changed, so that nothing was written."""


class RowStore:
    """The rows of a slab that a schedule brings in and takes out.

    Parameters
    ----------
    schedule
        Decides. Its directory is this store's.
    record
        The columns of the slab.
    lower
        The tier below.
    fresh
        Called as ``fresh(ids, slots)``; writes the first values of rows that were never written.
    places
        Where the tier below has rows already, -1 for none.
    buffer
        Memory for the records of a move, such as a device can reach; by default some of the store's own.

    Notes
    -----
    `lock` is held while rows move. Between moves every row that a batch in flight needs is in its slot.
    A move that fails is taken up again by the next call: nothing is lost with it.
    """

    def __init__(
        self,
        schedule: Schedule,
        record: Record,
        lower: Lower,
        fresh: Callable[[Ids, Slots], None],
        places: Places | None = None,
        buffer: Bytes | None = None,
    ) -> None:
        self.schedule = schedule
        self.residency = schedule.residency
        self.record = record
        self.lower = lower
        self.lock = threading.RLock()
        self.moves = Moves()
        self.dirty = np.zeros(self.residency.num_slots, np.uint8)
        """1 where a row has changed since it was fetched or committed; the update kernel sets it."""
        self._home = np.full(self.residency.num_slots, -1, np.int32)
        self._fresh = fresh
        if buffer is None:
            buffer = np.empty((max(1, _CHUNK // record.nbytes), record.nbytes), np.uint8)
        self._buffer, self._lines = buffer, len(buffer)
        self._closed = False
        self._leaving = np.empty(0, np.int32)
        self._arriving: list[tuple[Ids, Places, Slots]] = []
        if places is not None:
            self.residency.where[:] = np.where(places >= 0, -2 - places, -1)

    @staticmethod
    def bytes_for(num_slots: int) -> int:
        """Return the bytes this adds to the slab, the residency and the tier below."""
        return 5 * num_slots + _CHUNK

    @property
    def busy_slots(self) -> int:
        """Slots that hold a row."""
        return self.residency.num_slots - self.residency.num_free

    # -- turns

    def load(self, begin: Callable[[], None] | None = None) -> bool:
        """Bring in the rows of the next batch; False where it is too early for that.

        `begin` is called when those of its rows that are here are held, before any other moves.
        """
        self._settle()
        found = self.schedule.load(self._leave, begin)
        if found is not None:
            self._fetch(found)
        return found is not None

    def hold(self, ids: Ids, turn: int | None = None) -> None:
        """Bring in rows, without repeats, for the batch whose turn it is, beside those it came with."""
        self._settle()
        self._fetch(self.schedule.hold(ids, self._leave, turn))

    def finish(self, *, keep: bool = False) -> None:
        """End the turn of a batch; with `keep` its rows stay for the next turn, whose update they wait for."""
        self._settle()
        self._leave(self.schedule.finish(keep=keep))

    def abandon(self, rehearsal: Rehearsal | None = None) -> None:
        """Give up all turns: rows stay where they are, and none is needed any longer. Nothing is read or written.

        `rehearsal` tells what the turns to come need, where that is known.
        """
        while self._arriving:
            _, places, slots = self._arriving.pop()
            self.residency.vacate(slots, places)
        while self.schedule.loaded > self.schedule.finished:
            self._leaving = np.concatenate([self._leaving, self.schedule.finish()])
        self._leaving = np.concatenate([self._leaving, self.schedule.forget(rehearsal)])

    # -- reading beside the turns

    def peek(self, ids: Ids, out: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Copy the records of rows wherever they are; nothing moves. Returns which of them were never written."""
        self._settle()
        where = self.residency.where[ids]
        here = where >= 0
        part = np.empty((int(here.sum()), self.record.nbytes), np.uint8)
        self.record.take(where[here], part)
        out[here] = part
        below = where < -1
        if below.any():
            part = np.empty((int(below.sum()), self.record.nbytes), np.uint8)
            self.lower.read(ids[below], -2 - where[below], part)
            out[below] = part
        never: NDArray[np.bool_] = where == -1
        return never

    # -- writing beside the turns

    def fill(self, ids: Ids, records: NDArray[np.uint8]) -> None:
        """Replace rows, without repeats, while no batch is in flight. Those in slots stay there, the others go below.

        If the tier below fails, some rows that were there may count as never written.
        """
        assert self.schedule.loaded == self.schedule.finished, "a batch is in flight"
        self._settle()
        if isinstance(self.lower, Nowhere):
            self._place(ids)
        for start in range(0, len(ids), self._lines):
            some, lines = ids[start : start + self._lines], records[start : start + self._lines]
            slots = self.residency.where[some]
            here = slots >= 0
            self.record.put(slots[here], lines[here])
            self.dirty[slots[here]] = 1
            if not here.all():
                self._replace(some[~here], lines[~here])

    def _replace(self, ids: Ids, records: NDArray[np.uint8]) -> None:
        """Put rows below, in place of what was there."""
        # Looked up for each chunk: the tier below may have moved them while it took the one before.
        where = self.residency.where
        former = -2 - where[ids]
        self.lower.release(former[former >= 0])
        where[ids] = -1
        where[ids] = -2 - self.lower.write(ids, records)
        self._follow()

    def _place(self, ids: Ids) -> None:
        """Give slots to rows that have none, where all rows have room."""
        residency = self.residency
        slots = residency.hold(ids, -1)
        residency.arrived(residency.admit(ids, -1, slots)[2])
        self._home[slots] = -1
        never = np.full(len(slots), NEVER, np.int32)
        self._leave(residency.finish(slots, never, -1, -1, residency.num_slots, decays=False))

    # -- durability

    def commit(self, note: Mapping[str, Any]) -> int:
        """Make all rows durable as they are; returns how many rows had changed since the last commit."""
        self._settle()
        changed = np.flatnonzero(self.dirty).astype(np.int32)
        for start in range(0, len(changed), self._lines):
            self._write(changed[start : start + self._lines])
        where, home = self.residency.where, self._home

        def places(start: int, stop: int) -> Places:
            found = where[start:stop]
            return np.where(found >= 0, home[np.maximum(found, 0)], np.where(found < -1, -2 - found, -1)).astype(
                np.int32
            )

        try:
            self.lower.commit(places, note)
        finally:
            self._follow()
        return len(changed)

    def close(self) -> None:
        """Let go of the tier below."""
        with self.lock:
            self._closed = True
            self.lower.close()

    # -- moves

    def _settle(self) -> None:
        """Finish the moves that an error has cut off."""
        if self._closed:
            raise InputError("these rows are closed", hint="open them again with resume=True")
        self._depart()
        while self._arriving:
            self._arrive()

    def _fetch(self, found: Fetch) -> None:
        ids, places, slots = found.ids, found.places, found.into
        self.moves.needed += len(found.slots)
        self._home[slots] = places
        self.dirty[slots] = 0
        self.moves.missed += len(ids)
        never = places < 0
        if never.any():
            self.moves.fresh += int(never.sum())
            self._fresh(ids[never], slots[never])
            self.residency.arrived(slots[never])
            ids, places, slots = ids[~never], places[~never], slots[~never]
        self._arriving += [
            (ids[i : i + self._lines], places[i : i + self._lines], slots[i : i + self._lines])
            for i in range(0, len(ids), self._lines)
        ]
        while self._arriving:
            self._arrive()

    def _arrive(self) -> None:
        ids, places, slots = self._arriving[0]
        records = self._buffer[: len(ids)]
        self.lower.read(ids, places, records)
        self.record.put(slots, records)
        self.residency.arrived(slots)
        del self._arriving[0]

    def _leave(self, slots: Slots) -> None:
        self._leaving = np.concatenate([self._leaving, slots]) if len(self._leaving) else slots
        self._depart()

    def _depart(self) -> None:
        while len(self._leaving):
            slots = self._leaving[: self._lines]
            changed = self.dirty[slots] != 0
            if changed.any():
                self._write(slots[changed])
            self.moves.left += len(slots)
            self.moves.clean += len(slots) - int(changed.sum())
            self.residency.vacate(slots, self._home[slots])
            self._leaving = self._leaving[len(slots) :]

    def _write(self, slots: Slots) -> None:
        """Put changed rows below, in place of what was there; they are clean then."""
        former = self._home[slots]
        self.lower.release(former[former >= 0])
        self._home[slots] = -1
        records = self._buffer[: len(slots)]
        self.record.take(slots, records)
        try:
            self._home[slots] = self.lower.write(self.residency.row[slots].astype(np.int64), records)
            self.dirty[slots] = 0
        finally:
            self._follow()

    def _follow(self) -> None:
        """Note the new places of rows that the tier below has moved on its own."""
        moved = self.lower.moved()
        if moved is None:
            return
        ids, places = moved
        where = self.residency.where[ids]
        here = where >= 0
        self._home[where[here]] = places[here]
        self.residency.where[ids[~here]] = -2 - places[~here]

    def check(self) -> None:
        """Assert that every row is in one place and every slot in one list; for tests, it looks at all of them."""
        residency = self.residency
        resident = np.flatnonzero(residency.where >= 0)
        slots = residency.where[resident]
        assert len(np.unique(slots)) == len(slots) == self.busy_slots
        assert (residency.row[slots] == resident).all()
        assert (np.flatnonzero(residency.bucket == FREE).size) == residency.num_free
        assert int((residency.bucket >= 0).sum()) == residency.retained
