"""The rows that one worker owns: it answers for their values, and applies the gradients of all workers to them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitalfew.core import Budget, InputError
from vitalfew.embeddings.first import FirstRows
from vitalfew.embeddings.optim import Optimizer
from vitalfew.embeddings.rows import Lookups, Rows, _Waiting, array_of
from vitalfew.embeddings.tables import Table
from vitalfew.embeddings.tiered import TieredEmbeddings
from vitalfew.tiers.dram import Dram

__all__ = ["ALONE", "LATER", "NOW", "Given", "Local", "Owned", "Owner", "sync_classes"]

NOW, LATER, ALONE = 0, 1, 2
"""Classes of the rows of a batch, see `sync_classes`."""

Local = NDArray[np.int64]
"""Rows of one owner, counted from 0: row r is local row ``r // world`` of owner ``r % world``."""
Given = tuple[Local, NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]
"""Lookups of rows in sample order, and their gradients: row, bag and scale of each (no scales: all 1), grad of bags."""
_NONE = np.empty(0, np.int64)


def sync_classes(current_ids: Any, next_ids: Any, later: Any) -> tuple[Local, Local, Local]:
    """Divide the rows of a batch by when their updates are waited for.

    Parameters
    ----------
    current_ids
        Rows of the batch, once for each worker that needs them.
    next_ids
        Rows of the batch after it.
    later
        Rows of the batches that come after that, as far as they are known.

    Returns
    -------
    now, later, none
        The distinct rows that the next batch needs: their updates come before its forward. Those that several workers
        have in this batch, or that are known to be needed again: their updates may come while the next forward runs.
        And those that one worker needs, just once: a matter between that worker and the owner.

    Examples
    --------
    >>> sync_classes([1, 2, 3, 4, 4], [2, 9], [3])
    (array([2]), array([3, 4]), array([1]))
    """
    rows, workers = np.unique(np.asarray(current_ids, np.int64), return_counts=True)
    now = np.isin(rows, next_ids)
    alone = ~now & (workers == 1) & ~np.isin(rows, later)
    return rows[now], rows[~now & ~alone], rows[alone]


class _FirstOwned(FirstRows):
    """First weights of the rows of one owner: those that the same rows would have in one process."""

    def __init__(self, num_rows: Sequence[int], seed: int, rank: int, world: int) -> None:
        super().__init__(num_rows, seed)
        self._rank, self._world = rank, world

    def into(self, out: NDArray[np.float32], lines: NDArray[np.int32], ids: NDArray[np.int64]) -> None:
        super().into(out, lines, ids * self._world + self._rank)


class Owned(TieredEmbeddings):
    """The rows of one owner, as a table of their own over its tiers."""

    def __init__(
        self,
        num_rows: Sequence[int],
        dim: int,
        optimizer: Optimizer,
        *,
        rank: int,
        world: int,
        first_seed: int,
        tiers: Sequence[Any],
        **settings: Any,
    ) -> None:
        self._global = [int(n) for n in num_rows]
        self._rank, self._world, self._seed_of_first = rank, world, first_seed
        own = len(range(rank, sum(self._global), world))
        if not own:
            raise InputError(f"rank {rank} of {world} has no row", hint="use fewer workers than rows")
        if tiers and isinstance(tiers[0], Dram) and (budget := Budget.of(tiers[0].size)).kind == "bytes":
            beside = Owner.bytes_for(own, settings["dtype"])
            tiers = [Dram(f"{max(int(budget.value) - beside, 0)} B"), *tiers[1:]]
        super().__init__([Table(f"rows {rank} of {world}", own, dim)], optimizer, tiers=tiers, **settings)

    def _make_rows(
        self,
        optimizer: Optimizer,
        first: FirstRows,
        *,
        dtype: torch.dtype,
        update: Literal["backward", "step"],
        seed: int,
    ) -> Rows:
        return super()._make_rows(optimizer, self._first(self._seed_of_first), dtype=dtype, update=update, seed=seed)

    def _first(self, seed: int) -> FirstRows:
        return _FirstOwned(self._global, seed, self._rank, self._world)

    def _accept(
        self, note: dict[str, Any], optimizer: Optimizer, first: FirstRows, *rest: Any
    ) -> tuple[FirstRows, Optimizer]:
        before, rule = super()._accept(note, optimizer, first, *rest)
        return self._first(before.seed), rule


class Owner:
    """Serves the rows of one worker to all of them, batch by batch.

    Batches go through `enter` (what each worker needs of it), `load` (rows into memory), `begin` (classes), `give`
    (values), `apply` (gradients), and `finish`, each in order. A row whose value was given has an update due; to give
    it for a later batch before that is a stale read, which is asserted not to happen.

    Parameters
    ----------
    rows
        Where they live.
    rank, world
        Which of how many owners this is.
    overlap
        Whether a batch's values are given while the one before it trains.
    """

    def __init__(self, rows: Owned, rank: int, world: int) -> None:
        self.owned, self.rows, self.store = rows, rows.rows, rows.store
        self.rank, self.world = rank, world
        self.requests: dict[int, list[Local]] = {}
        self._now: dict[int, Local] = {}
        num = rows.num_rows
        self._last = np.full(num, -1, np.int32)  # the last batch of the window that needs the row
        self._class = np.zeros(num, np.uint8)
        self._due = np.zeros(num, np.bool_)
        # The rounding of 16-bit rows goes by the id of a row: by the one it would have in one process.
        self._names = np.zeros(0 if self.rows.weight.dtype == torch.float32 else len(self.rows.weight), np.int32)
        if len(self._names):
            self.rows._names = self._names
        self._updating = threading.Lock()

    @staticmethod
    def bytes_for(num_rows: int, dtype: torch.dtype) -> int:
        """Return the most bytes that this adds to the rows and their tiers."""
        return num_rows * (6 if dtype == torch.float32 else 10)

    # -- what is to come

    def enter(self, batch: int, requests: list[Local]) -> bool:
        """Take the distinct rows that each worker needs of the next batch; False where the window is full."""
        union = np.concatenate(requests)
        with self.store.lock:
            if not self.store.schedule.enter(union):
                return False
        self._last[union] = batch
        self.requests[batch] = requests
        return True

    def load(self, needed: int) -> None:
        """Bring in the rows of coming batches, at least up to the one that is needed."""
        with self.store.lock:
            schedule = self.store.schedule
            while self.store.load():
                pass
            if schedule.loaded <= needed:
                both = [r for b in (needed - 1, needed) for r in self.requests.get(b, [])]
                rows = len(np.unique(np.concatenate(both)))
                raise InputError(
                    f"batches {needed - 1} and {needed} need {rows:,} rows of rank {self.rank} at a time, and its "
                    f"memory holds {self.store.residency.num_slots:,}",
                    hint="give more memory, or use smaller batches",
                )

    def begin(self, batch: int, *, ahead: bool) -> tuple[Local, list[NDArray[np.uint8]]]:
        """Decide the classes of a batch; returns the rows whose values are not waited for, and each request's classes.

        With `ahead` values are given while the batch before trains, so that rows both need are of class `NOW` there.
        Then the batch after this one must be known, if there is one.
        """
        current = np.concatenate(self.requests[batch])
        following = self.requests.get(batch + 1) if ahead else None
        now, later, alone = sync_classes(
            current, _NONE if following is None else np.concatenate(following), current[self._last[current] > batch]
        )
        self._class[now], self._class[later], self._class[alone] = NOW, LATER, ALONE
        self._now[batch] = now
        waited = self._now.get(batch - 1, _NONE)
        return waited, [self._class[request] for request in self.requests[batch]]

    def now(self, batch: int) -> Local:
        """Return the rows of a batch that the next one needs as well."""
        return self._now[batch]

    # -- values and gradients

    def give(self, rows: Sequence[Local]) -> list[NDArray[Any]]:
        """Return the values of rows for each worker; each row has an update due from here on."""
        assert not any(self._due[some].any() for some in rows), "a row is read before its update"
        for some in rows:
            self._due[some] = True
        slots = [self.store.residency.where[some] for some in rows]
        assert all(len(some) == 0 or some.min() >= 0 for some in slots), "rows of a batch are in memory"
        return [array_of(self.rows.weight)[some] for some in slots]

    def apply(self, lookups: Sequence[Given], step: int, rule: Optimizer) -> None:
        """Update rows once from the gradients of all workers, in the order of their ranks."""
        if not any(len(rows) for rows, _, _, _ in lookups):
            return
        row_of = np.concatenate([rows for rows, _, _, _ in lookups])
        starts = np.cumsum([0, *[len(grad) for *_, grad in lookups]])
        bag_of = np.concatenate([bags + start for (_, bags, _, _), start in zip(lookups, starts, strict=False)])
        scaled = any(len(scale) for _, _, scale, _ in lookups)
        scale_of = [scale if len(scale) else np.ones(len(rows), np.float32) for rows, _, scale, _ in lookups]
        slots = self.store.residency.where[row_of].astype(np.int64)
        merged = Lookups(
            slots, bag_of.astype(np.int32), np.concatenate(scale_of) if scaled else np.empty(0, np.float32)
        )
        grad = torch.from_numpy(np.concatenate([grad for *_, grad in lookups]))
        with self._updating:
            rows = self.rows
            if len(self._names):
                self._names[slots] = row_of * self.world + self.rank
            before, rows.counts.steps, rows.optimizer = rows.counts.steps, step, rule
            rows.counts.rows_updated += int(rows._run(_Waiting([(merged, grad)])))
            rows.counts.steps = max(before, step)

    def settled(self, rows: Local) -> None:
        """Note that what was due for rows has been applied."""
        self._due[rows] = False

    def delayed(self, batch: int) -> Local:
        """Return the distinct rows of a batch that are not of the class `NOW`."""
        return np.setdiff1d(np.concatenate(self.requests[batch]), self._now[batch])

    def finish(self, batch: int) -> None:
        """Let the rows of a batch go where the policy wants them."""
        with self.store.lock:
            self.store.finish()
        del self.requests[batch]
        self._now.pop(batch - 1, None)

    def abandon(self) -> None:
        """Forget the batches that were to come."""
        self.rows.give_up()
        self.requests, self._now = {}, {}
        self._last[:] = -1
        self._due[:] = False

    # -- beside the batches

    def copy(self, rows: Local, *, every: bool) -> list[NDArray[Any]]:
        """Return copies of the weights of distinct rows, or of all that belongs to them."""
        found = self.rows.columns(rows)
        return [_bits(t) for t in (found.values() if every else [found["weight"]])]

    def fill(self, rows: Local, columns: Mapping[str, Tensor]) -> None:
        """Replace distinct rows."""
        self.rows.fill(rows, columns)


def _bits(tensor: Tensor) -> NDArray[Any]:
    return tensor.numpy() if tensor.dtype == torch.int32 else array_of(tensor)
