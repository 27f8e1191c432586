"""A run whose tables may be larger than memory: how much memory, which folder, and whether that can work."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitalfew.core import Budget, InputError, parse_size
from vitalfew.data.encoded import Encoded
from vitalfew.data.log import EncodedLog
from vitalfew.embeddings.first import FirstRows
from vitalfew.embeddings.room import Room, room_for
from vitalfew.embeddings.rows import Layout
from vitalfew.embeddings.settings import STORAGE, Settings
from vitalfew.embeddings.tiered_rows import TieredRows, row_ids
from vitalfew.tiers.dram import Dram
from vitalfew.tiers.file import MAX_ROWS, file_memory
from vitalfew.tiers.policies import Policy, policy_named
from vitalfew.tiers.schedule import Schedule
from vitalfew.tiers.window import Window

__all__ = ["POLICIES", "Tiering", "free_memory", "ids_of", "most_rows", "record_bytes", "schedule_for"]

POLICIES = ("lookahead", "lru", "lfu")
_BLOCK = 1 << 14
"""Rows of a log that are looked through at a time."""


@dataclass(frozen=True, slots=True)
class Tiering:
    """Where the rows of a run are.

    Attributes
    ----------
    memory
        ``"2GiB"`` for all that the rows need, or a share of them such as ``"10%"``.
    store
        The folder of those that are not in memory; by default ``rows`` in the folder of the run.
    policy
        Which rows stay in memory: ``lookahead``, ``lru`` or ``lfu``.
    ahead, depth
        Batches whose rows are brought in before their turn, and batches that the policy looks ahead.

    Examples
    --------
    >>> Tiering("2 GiB").policy
    'lookahead'
    """

    memory: str
    store: str | None = None
    policy: str = "lookahead"
    ahead: int = 2
    depth: int = 200

    def __post_init__(self) -> None:
        if self.budget.value == 0:
            raise InputError(f"no row fits into a memory of {self.memory}", hint="give some, such as 2GiB or 10%")
        if self.policy not in POLICIES:
            raise InputError(f"there is no policy {self.policy!r}", hint=f"choose one of {', '.join(POLICIES)}")
        if self.ahead < 0:
            raise InputError(f"ahead must not be negative, got {self.ahead}", hint="2 is the default")
        self.rule()

    @property
    def budget(self) -> Budget:
        """The memory as a share or in bytes."""
        return Budget.of(self.memory)

    def rule(self) -> Policy:
        """Return the policy as the tables take it."""
        return policy_named(self.policy, depth=self.depth)

    def folder(self, run: Path) -> Path:
        """Return the folder of the rows."""
        return run / "rows" if self.store is None else Path(self.store)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)

    def claim(self, run: Path) -> Tiering:
        """Return this with a folder that another working directory finds too; it must be free.

        Raises
        ------
        InputError
            If the folder holds something, or is not apart from that of the run.
        """
        if self.store is None:
            return self
        store, out = Path(os.path.abspath(self.store)), Path(os.path.abspath(run))
        if store == out or store in out.parents or (out in store.parents and store != out / "rows"):
            raise InputError(
                f"the store {self.store} and the run {run} are one inside the other",
                hint="choose a folder of its own, or leave --store out",
            )
        if store.exists() and not (store.is_dir() and not any(store.iterdir())):
            raise InputError(f"the store {self.store} exists and is not an empty folder", hint="choose another --store")
        return dataclasses.replace(self, store=str(store))

    def room(self, num_rows: int, settings: Settings, *, memory: str | None = None) -> Room:
        """Divide the memory among so many rows."""
        record = record_bytes(settings)
        below = file_memory(num_rows, record)
        return room_for(Dram(memory or self.memory), num_rows, record, below, self.rule())

    def check(self, num_rows: Mapping[str, int], settings: Settings) -> Room:
        """Refuse memory that the machine has not, or that cannot even hold what belongs to the rows."""
        total = sum(num_rows.values())
        if total > MAX_ROWS:
            raise InputError(
                f"the tables have {total:,} rows, and a store takes {MAX_ROWS:,}", hint="use --hash-rows or --min-count"
            )
        try:
            room = self.room(total, settings)
        except InputError as error:
            # How many rows a batch needs shows later: this is enough whatever it is.
            most = sum(min(rows, settings.batch_size) for rows in num_rows.values())
            hint = f"--memory {self.least(total, most, settings)} is enough for a batch of one id per feature"
            raise InputError(error.message, hint=hint) from None
        if room.nbytes > free_memory():
            raise InputError(
                f"--memory {self.memory} takes {room.nbytes / 2**30:,.2f} GiB, and "
                f"{free_memory() / 2**30:,.2f} GiB are free",
                hint="give less: what does not fit is kept in the store",
            )
        return room

    def check_batches(
        self, num_rows: Mapping[str, int], settings: Settings, batches: Iterable[Encoded], *, jagged: bool
    ) -> None:
        """Refuse memory that the rows of the largest batch do not fit; `batches` are read only if it may be so."""
        total = sum(num_rows.values())
        most = sum(min(rows, settings.batch_size) for rows in num_rows.values())
        if not jagged and self.suffices(total, most, settings):
            return
        largest = max((_distinct(ids) for ids, _ in ids_of(batches, num_rows)), default=1)
        if not self.suffices(total, largest, settings):
            least = self.least(total, largest, settings)
            raise InputError(
                f"a batch needs {largest:,} rows at a time, and --memory {self.memory} is not enough for them",
                hint=f"the least is --memory {least}, or use a smaller --batch-size",
            )

    def suffices(self, total: int, rows: int, settings: Settings, memory: str | None = None) -> bool:
        """Say whether so many of all rows fit at a time."""
        try:
            room = self.room(total, settings, memory=memory)
        except InputError:
            return False
        return room.slots >= rows and room.entries >= rows

    def least(self, total: int, rows: int, settings: Settings) -> str:
        """Return the smallest memory that so many rows at a time fit, to a hundredth of a MiB."""
        low, high = 0, 1
        while not self.suffices(total, rows, settings, _mib(high)):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if self.suffices(total, rows, settings, _mib(middle)):
                high = middle
            else:
                low = middle
        return _mib(high)


def most_rows(log: EncodedLog, num_rows: Mapping[str, int], batch_size: int) -> int:
    """Return how many rows a batch may look up at most, whichever samples it is of; reads a log of lists once."""
    longest = np.full((batch_size, len(num_rows)), 0 if log.is_jagged else 1)
    for start in range(0, len(log) if log.is_jagged else 0, _BLOCK):
        offsets = log.block(start, min(start + _BLOCK, len(log))).offsets
        assert offsets is not None
        sizes = np.concatenate([longest, np.diff(offsets).reshape(-1, len(num_rows))])
        longest = np.partition(sizes, len(sizes) - batch_size, axis=0)[-batch_size:]
    return int(np.minimum(longest.sum(axis=0), list(num_rows.values())).sum())


def _mib(hundredths: int) -> str:
    text = f"{hundredths // 100}.{hundredths % 100:02}MiB"
    assert parse_size(text) > 0
    return text


def free_memory() -> int:
    """Return the bytes of memory that this machine has free, within the limit of its container."""
    import psutil

    from vitalfew.meter import machine

    return min(int(psutil.virtual_memory().available), int(machine(())["memory_bytes"]))


def record_bytes(settings: Settings) -> int:
    """Return the bytes of one row with its state and statistics, as it moves."""
    first = FirstRows([1], seed=0)
    rows = TieredRows(1, settings.dim, settings.rule(), dtype=STORAGE[settings.storage], first=first)
    return rows.record().nbytes


def schedule_for(room: Room, num_rows: int, policy: Policy, ahead: int) -> Schedule:
    """Return a schedule as `TieredEmbeddings` makes one, to try on batches what it would do."""
    depth = min(getattr(policy, "depth", 0), 2**20)
    return Schedule(num_rows, room.slots, policy, ahead=ahead, depth=depth, entries=room.entries)


def ids_of(batches: Iterable[Encoded], num_rows: Mapping[str, int]) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Return for each batch its row ids over all tables, and its bytes."""
    sizes = np.array(list(num_rows.values()), np.int64)
    layout = Layout(tuple(num_rows), np.cumsum(sizes) - sizes, sizes, np.zeros(len(sizes), np.bool_))
    for batch in batches:
        edges = np.empty(0, np.int64) if batch.offsets is None else batch.offsets
        parts = (batch.dense, batch.ids, batch.offsets, batch.label, batch.time)
        yield row_ids(layout, batch.ids.reshape(-1), edges), sum(0 if part is None else part.nbytes for part in parts)


def _distinct(ids: NDArray[np.int64]) -> int:
    window = Window(max(len(ids), 1))
    window.enter(ids)
    return len(window.rows(0))
