# mypy: disable-error-code="assignment"
# A variable of a kernel has one machine type, which numba infers; mypy sees the widest of several.

"""Which rows are in the fast memory, in which slot, and who has to leave. No bytes move here."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from vitalfew.core import InputError
from vitalfew.tiers.policies import LFU, Belady, Chaos, LookAhead, Policy, Static
from vitalfew.tiers.window import NEVER

__all__ = ["Residency"]

_LRU, _LFU, _STATIC, _AHEAD, _CHAOS = 0, 1, 2, 3, 4
COUNTS = 256
"""Buckets of rows by how often they were used; those of rows with a known next use come after them."""
HELD, LOADING, FREE, LEAVING = -1, -2, -3, -4
"""In place of a bucket: needed by a batch in flight, on its way in, no row, on its way out."""


@njit(inline="always")
def _unlink(slot: Any, bucket: Any, before: Any, after: Any, heads: Any, tails: Any) -> None:
    b, p, n = bucket[slot], before[slot], after[slot]
    if p >= 0:
        after[p] = n
    else:
        heads[b] = n
    if n >= 0:
        before[n] = p
    else:
        tails[b] = p


@njit(inline="always")
def _link(slot: Any, b: Any, bucket: Any, before: Any, after: Any, heads: Any, tails: Any) -> None:
    bucket[slot] = b
    before[slot] = tails[b]
    after[slot] = -1
    if tails[b] >= 0:
        after[tails[b]] = slot
    else:
        heads[b] = slot
    tails[b] = slot


@njit(inline="always")
def _hash(a: Any, b: Any) -> Any:
    x = (np.uint64(a) * np.uint64(0x9E3779B97F4A7C15)) ^ (np.uint64(b) * np.uint64(0xD1342543DE82EF95))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return x ^ (x >> np.uint64(31))


@njit(nogil=True, cache=True)
def _tally(ids: Any, where: Any, bucket: Any) -> Any:
    """Count the distinct ids that have no slot, and those whose row is retained."""
    missing = retained = 0
    for id_ in ids:
        slot = where[id_]
        if slot < 0:
            missing += 1
        else:
            retained += bucket[slot] >= 0
    return missing, retained


@njit(nogil=True, cache=True)
def _hold(
    ids: Any, batch: Any, where: Any, held: Any, bucket: Any, before: Any, after: Any, heads: Any, tails: Any,
    visits: Any, slots: Any,
) -> Any:  # fmt: skip
    """Hold the rows that are here for a batch; those that are not get the slot -1. Returns how many were retained."""
    taken = 0
    for i in range(len(ids)):
        id_ = ids[i]
        slot = where[id_]
        slots[i] = max(slot, -1)
        if slot < 0:
            continue
        if bucket[slot] >= 0:
            _unlink(slot, bucket, before, after, heads, tails)
            bucket[slot] = HELD
            taken += 1
        if held[slot] < batch:
            held[slot] = batch
            if len(visits) and visits[id_] < 255:
                visits[id_] += 1
    return taken


@njit(nogil=True, cache=True)
def _admit(
    ids: Any, batch: Any, where: Any, row: Any, held: Any, bucket: Any, visits: Any, free: Any, num_free: Any,
    slots: Any, missed: Any, places: Any, into: Any,
) -> Any:  # fmt: skip
    """Give free slots to the rows that have none; returns how many."""
    count = 0
    for i in range(len(ids)):
        if slots[i] >= 0:
            continue
        id_ = ids[i]
        slot = free[num_free - 1 - count]
        slots[i] = into[count] = slot
        missed[count] = id_
        places[count] = max(-2 - where[id_], -1)
        count += 1
        where[id_] = slot
        row[slot] = id_
        held[slot] = batch
        bucket[slot] = LOADING
        if len(visits) and visits[id_] < 255:
            visits[id_] += 1
    return count


@njit(nogil=True, cache=True)
def _arrived(slots: Any, bucket: Any) -> None:
    for slot in slots:
        bucket[slot] = HELD


@njit(nogil=True, cache=True)
def _foresee(
    ids: Any, batch: Any, where: Any, bucket: Any, before: Any, after: Any, heads: Any, tails: Any
) -> None:  # fmt: skip
    """Tell the retained rows whose next use was unknown that this batch needs them."""
    known = COUNTS + batch % (len(heads) - COUNTS)
    for id_ in ids:
        slot = where[id_]
        if slot >= 0 and 0 <= bucket[slot] < COUNTS:
            _unlink(slot, bucket, before, after, heads, tails)
            _link(slot, known, bucket, before, after, heads, tails)


@njit(nogil=True, cache=True)
def _finish(
    kind: Any, slots: Any, uses: Any, batch: Any, last_known: Any, row: Any, held: Any, bucket: Any, before: Any,
    after: Any, heads: Any, tails: Any, visits: Any, hot: Any, seed: Any, retained: Any, room: Any, out: Any,
) -> Any:  # fmt: skip
    """Retain the rows that no batch in flight needs, then let go of as many as there are too many; returns both."""
    for i in range(len(slots)):
        slot = slots[i]
        if held[slot] > batch or bucket[slot] != HELD:
            continue
        id_ = row[slot]
        if kind == _AHEAD and uses[i] != NEVER:
            b = COUNTS + np.int64(uses[i]) % (len(heads) - COUNTS)
        elif kind in (_LFU, _AHEAD):
            b = np.int64(visits[id_])
        elif kind == _STATIC:
            b = np.int64(hot[id_])
        elif kind == _CHAOS:
            b = np.int64(_hash(id_ + seed, batch) & np.uint64(255))
        else:
            b = 0
        _link(slot, b, bucket, before, after, heads, tails)
        retained += 1
    if kind == _CHAOS and room > 0:
        room = min(room, np.int64(_hash(seed, batch) % np.uint64(room + 1)))
    evicted = 0
    b = 0
    use = last_known
    while retained > room:
        if b < COUNTS:
            slot = heads[b]
            if slot < 0:
                b += 1
                continue
        else:
            slot = heads[COUNTS + use % (len(heads) - COUNTS)]
            if slot < 0:
                use -= 1
                continue
        _unlink(slot, bucket, before, after, heads, tails)
        bucket[slot] = LEAVING
        out[evicted] = slot
        evicted += 1
        retained -= 1
    return retained, evicted


@njit(nogil=True, cache=True)
def _decay(visits: Any, bucket: Any, before: Any, after: Any, heads: Any, tails: Any) -> None:
    """Halve the counts; bucket 2 i and then bucket 2 i + 1 become bucket i."""
    for i in range(len(visits)):
        visits[i] >>= 1
    for b in range(1, COUNTS):
        slot = heads[b]
        heads[b] = tails[b] = -1
        target = b >> 1
        while slot >= 0:
            following = after[slot]
            _link(slot, target, bucket, before, after, heads, tails)
            slot = following


@njit(nogil=True, cache=True)
def _forget(row: Any, visits: Any, bucket: Any, before: Any, after: Any, heads: Any, tails: Any) -> None:
    for b in range(COUNTS, len(heads)):
        slot = heads[b]
        heads[b] = tails[b] = -1
        while slot >= 0:
            following = after[slot]
            _link(slot, np.int64(visits[row[slot]]), bucket, before, after, heads, tails)
            slot = following


@njit(nogil=True, cache=True)
def _regroup(row: Any, hot: Any, bucket: Any, before: Any, after: Any, heads: Any, tails: Any) -> None:
    """Put the retained rows into bucket 1 where they are hot, else into bucket 0, oldest first."""
    slots = heads[:2].copy()
    heads[:2] = tails[:2] = -1
    for slot in slots:
        while slot >= 0:
            following = after[slot]
            _link(slot, np.int64(hot[row[slot]]), bucket, before, after, heads, tails)
            slot = following


class Residency:
    """The slots of the fast memory and the rows in them.

    The directory `where` has one number per row: its slot, or -1 for a row that was never written, or ``-2 - place``
    for one that lies in the tier below. So a row is in one place at any time.

    Parameters
    ----------
    num_rows
        Rows of all tables, below 2**31.
    num_slots
        Rows the fast memory can take.
    policy
        Who stays.
    ring
        Batches a window may hold: the next uses that are told apart. Only for `LookAhead`.
    """

    def __init__(self, num_rows: int, num_slots: int, policy: Policy, ring: int = 0) -> None:
        if not 1 <= num_rows < 2**31:
            raise InputError(f"tables of {num_rows} rows in all cannot be tiered", hint="at most 2**31 - 1 rows")
        self.policy = policy
        self.where = np.full(num_rows, -1, np.int32)
        self.row = np.full(num_slots, -1, np.int32)
        self.held = np.full(num_slots, -1, np.int32)
        self.bucket = np.full(num_slots, FREE, np.int32)
        self._before = np.empty(num_slots, np.int32)
        self._after = np.empty(num_slots, np.int32)
        buckets = COUNTS + (ring if isinstance(policy, LookAhead | Belady) else 1)
        self._heads = np.full(buckets, -1, np.int32)
        self._tails = np.full(buckets, -1, np.int32)
        self._free = np.arange(num_slots - 1, -1, -1, dtype=np.int32)
        self.num_free = num_slots
        self.retained = 0
        self._visits = np.zeros(num_rows if policy.counts_visits else 0, np.uint8)
        self._hot = np.zeros(num_rows if isinstance(policy, Static) else 0, np.uint8)
        self._lists = (self.bucket, self._before, self._after, self._heads, self._tails)
        if isinstance(policy, Static):
            self.keep(policy.hot)

    @staticmethod
    def bytes_for(num_rows: int, num_slots: int, policy: Policy, ring: int = 1) -> int:
        """Return the bytes this takes: 4 per row, 24 per slot, 8 per bucket, one per row where visits are counted."""
        buckets = COUNTS + (ring if isinstance(policy, LookAhead) else 1)
        return num_rows * (4 + (policy.counts_visits or isinstance(policy, Static))) + 24 * num_slots + 8 * buckets

    @property
    def num_slots(self) -> int:
        """Rows the fast memory can take."""
        return len(self.row)

    @property
    def num_held(self) -> int:
        """Rows that batches in flight need."""
        return self.num_slots - self.num_free - self.retained

    def all_held(self) -> NDArray[np.int32]:
        """Return the slots whose rows batches in flight need."""
        return np.flatnonzero(self.bucket == HELD).astype(np.int32)

    def short(self, ids: NDArray[Any]) -> int | None:
        """Return how many rows must leave before these distinct rows have room; None where that cannot be."""
        missing, retained = _tally(ids, self.where, self.bucket)
        short = max(int(missing) - self.num_free, 0)
        return short if short <= self.retained - int(retained) else None

    def hold(self, ids: NDArray[Any], batch: int) -> NDArray[np.int32]:
        """Hold those of the distinct rows that are here; returns the slot of each row, -1 where it is not here."""
        slots = np.empty(len(ids), np.int32)
        self.retained -= int(_hold(ids, batch, self.where, self.held, *self._lists, self._visits, slots))
        return slots

    def admit(
        self, ids: NDArray[Any], batch: int, slots: NDArray[np.int32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
        """Give free slots to the rows that `hold` has not found, and fill them in.

        Returns
        -------
        ids, places, slots
            What to fetch, from where (-1: nowhere yet), and into which slot. Until `arrived` they are on their way.
        """
        n = min(len(ids), self.num_free)
        missed, places, into = np.empty(n, np.int64), np.empty(n, np.int32), np.empty(n, np.int32)
        count = _admit(
            ids, batch, self.where, self.row, self.held, self.bucket, self._visits, self._free, self.num_free,
            slots, missed, places, into,
        )  # fmt: skip
        self.num_free -= int(count)
        return missed[:count], places[:count], into[:count]

    def arrived(self, slots: NDArray[np.int32]) -> None:
        """Note that rows on their way are here."""
        _arrived(slots, self.bucket)

    def foresee(self, ids: NDArray[Any], batch: int) -> None:
        """Tell the policy what a coming batch needs."""
        if isinstance(self.policy, LookAhead):
            _foresee(ids, batch, self.where, *self._lists)

    def finish(
        self,
        slots: NDArray[np.int32],
        uses: NDArray[np.int32],
        batch: int,
        last_known: int,
        room: int,
        *,
        decays: bool = True,
    ) -> NDArray[np.int32]:
        """Retain what a finished batch held, and return the slots that must be left so that `room` rows are retained.

        The rows in them are still there; `vacate` ends that.
        """
        at_most = self.retained + len(slots) - (0 if self.policy.kind == _CHAOS else room)
        out = np.empty(max(at_most, 0), np.int32)
        seed = self.policy.seed if isinstance(self.policy, Chaos) else 0
        retained, evicted = _finish(
            self.policy.kind, slots, uses, batch, last_known, self.row, self.held, *self._lists, self._visits,
            self._hot, seed, self.retained, room, out,
        )  # fmt: skip
        self.retained = int(retained)
        if decays and isinstance(self.policy, LFU | LookAhead | Belady) and (batch + 1) % self.policy.decay_every == 0:
            _decay(self._visits, *self._lists)
        return out[:evicted]

    def vacate(self, slots: NDArray[np.int32], places: NDArray[np.int32]) -> None:
        """Free slots whose rows now lie in the tier below."""
        self.where[self.row[slots]] = -2 - places
        self.row[slots] = -1
        self.bucket[slots] = FREE
        self._free[self.num_free : self.num_free + len(slots)] = slots
        self.num_free += len(slots)

    def keep(self, hot: NDArray[np.int64]) -> None:
        """Change the rows that the `Static` policy keeps, also for those that are here."""
        if len(hot) and not 0 <= hot.min() <= hot.max() < len(self.where):
            raise InputError("a hot row lies outside the tables", hint=f"ids go from 0 to {len(self.where) - 1}")
        self._hot[:] = 0
        self._hot[hot] = 1
        _regroup(self.row, self._hot, *self._lists)

    def forget(self, ring: int | None = None) -> None:
        """Forget the next uses of all rows, and the numbers of the batches that held them.

        With `ring`, tell apart the next uses in so many batches from now on.
        """
        self.held[:] = -1
        if isinstance(self.policy, LookAhead | Belady):
            _forget(self.row, self._visits, *self._lists)
            if ring is not None:
                more = np.full(ring, -1, np.int32)
                self._heads = np.concatenate([self._heads[:COUNTS], more])
                self._tails = np.concatenate([self._tails[:COUNTS], more])
                self._lists = (self.bucket, self._before, self._after, self._heads, self._tails)
