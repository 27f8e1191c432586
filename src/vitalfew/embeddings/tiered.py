"""Embedding bags whose rows may be many times larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from vitalfew.core import InputError
from vitalfew.embeddings._device import DeviceRows
from vitalfew.embeddings.device_rows import DeviceTieredRows
from vitalfew.embeddings.first import FirstRows
from vitalfew.embeddings.optim import Optimizer, optimizer_from_dict
from vitalfew.embeddings.room import BUFFERS, Room, room_for, room_on
from vitalfew.embeddings.rows import Rows
from vitalfew.embeddings.tables import EmbeddingBags, Table
from vitalfew.embeddings.tiered_rows import TieredRows
from vitalfew.tiers.dram import Dram, Nowhere
from vitalfew.tiers.hbm import Hbm, HbmSlab
from vitalfew.tiers.lower import Opened
from vitalfew.tiers.policies import LookAhead, Policy
from vitalfew.tiers.schedule import Schedule
from vitalfew.tiers.store import RowStore

__all__ = ["TieredEmbeddings"]


class _Tier(Protocol):
    """A tier as a user names it, below the first."""

    def open(self, num_rows: int, record_bytes: int, *, resume: bool = False) -> Opened: ...


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class TieredEmbeddings(EmbeddingBags):
    """As `EmbeddingBags`, with rows spread over tiers: what the coming batches need is in memory, the rest below.

    Where a row lies never changes what it becomes: weights and optimizer state are, bit for bit, those of
    `EmbeddingBags` with everything in memory. A row moves as a unit with its state and statistics, and has one
    authoritative copy.

    Parameters
    ----------
    tables
        Their rows must have the same width; together fewer than 2**31 rows.
    optimizer
        `SGD`, `RowwiseAdagrad`, `Adagrad` or `LazyAdam`.
    tiers
        Fastest first: `Hbm` or a `Dram`, maybe a `Dram` below it, then `File` or `Remote`. A `Dram` in bytes is a hard
        limit for rows, state, directory, window and buffers together; `Hbm` for what lies on the device. Below `Hbm`
        a `Dram` that all rows fit may be the last.
    policy
        Which rows stay: `LookAhead` (with `Prefetch` around the loader), `LRU`, `LFU` or `Static`.
    ahead
        Batches whose rows are brought in before their turn, with `Prefetch`.
    dtype, update, generator, seed
        As in `EmbeddingBags`.
    resume
        Go on from the last `commit` that the lowest tier holds; `note` tells what was said then.

    Examples
    --------
    >>> import tempfile, torch
    >>> from vitalfew.embeddings import SGD, Table, TieredEmbeddings
    >>> from vitalfew.tiers import Dram, File
    >>> folder = tempfile.mkdtemp()
    >>> tables = TieredEmbeddings([Table("user", 1000, 4)], SGD(lr=0.5), tiers=[Dram(50), File(folder)])
    >>> tables(torch.tensor([[1], [2]])).sum().backward()
    >>> tables.moves.missed, tables.moves.fresh
    (2, 2)
    >>> tables.commit(), tables.close()
    (2, None)

    Notes
    -----
    A forward under ``torch.no_grad()`` copies the rows it needs and moves none.

    With ``Hbm`` first, rows are looked up and updated on the device, and bags come out there. Ids are best given in
    main memory: for those on the device the host waits.
    """

    rows: TieredRows

    def __init__(
        self,
        tables: Sequence[Table],
        optimizer: Optimizer,
        *,
        tiers: Sequence[Hbm | Dram | _Tier],
        policy: Policy | None = None,
        ahead: int = 2,
        dtype: torch.dtype = torch.float32,
        update: Literal["backward", "step"] = "backward",
        generator: torch.Generator | None = None,
        seed: int = 0,
        resume: bool = False,
    ) -> None:
        if not tiers or not isinstance(tiers[0], Dram | Hbm):
            raise InputError("the first tier must be a Dram, or Hbm", hint='tiers=[Dram("2 GiB"), File("rows/")]')
        if ahead < 0:
            raise InputError(f"ahead must not be negative, got {ahead}", hint="2 is the default")
        self._tiers, self.policy, self._ahead = tuple(tiers), policy or LookAhead(), ahead
        self._resume = resume
        self.room: Room
        self.note: dict[str, Any] = {}
        super().__init__(tables, optimizer, dtype=dtype, update=update, generator=generator, seed=seed)

    def _make_rows(
        self,
        optimizer: Optimizer,
        first: FirstRows,
        *,
        dtype: torch.dtype,
        update: Literal["backward", "step"],
        seed: int,
    ) -> Rows:
        # A slab without rows tells how a row is packed before its number of slots is known.
        record = TieredRows(1, self.dim, optimizer, dtype=dtype, first=first).record()
        below = self._open(record.nbytes)
        try:
            self.room = self._room(record.nbytes, below.tier.nbytes)
            if len(self._tiers) == 1 and self.room.slots < self.num_rows:
                raise InputError(
                    f"{self._tiers[0]!r} holds {self.room.slots:,} of {self.num_rows:,} rows",
                    hint='add a tier below: tiers=[Dram("2 GiB"), File("rows/")]',
                )
            if below.note is not None:
                first, optimizer = self._accept(below.note, optimizer, first, dtype)
            rows = self._take_memory(optimizer, first, dtype=dtype, update=update, seed=seed)
            depth = self.policy.depth if isinstance(self.policy, LookAhead) else 0
            schedule = Schedule(
                self.num_rows, self.room.slots, self.policy, ahead=self._ahead, depth=min(depth, self.room.entries),
                entries=self.room.entries,
            )  # fmt: skip
            rows.attach(RowStore(schedule, rows.record(), below.tier, rows.begin, below.places, rows.buffer))
            if below.note is not None:
                rows.counts.steps, rows.seed = below.note["steps"], below.note["seed"]
        except BaseException:
            below.tier.close()
            raise
        self._first_seed = first.seed
        return rows

    def _room(self, record_bytes: int, below_bytes: int) -> Room:
        memory = self._tiers[0]
        if isinstance(memory, Hbm):
            return room_on(memory, self.num_rows, record_bytes, below_bytes, self.policy)
        assert isinstance(memory, Dram)
        if len(self._tiers) == 1:
            memory = Dram(memory.size if isinstance(memory.size, str) else self.num_rows)
        return room_for(memory, self.num_rows, record_bytes, below_bytes, self.policy)

    def _take_memory(
        self,
        optimizer: Optimizer,
        first: FirstRows,
        *,
        dtype: torch.dtype,
        update: Literal["backward", "step"],
        seed: int,
    ) -> TieredRows:
        memory, room = self._tiers[0], self.room
        if not isinstance(memory, Hbm):
            return TieredRows(room.slots, self.dim, optimizer, dtype=dtype, update=update, seed=seed, first=first)
        columns = DeviceRows.columns(self.dim, dtype, optimizer)
        slab = HbmSlab(columns, room.slots + 1, memory.device, staging_rows=room.staging_rows, buffers=BUFFERS)
        return DeviceTieredRows(slab, optimizer, update=update, seed=seed, first=first)

    def _open(self, record_bytes: int) -> Opened:
        *upper, last = self._tiers[1:] or (None,)
        if last is None:
            return Opened(Nowhere(record_bytes), None, None)
        if isinstance(last, Hbm):
            raise InputError(f"{last!r} cannot stand below another tier", hint="name the fastest tier first")
        if isinstance(last, Dram):
            if isinstance(self._tiers[0], Dram):
                raise InputError(
                    "the last tier is memory, and so is the first", hint="make it one, or add a File below"
                )
            below = last.open(self.num_rows, record_bytes)
        else:
            below = last.open(self.num_rows, record_bytes, resume=self._resume)
        for tier in reversed(upper):
            if not isinstance(tier, Dram):
                below.tier.close()
                raise InputError(f"{tier!r} cannot stand between two tiers", hint="only a Dram can")
            below = tier.open(self.num_rows, record_bytes, below)
        return below

    def _accept(
        self, note: dict[str, Any], optimizer: Optimizer, first: FirstRows, dtype: torch.dtype
    ) -> tuple[FirstRows, Optimizer]:
        """Take over what the last commit said, if it is about these tables."""
        mine = [[t.name, t.num_rows] for t in self.tables]
        if note["tables"] != mine:
            raise InputError(f"the store holds the tables {note['tables']}, not {mine}", hint="use its tables")
        if [note["dim"], note["dtype"]] != (asked := [self.dim, _name_of(dtype)]):
            raise InputError(
                f"the store holds rows of {note['dim']} {note['dtype']}, not {asked[0]} {asked[1]}",
                hint="use its width and dtype",
            )
        if note["optimizer"]["name"] != optimizer.name:
            raise InputError(
                f"the store was trained by {note['optimizer']['name']}, not {optimizer.name}",
                hint="use the same optimizer: its state belongs to the rows",
            )
        self.note = note["note"]
        return FirstRows([t.num_rows for t in self.tables], note["first"]), optimizer_from_dict(note["optimizer"])

    # -- what happened

    @property
    def store(self) -> RowStore:
        """The rows in memory and below, with what has moved: `store.moves`, `store.lower.traffic`."""
        return self.rows.store

    @property
    def moves(self) -> Any:
        """Rows needed, missed and left so far."""
        return self.store.moves

    # -- content

    def rows_of(self, table: str, ids: Sequence[int] | None = None) -> Tensor:
        """Return a copy of the weights of one table, or of some of its rows, shape (rows, dim)."""
        span = self.span_of(table)
        wanted = np.arange(span.start, span.stop) if ids is None else np.asarray(ids, np.int64) + span.start
        if len(wanted) and not span.start <= wanted.min() <= wanted.max() < span.stop:
            raise InputError(f"an id lies outside table `{table}`", hint=f"ids go from 0 to {len(span) - 1}")
        found, line = self.rows.copy_of(wanted)
        return found[torch.from_numpy(line)]

    def columns(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return weights and optimizer state of the rows from `start` to `stop`, numbered over all tables."""
        return self.rows.columns(np.arange(start, stop))

    def fill(self, start: int, columns: Mapping[str, Tensor]) -> None:
        """Replace the rows from `start` on, wherever they are; state that is not given becomes zeros."""
        self.rows.fill(np.arange(start, start + len(columns["weight"])), columns)

    # -- durability

    def commit(self, note: Mapping[str, Any] | None = None) -> int:
        """Make all rows durable in the lowest tier, writing only those that have changed; returns how many.

        Whatever happens afterwards, ``resume=True`` finds them as they are now. Not while gradients wait.

        Parameters
        ----------
        note
            Plain values to be found with them, such as the step and where the other weights are.
        """
        if self.rows.pending:
            raise InputError("gradients wait for a step, a commit would lose them", hint="call step() first")
        body = {
            "tables": [[t.name, t.num_rows] for t in self.tables],
            "dim": self.dim,
            "dtype": _name_of(self.rows.weight.dtype),
            "optimizer": self.rows.optimizer.to_dict(),
            "steps": self.counts.steps,  # where a device counts, after everything it was asked to do
            "seed": self.rows.seed,
            "first": self._first_seed,
            "note": dict(note or {}),
        }
        with self.store.lock:
            return self.store.commit(body)

    def close(self) -> None:
        """Let go of files and processes. What was not committed is lost."""
        self.store.close()

    def __enter__(self) -> TieredEmbeddings:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TieredEmbeddings:
        super()._apply(fn, recurse)
        return self

    def __deepcopy__(self, memo: Any) -> TieredEmbeddings:
        raise InputError("rows on a disk cannot be copied with the model", hint="commit, and open them again")

    def __reduce__(self) -> Any:
        raise InputError("rows on a disk cannot be pickled", hint="commit, and open them again with resume=True")
