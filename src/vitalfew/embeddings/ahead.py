"""Read ahead of a training loop, so that the rows of a batch are in memory when its turn comes."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitalfew.core import InputError, Line, Receipt
from vitalfew.embeddings.rows import as_integers, as_offsets
from vitalfew.embeddings.tiered import TieredEmbeddings
from vitalfew.embeddings.tiered_rows import row_ids
from vitalfew.tiers.policies import Belady
from vitalfew.tiers.rehearsal import Rehearsal

__all__ = ["Prefetch"]

B = TypeVar("B")
_PATIENCE = 5.0
"""Seconds to wait, at the end, for a loader that is in the middle of a batch."""


class Prefetch(Generic[B]):
    """The batches of a loader, in its order, each given when the rows it needs are in memory.

    A thread reads the loader ahead, tells the policy what is coming, brings rows in and writes rows back while the
    model computes. Every batch sees all updates of those before it: results are, bit for bit, those of the loop
    without this. An error of the loader or of the disk is raised where its batch would have come.

    Parameters
    ----------
    tables
        Their policy decides who stays, and how far it looks ahead.
    loader
        Read once per loop over this object. Shuffling belongs into it.
    ids
        Takes a batch and returns its ids as `EmbeddingBags` wants them, or ids and offsets. By default the
        attributes or keys ``ids`` and ``offsets``.
    scratch
        Folder for what the `Belady` policy notes about a pass, four bytes per row and batch.
    on_rehearsal
        Called with the number of batches that it has read so far.

    Examples
    --------
    >>> import tempfile, torch
    >>> from vitalfew.embeddings import SGD, Prefetch, Table, TieredEmbeddings
    >>> from vitalfew.tiers import Dram, File
    >>> tables = TieredEmbeddings(
    ...     [Table("user", 100, 4)], SGD(lr=0.5), tiers=[Dram(4), File(tempfile.mkdtemp())]
    ... )
    >>> loader = [{"ids": torch.tensor([[i % 7], [i % 5]])} for i in range(10)]
    >>> with Prefetch(tables, loader) as batches:
    ...     for batch in batches:
    ...         tables(batch["ids"]).sum().backward()
    >>> tables.moves.needed, tables.moves.missed
    (15, 11)
    >>> tables.close()

    Notes
    -----
    The batch before is done when the next one is asked for. Gradients that wait then (``update="step"``) keep their
    rows in memory. Leave the loop, or the ``with`` block, before you use another `Prefetch` over the same tables.

    References
    ----------
    Agarwal et al., Bagpipe: Accelerating Deep Recommendation Model Training, SOSP 2023, section 3.
    """

    def __init__(
        self,
        tables: TieredEmbeddings,
        loader: Iterable[B],
        *,
        ids: Callable[[B], Tensor | tuple[Tensor, Tensor | None]] | None = None,
        scratch: str | os.PathLike[str] | None = None,
        on_rehearsal: Callable[[int], None] | None = None,
    ) -> None:
        if not isinstance(tables, TieredEmbeddings):
            raise InputError(
                f"a {type(tables).__name__} has nothing to read ahead", hint="make it a TieredEmbeddings, or iterate "
                "over the loader itself"
            )  # fmt: skip
        self.tables, self.loader = tables, loader
        self.scratch, self.on_rehearsal = scratch, on_rehearsal
        self._ids = ids or _ids_of
        self._running: _Run[B] | None = None
        self.given = 0
        """Batches given so far, over all loops."""
        self.waited = 0.0
        """Seconds that the loop has waited for rows."""
        self.moving = 0.0
        """Seconds that rows have been moving in the background."""
        self._before = dataclasses.asdict(tables.moves), dataclasses.asdict(tables.store.lower.traffic)

    def __iter__(self) -> Iterator[B]:
        if self._running is not None:
            raise InputError("a loop over this Prefetch is running", hint="finish it first")
        self._running = run = self._begin()
        try:
            while True:
                found = run.next()
                if not found:
                    break
                self.given += 1
                yield found[0]
        finally:
            # Where the loop fails, what waits is given up without another complaint.
            waited = run.close()
            if self._running is run:
                self._running = None
        if waited:
            raise InputError(
                f"{waited} gradients waited for a step when the loop ended", hint="call step() in the loop"
            )

    def _begin(self) -> _Run[B]:
        return _Run(self)

    def close(self) -> int:
        """Stop reading ahead; the rows stay where they are. Returns how many gradients were given up."""
        run, self._running = self._running, None
        return run.close() if run else 0

    def __enter__(self) -> Prefetch[B]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def receipt(self) -> Receipt:
        """Return what moved since this was made, and how much of that time the loop did not wait for."""
        moves, traffic = self.tables.moves, self.tables.store.lower.traffic
        was_moves, was = self._before
        steps, record = max(self.given, 1), self.tables.store.record.nbytes
        needed = moves.needed - was_moves["needed"]
        missed = moves.missed - was_moves["missed"]
        fresh = moves.fresh - was_moves["fresh"]
        left = moves.left - moves.clean - was_moves["left"] + was_moves["clean"]
        moved = Line(
            "row bytes moved per step", "B", 2.0 * needed * record / steps, (missed - fresh + left) * record / steps,
            "counted", note="before: every row read and written in each step that needs it",
        )  # fmt: skip
        return Receipt(
            "rows read ahead",
            f"{self.tables.policy.name}, {self.given} batches",
            (
                Line("rows fetched per step", "rows", needed / steps, missed / steps, "counted", note="before: needed"),
                Line("of them never written before", "rows", None, fresh / steps, "counted", note="begun, not read"),
                moved,
                Line("device bytes read", "B", None, traffic.bytes_read - was["bytes_read"], "counted"),
                Line("device bytes written", "B", None, traffic.bytes_written - was["bytes_written"], "counted"),
                Line("waiting for rows", "s", self.moving, self.waited, "measured", note="before: all the moving"),
                Line("memory", "B", None, self.tables.room.nbytes, "counted", note="rows, directory, window, buffers"),
            ),
            "undecided",
            "no paired run was made: counts alone do not show the time or the quality",
        )


class _Run(Generic[B]):
    """One loop: the thread, and what it shares with the loop."""

    def __init__(self, owner: Prefetch[B]) -> None:
        self._owner = owner
        self._rows = owner.tables.rows
        self._store = owner.tables.store
        self._schedule = self._store.schedule
        if self._rows.driven:
            raise InputError("another Prefetch reads ahead for these tables", hint="leave its loop first")
        if self._rows.busy:
            raise InputError(
                "an update may come for a forward before this loop", hint="call backward and step() first, or let go "
                "of its result"
            )  # fmt: skip
        self._rehearsal = self._rehearse() if isinstance(owner.tables.policy, Belady) else None
        self._rows.give_up(self._rehearsal)
        self._rows.driven = True
        self._source = iter(owner.loader)
        self._queue: deque[B] = deque()
        self._sizes: deque[int] = deque()  # of the batches that are not done, whether given or not: no clock decides
        self._queued_bytes = 0
        self._parked: tuple[B, NDArray[np.int64]] | None = None
        self._change = threading.Condition()
        self._done: list[bool] = []  # of the batches that are done: whether gradients still wait for their rows
        self._given = 0
        self._ready = 0
        self._ended = False  # the loader has no more
        self._broken: BaseException | None = None  # why not, if it failed
        self._drained = False
        self._failure: BaseException | None = None
        self._stop = False
        self._thread = threading.Thread(target=self._work, name="vitalfew-prefetch", daemon=True)
        self._thread.start()

    # -- the loop's side

    def next(self) -> tuple[B] | None:
        with self._change:
            if self._given:
                self._done.append(self._rows.busy)
                self._change.notify_all()
            if not self._come(lambda: self._ready > self._given):
                return None
            self._rows.turn = self._given
            self._given += 1
            return (self._queue.popleft(),)

    def _come(self, there: Callable[[], bool]) -> bool:
        """Wait for something of the thread's; False where the loader has no more."""
        start = time.perf_counter()
        with self._change:
            while not (there() or self._failure or self._drained or self._stop):
                self._change.wait()
            self._owner.waited += time.perf_counter() - start
            if self._stop:
                raise InputError("the Prefetch was closed inside its own loop", hint="break out of the loop instead")
            if there():
                return True
            if self._failure:
                raise self._failure
            return False

    def close(self) -> int:
        with self._change:
            if self._stop:
                return 0
            self._stop = True
            self._change.notify_all()
        try:
            self._thread.join(_PATIENCE)
        finally:  # also on a second Ctrl-C
            self._rows.driven = False
            waited = self._rows.give_up()
            if self._rehearsal is not None:
                self._rehearsal.close()
        return waited

    def _rehearse(self) -> Rehearsal:
        """Read the loader once for its ids."""
        owner = self._owner
        if iter(owner.loader) is owner.loader:
            raise InputError(
                f"a {type(owner.loader).__name__} can be read only once, and Belady() reads it beforehand",
                hint="pass an object that can be iterated again, or use LookAhead()",
            )
        ids = (self._rows_of(batch) for batch in owner.loader)
        return Rehearsal(ids, owner.tables.num_rows, folder=owner.scratch, progress=owner.on_rehearsal)

    # -- the thread's side

    def _work(self) -> None:
        try:
            self._fill(self._schedule.ahead + 1)
            self._load()
            self._fill()
            while not (self._ended and self._schedule.finished == self._schedule.window.entered):
                self._load()  # what the window had no room for before
                if (waits := self._next_done()) is None or not self._finish(waits):
                    return
                self._load()
                self._fill()
            if self._broken is not None:
                raise self._broken
            with self._change:
                self._drained = True
                self._change.notify_all()
        except BaseException as error:  # noqa: BLE001  whatever it is, the loop has to hear of it
            with self._change:
                self._failure = error
                self._change.notify_all()

    def _next_done(self) -> bool | None:
        """Wait until the next batch is done; say whether gradients wait for its rows, None when it is time to stop."""
        with self._change:
            while not (self._stop or len(self._done) > self._schedule.finished):
                self._change.wait()
            return None if self._stop else self._done[self._schedule.finished]

    def _finish(self, waits: bool) -> bool:
        """Let the rows of a batch that is done leave, if no gradient waits for them; False when it is time to stop."""
        with self._moving():
            if self._stop:
                return False
            self._queued_bytes -= self._sizes.popleft()
            self._store.finish(keep=waits)
            self._announce()
            return True

    def _load(self) -> None:
        """Bring in the rows of the next batches, as far ahead as they may come."""
        with self._moving():
            while not self._stop and self._store.load(self._held):
                self._announce()

    def _held(self) -> None:
        """Take note that those rows of the next batch are held that are here; the others are about to come."""

    def _announce(self) -> None:
        with self._change:
            self._ready = self._schedule.loaded
            self._change.notify_all()

    @contextmanager
    def _moving(self) -> Iterator[None]:
        start = time.perf_counter()
        with self._store.lock:
            yield
        self._owner.moving += time.perf_counter() - start

    def _fill(self, at_most: int | None = None) -> None:
        """Read the loader until the window knows enough, or is full."""
        while not (self._stop or self._ended):
            entered = self._schedule.window.entered
            if at_most is not None and entered >= at_most:
                return
            if not self._schedule.wants():
                return
            few = entered <= self._schedule.loaded + 1
            if self._queued_bytes >= self._owner.tables.room.queue_bytes and not few:
                return
            if self._parked is None:
                self._parked = self._read()
                if self._parked is None:
                    self._ended = True
                    return
            batch, rows = self._parked
            with self._store.lock:
                if self._stop:
                    return
                if not self._schedule.enter(rows):
                    if entered == self._schedule.loaded == self._schedule.finished:
                        raise InputError(
                            f"a batch of {len(rows):,} ids does not fit the window, which holds "
                            f"{self._schedule.window.size:,}",
                            hint="give more memory, or use smaller batches",
                        )
                    return
            self._parked = None
            self._sizes.append(_nbytes(batch))
            self._queued_bytes += self._sizes[-1]
            self._queue.append(batch)

    def _read(self) -> tuple[B, NDArray[np.int64]] | None:
        """Take a batch from the loader. What is wrong with it is told when its turn comes, after those before it."""
        try:
            for batch in self._source:
                return batch, self._rows_of(batch)
        except BaseException as error:  # noqa: BLE001  as in `_work`
            self._broken = error
        return None

    def _rows_of(self, batch: B) -> NDArray[np.int64]:
        return self._lookups_of(batch)[0]

    def _lookups_of(self, batch: B) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the row of each lookup, and where bags begin if that is said."""
        found = self._owner._ids(batch)
        ids, offsets = found if isinstance(found, tuple) else (found, None)
        tables = self._owner.tables
        tables.check_shape(ids, offsets)
        flat = as_integers(ids, "ids").reshape(-1)
        edges = np.empty(0, np.int64) if offsets is None else as_offsets(offsets, len(flat))
        return row_ids(tables.layout, flat, edges), edges


def _ids_of(batch: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(batch, Mapping) and "ids" in batch:
        ids, offsets = batch["ids"], batch.get("offsets")
    elif hasattr(batch, "ids"):
        ids, offsets = batch.ids, getattr(batch, "offsets", None)
    else:
        raise InputError(
            f"a batch of type {type(batch).__name__} has no `ids`", hint="pass ids=lambda batch: ... to Prefetch"
        )
    return torch.as_tensor(ids), None if offsets is None else torch.as_tensor(offsets)


def _nbytes(batch: Any) -> int:
    """Count the bytes of tensors and arrays in a batch."""
    if isinstance(batch, Tensor):
        return batch.numel() * batch.element_size()
    if isinstance(batch, np.ndarray):
        return batch.nbytes
    if isinstance(batch, Mapping):
        return sum(map(_nbytes, batch.values()))
    if isinstance(batch, list | tuple):
        return sum(map(_nbytes, batch))
    if dataclasses.is_dataclass(batch):
        return sum(_nbytes(getattr(batch, field.name)) for field in dataclasses.fields(batch))
    return 0
