"""Rows whose slab is a cache: the same kernels, on slots that a store fills and empties."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Literal
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitalfew.core import InputError
from vitalfew.embeddings.first import FirstRows
from vitalfew.embeddings.optim import Optimizer
from vitalfew.embeddings.rows import KERNELS, Layout, Lookups, Rows, array_of, num_threads
from vitalfew.tiers.lower import Bytes
from vitalfew.tiers.record import Record
from vitalfew.tiers.rehearsal import Rehearsal
from vitalfew.tiers.residency import HELD
from vitalfew.tiers.store import RowStore

__all__ = ["TieredRows", "row_ids"]


def row_ids(layout: Layout, ids: NDArray[np.int64], edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the row of each lookup, numbered over all tables; an id outside its table is refused."""
    features = len(layout.features)
    if len(edges):
        feature = np.repeat(np.arange(len(edges) - 1) % features, np.diff(edges))
        base, num_rows = layout.base[feature], layout.num_rows[feature]
        outside = (ids < 0) | (ids >= num_rows)
    else:
        ids = ids.reshape(-1, features)
        base = layout.base
        outside = (ids < 0) | (ids >= layout.num_rows)
    if outside.any():
        Rows.refuse(layout, ids.reshape(-1), edges, int(outside.reshape(-1).argmax()))
    return (ids + base).reshape(-1)


class TieredRows(Rows):
    """As `Rows`, but only some of the rows have a slot at a time.

    A training forward finds its rows in their slots, or has the store bring them in. It holds them until their
    update. A forward without gradients copies rows from wherever they are, and moves none.

    Parameters
    ----------
    num_slots
        Rows the slab has room for.
    first
        What rows begin with.
    """

    store: RowStore
    buffer: Bytes | None = None
    """Memory of a special kind for the records that the store moves."""

    def __init__(
        self,
        num_slots: int,
        dim: int,
        optimizer: Optimizer,
        *,
        dtype: torch.dtype = torch.float32,
        update: Literal["backward", "step"] = "backward",
        seed: int = 0,
        first: FirstRows,
    ) -> None:
        super().__init__(num_slots, dim, optimizer, dtype=dtype, update=update, seed=seed)
        self._stats = np.zeros((num_slots, 2), np.uint32)
        self.driven = False
        """Whether a `Prefetch` says which batch's turn it is."""
        self.turn = 0
        """Then the number of that batch."""
        self._samples = np.empty(0, np.int64)
        self._serial = 0
        self._live: WeakSet[Lookups] = WeakSet()
        self._training = False
        self._first = first

    def record(self) -> Record:
        """Return how a row is packed: weights, state, and how often and when it was last updated."""
        return Record([*map(array_of, [self.weight, *self.wide, *self.narrow]), self._stats])

    def attach(self, store: RowStore) -> None:
        """Let a store fill the slots."""
        self.store = store
        self._names, self._dirty = store.residency.row, store.dirty

    @property
    def busy(self) -> bool:
        """Whether an update may come for rows that forwards have looked up."""
        return bool(self._live) or self.pending > 0

    def bags(self, layout: Layout, ids: Tensor, offsets: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
        self._training = self.trainable and torch.is_grad_enabled()
        if self._training and len(self._samples):
            self._check_part(layout, ids, offsets)
        # Rows that a batch holds stay where they are; without one, nothing may move while they are read.
        with contextlib.nullcontext() if self._training else self.store.lock:
            return super().bags(layout, ids, offsets, scales)

    def _seen(self, lookups: Lookups) -> None:
        if self._training:
            if len(self._samples):
                lookups.samples, lookups.serial = self._samples, self._serial
                self._serial += 1
            self._live.add(lookups)

    def begin_part(self, samples: NDArray[np.int64], serial: int | None = None) -> int:
        """Say which samples of a batch the forwards that follow are for; none: for those of a whole batch.

        A row gets what its samples sum to in their order in the batch, whatever part they came in.

        Parameters
        ----------
        serial
            What this returned for the first part of the batch.
        """
        self._samples, self._serial = samples, self._forwards + 1 if serial is None else serial
        return self._serial

    def _check_part(self, layout: Layout, ids: Tensor, offsets: Tensor | None) -> None:
        bags, samples = ids.numel() if offsets is None else offsets.numel() - 1, len(self._samples)
        if bags % (samples * len(layout.features)):
            raise InputError(
                f"a part of {samples} samples looks up {bags} bags of {len(layout.features)} features",
                hint="look up the part's samples, each as often as the others",
            )

    def _locate(
        self, layout: Layout, ids: NDArray[np.int64], edges: NDArray[np.int64]
    ) -> tuple[Tensor, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        rows = row_ids(layout, ids, edges)
        if self._training:
            if not self.driven:
                self._take_turn(rows)
            slab, slots = self.weight, self._held_slots(rows)
        else:
            slab, slots = self.copy_of(rows)
        same = np.full(len(layout.features), len(slab), np.int64)
        return slab, slots, np.zeros_like(same), same

    def _take_turn(self, rows: NDArray[np.int64]) -> None:
        """Without a `Prefetch` each step is a turn of its own, which ends when the next one begins."""
        store = self.store
        with store.lock:
            schedule = store.schedule
            going_on = schedule.loaded > schedule.finished
            if going_on and self.busy:
                return  # what is missing is held beside
            try:
                if not schedule.enter(rows):
                    raise InputError(
                        f"a batch of {len(np.unique(rows)):,} rows does not fit the window", hint="give more memory"
                    )
                if going_on:
                    store.finish()
                store.load()
            except BaseException:
                self.give_up()
                raise

    def _held_slots(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        slots = np.empty(len(rows), np.int64)
        turn = self.turn if self.driven else self.store.schedule.finished
        if self._find(rows, slots, turn):
            with self.store.lock:
                self.store.hold(np.unique(rows), turn)
                absent = self._find(rows, slots, turn)
            assert not absent, "held rows are there"
        return slots

    def _find(self, rows: NDArray[np.int64], slots: NDArray[np.int64], turn: int) -> int:
        from vitalfew.embeddings import _kernels_numba as kernels

        residency = self.store.residency
        with KERNELS:
            return int(
                kernels.find(
                    rows, residency.where, residency.bucket, HELD, residency.held, turn, slots, num_threads()
                )
            )  # fmt: skip

    def copy_of(self, rows: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
        """Return the weights of the distinct rows, and for each row given its line there."""
        distinct, line = np.unique(rows, return_inverse=True)
        return self.columns(distinct)["weight"], line.reshape(-1)

    def columns(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        """Return copies of weights, state and statistics of distinct rows, wherever they are."""
        n, dim = len(rows), self.weight.shape[1]
        parts: dict[str, Tensor] = {"weight": torch.empty((n, dim), dtype=self.weight.dtype, device="cpu")}
        parts |= {name: torch.empty((n, t.shape[1]), device="cpu") for name, t in self.state.items()}
        stats = np.empty((n, 2), np.uint32)
        records = np.empty((n, self.store.record.nbytes), np.uint8)
        with self.store.lock:
            never = self.store.peek(rows, records)
        Record([*map(array_of, parts.values()), stats]).put(np.arange(n, dtype=np.int32), records)
        parts["stats"] = torch.from_numpy(stats.view(np.int32))
        if never.any():
            for name, first in self.first(rows[never]).items():
                parts[name][torch.from_numpy(never)] = first
        return parts

    def fill(self, rows: NDArray[np.int64], columns: Mapping[str, Tensor]) -> None:
        """Replace distinct rows, wherever they are; columns that are not given become zeros."""
        n = len(rows)
        parts = [columns["weight"]]
        parts += [columns.get(name, torch.zeros((n, t.shape[1]), device="cpu")) for name, t in self.state.items()]
        records = np.zeros((n, self.store.record.nbytes), np.uint8)
        stats = np.zeros((n, 2), np.uint32)
        Record([*map(array_of, parts), stats]).take(np.arange(n, dtype=np.int32), records)
        with self.store.lock:
            self.store.fill(rows, records)

    def end_turn(self, otherwise: str) -> None:
        """End the turn that the last update has left open; refuse where another update may come."""
        if self.driven:
            raise InputError(f"a loop over Prefetch is running, {otherwise}", hint="finish the loop first")
        self.check_settled(otherwise)
        if self.busy:
            raise InputError(
                f"a forward waits for its backward, {otherwise}", hint="call backward, or let go of its result"
            )
        self.give_up()

    def first(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        """Return what rows begin with that were never written."""
        n = len(rows)
        weight = torch.from_numpy(self._first(rows, self.weight.shape[1])).to(self.weight.dtype)
        zeros = {name: torch.zeros((n, t.shape[1]), device="cpu") for name, t in self.state.items()}
        return {"weight": weight, **zeros, "stats": torch.zeros((n, 2), dtype=torch.int32, device="cpu")}

    def begin(self, rows: NDArray[np.int64], slots: NDArray[np.int32]) -> None:
        """Write what rows begin with into their slots."""
        self.store.record.clear(slots)
        if self.weight.dtype == torch.float32:
            self._first.into(array_of(self.weight), slots, rows)
        else:
            values = torch.from_numpy(self._first(rows, self.weight.shape[1])).to(self.weight.dtype)
            array_of(self.weight)[slots] = array_of(values)

    def give_up(self, rehearsal: Rehearsal | None = None) -> int:
        """End all turns: what forwards have looked up gets no update any more. Returns how many gradients waited."""
        waited = self.pending
        self.zero_grad()
        self._live.clear()
        with self.store.lock:
            self.store.abandon(rehearsal)
        return waited

    def _receive(self, lookups: Lookups, grad: Tensor) -> None:
        if lookups not in self._live:
            raise InputError(
                "the rows of this forward are no longer held, their update would come too late",
                hint="call backward and step before the loop over Prefetch ends",
            )
        super()._receive(lookups, grad)
