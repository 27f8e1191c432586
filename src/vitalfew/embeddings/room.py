"""How many rows fit a number of bytes, when everything that is needed for them counts."""

from __future__ import annotations

from dataclasses import dataclass

from vitalfew.core import Budget, InputError
from vitalfew.tiers.dram import Dram
from vitalfew.tiers.hbm import Hbm
from vitalfew.tiers.policies import LookAhead, Policy
from vitalfew.tiers.residency import Residency
from vitalfew.tiers.store import RowStore
from vitalfew.tiers.window import Window

__all__ = ["Room", "room_for", "room_on"]

_WINDOW_SHARE = 1 / 8
"""Of the memory, for the batches that are known beforehand: half for the ring of their rows, half for themselves."""
_FEWEST_ENTRIES = 1536
_MANY_ENTRIES = 1 << 18
_STAGING_SHARE = 1 / 32
"""Of a device's memory, for each of the buffers through which rows come and go."""
_STAGING_BYTES = 16 << 20
BUFFERS = 3


@dataclass(frozen=True, slots=True)
class Room:
    """What a budget of memory is divided into.

    Attributes
    ----------
    slots
        Rows at a time.
    entries
        Size of the window.
    queue_bytes
        For batches that wait for their turn.
    nbytes
        All of it, in bytes: slab, directory, window, queue, buffers and tables of the tier below. Where the slab is
        on a device, what is in main memory.
    staging_rows
        Rows that move to or from a device at a time.
    """

    slots: int
    entries: int
    queue_bytes: int
    nbytes: int
    staging_rows: int = 0


def _parts(num_rows: int, slots: int, record_bytes: int, below_bytes: int, policy: Policy, entries: int) -> int:
    return (
        Residency.bytes_for(num_rows, slots, policy, ring=entries + 2)  # no more batches than entries
        + RowStore.bytes_for(slots)
        + slots * record_bytes
        + Window.bytes_for(entries)
        + below_bytes
    )


def room_for(memory: Dram, num_rows: int, record_bytes: int, below_bytes: int, policy: Policy) -> Room:
    """Divide memory, given in bytes for everything, or as the rows that are there at a time.

    Raises
    ------
    InputError
        If nothing is left for rows, with the least that would do.
    """
    budget = Budget.of(memory.size)
    if budget.kind != "bytes":
        slots = memory.limit(record_bytes, num_rows)
        if slots < 1:
            raise InputError(f"{memory.size!r} of {num_rows:,} rows is not one row", hint="give more memory")
        entries = max(4 * slots, _FEWEST_ENTRIES)
        queue = max(slots * record_bytes, 1 << 20)
        parts = _parts(num_rows, slots, record_bytes, below_bytes, policy, entries)
        return Room(slots, entries, queue, parts + queue)
    total = int(budget.value)
    per_slot = record_bytes + 29
    # Where everything fits, more memory needs no larger window.
    wanted, queue = _window_of(min(total, 2 * (num_rows * per_slot + below_bytes)), per_slot, policy)
    free = total - queue - _parts(num_rows, 0, record_bytes, below_bytes, policy, 0)
    entries = Window.entries_for(min(wanted, max(free, 0) // 2))
    fixed = _parts(num_rows, 0, record_bytes, below_bytes, policy, entries) + queue
    slots = min((total - fixed) // per_slot, num_rows)
    if slots < 1:
        least = _parts(num_rows, 0, record_bytes, below_bytes, policy, _FEWEST_ENTRIES) + _FEWEST_ENTRIES * per_slot
        least = int(least / (1 - queue / max(total, 1))) + 1
        raise InputError(
            f"{total:,} bytes of memory hold no row: directory and buffers of {num_rows:,} rows take {fixed:,}",
            hint=f"give at least {least:,} bytes, or hash the ids into fewer rows",
        )
    return Room(slots, entries, queue, fixed + slots * per_slot)


def room_on(memory: Hbm, num_rows: int, record_bytes: int, below_bytes: int, policy: Policy) -> Room:
    """Divide the memory of a device among rows and staging, and say what main memory they need beside it.

    Raises
    ------
    InputError
        If nothing is left for rows, with the least that would do.
    """
    total, staged = memory.nbytes, record_bytes + 8
    staging_rows = max(1, min(int(total * _STAGING_SHARE) // staged, _STAGING_BYTES // staged, num_rows))
    # One line more than there are slots: for updates that must not be.
    slots = min((total - BUFFERS * staging_rows * staged) // record_bytes - 1, num_rows)
    if slots < 1:
        raise InputError(
            f"{total:,} bytes of {memory.device} memory hold no row: one takes {record_bytes:,}, and as much again "
            "on its way in and out",
            hint=f"give at least {BUFFERS * staged + 2 * record_bytes:,} bytes",
        )
    wanted, queue = _window_of(total, record_bytes, policy)
    entries = Window.entries_for(wanted)
    nbytes = (
        _parts(num_rows, slots, 0, below_bytes, policy, entries) - RowStore.bytes_for(0)
        + queue + staging_rows * (record_bytes + BUFFERS * staged)
    )  # fmt: skip
    return Room(slots, entries, queue, nbytes, staging_rows)


def _window_of(total: int, per_slot: int, policy: Policy) -> tuple[int, int]:
    """Return the bytes that suit the window, and those of the queue, for so much memory."""
    share = _WINDOW_SHARE if isinstance(policy, LookAhead) else _WINDOW_SHARE / 4
    # A small memory's batches fill it; their rows, and those of the next, must be in the window at a time.
    return max(int(total * share / 2), min(2 * total // per_slot, _MANY_ENTRIES) * 20), int(total * share / 2)
