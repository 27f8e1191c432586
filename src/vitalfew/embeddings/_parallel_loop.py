"""One loop over the batches of several workers: the threads, and when each may say what."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from vitalfew.core import InputError, StorageError
from vitalfew.embeddings._exchange import Answer, Exchange, Gone, Wire
from vitalfew.embeddings._owner import Local
from vitalfew.embeddings._peers import Message, Peers
from vitalfew.embeddings._turn import Turn
from vitalfew.embeddings.ahead import _nbytes
from vitalfew.embeddings.parallel import ShardedEmbeddings
from vitalfew.embeddings.rows import _Waiting, as_integers, as_offsets
from vitalfew.embeddings.tiered_rows import row_ids

__all__ = ["Loop", "Times"]

B = TypeVar("B")
_BATCH, _END, _STOP, _BROKEN = 0, 1, 2, 3
_PATIENCE = 5.0
"""Seconds to wait, at the end of a loop that has failed, for threads that wait for other workers."""


@dataclass(slots=True)
class Times:
    """Where time has gone, in seconds."""

    waited: float = 0.0
    """The loop has waited for values."""
    synced: float = 0.0
    """The end of backward passes, for rows that the next batch needs."""
    moving: float = 0.0
    """Rows, values and gradients have been moving in the background."""


class Loop(Generic[B]):
    """The training thread takes turns; one thread looks ahead, one carries values and gradients.

    With the batch number b, all workers do, in this order: look b + 2; in the carrying thread deliver b - 1, prepare
    b + 1; in the training thread forward b, backward b, train b. `prepare` and `train` touch different rows, so that
    they may come in any order. Without `overlap` b + 1 is prepared after b was delivered.
    """

    def __init__(
        self,
        tables: ShardedEmbeddings,
        source: Iterator[B],
        ids: Callable[[B], Any],
        wire: Wire,
        times: Times,
        *,
        overlap: bool,
    ) -> None:
        self._tables, self._rows, self._owner = tables, tables.rows, tables.owner
        self._source, self._ids, self._lag = source, ids, int(overlap)
        look, carry = tables.ahead_peers
        self.exchange = Exchange(self._owner, look, carry, self._rows.peers, wire, ahead=overlap, exact=tables.exact)
        self._times = times
        self.samples = 0
        self.at_end: BaseException | None = None
        """What is raised where the batch after the last one would come."""
        self._change = threading.Condition()
        self._queue: deque[tuple[B, Turn, int, int]] = deque()  # batch, turn, samples of all workers, bytes
        self._queued_bytes = 0
        self._turns: dict[int, Turn] = {}
        self._known = 0  # batches that have entered the window
        self._ended: int | None = None  # how many batches there are
        self._left: StorageError | None = None  # a worker has left the loop: no more batches come
        self._ready = 0  # batches whose values are here, but for those the batch before changes
        self._given = 0
        self._trained = 0  # batches whose backward is done
        self._gone: deque[Gone] = deque()  # what those have left to be done
        self._applied = 0  # batches whose updates are all done
        self._arrived: list[Message] = []
        self._failure: BaseException | None = None
        self._stop = self._drain = False
        self._rows.settle, self._rows.driven = self._settle, True
        self._threads = [
            threading.Thread(target=self._guarded, args=(work, peers), name=f"vitalfew-{name}", daemon=True)
            for work, peers, name in ((self._look, look, "look"), (self._carry, carry, "carry"))
        ]
        for thread in self._threads:
            thread.start()

    # -- the loop's side

    def next(self) -> tuple[B] | None:
        """Return the next batch once its values are here, None after the last."""
        if self._rows.take is not None:
            self._train(_Waiting())  # the batch had no backward
        start = time.perf_counter()
        with self._change:
            if self._lag == 0:
                self._wait(lambda: self._applied == self._given)
            self._wait(lambda: self._ready > self._given or self._ended == self._given)
            if self._ended == self._given:
                self._wait(lambda: self._applied == self._given)
                return None
            batch, turn, self.samples, size = self._queue.popleft()
            self._queued_bytes -= size
            self._given += 1
            self._change.notify_all()
        for k, message in enumerate(self._arrived):
            turn.complete(k, message)
        self._arrived = []
        self._rows.turn, self._rows.take = turn, self._train
        self._times.waited += time.perf_counter() - start
        return (batch,)

    def _train(self, waiting: _Waiting) -> None:
        """End a turn: what the next batch needs is exchanged here, the rest goes to the carrying thread."""
        turn, self._rows.take = self._rows.turn, None
        assert turn is not None
        with self._change:
            self._wait(lambda: True)  # not if something has failed
        start = time.perf_counter()
        gone, wrong = self.exchange.train(self._given - 1, turn, waiting, self._rows.counts.steps, self._rows.optimizer)
        self._rows.counts.steps = gone.step
        self._arrived = self.exchange.after(self._given - 1)
        self._times.synced += time.perf_counter() - start
        with self._change:
            self._gone.append(gone)
            self._trained += 1
            self._change.notify_all()
        if wrong:
            raise InputError(
                f"a gradient of rank {wrong[0]} is NaN or infinite; no row was changed",
                hint="lower the learning rate, or look for NaN in the dense input and the loss",
            )

    def _wait(self, until: Callable[[], bool]) -> None:
        """Wait, with the lock held, and raise what has failed meanwhile."""
        while self._failure is None and not until():
            self._change.wait()
        if self._failure is not None:
            raise self._failure

    def _settle(self) -> None:
        with self._change:
            self._wait(lambda: self._applied == self._trained)

    def close(self, error: BaseException | None) -> None:
        """Let all that is on its way arrive, and end the threads; with an error, tell the other workers."""
        self._rows.turn, self._rows.take = None, None
        with self._change:
            self._failure = self._failure or error
            failure, self._drain = self._failure, True
            self._change.notify_all()
        look, carry = self._threads
        if failure is not None:
            self._rows.peers.fail(self._why(failure))
            carry.join(_PATIENCE)
            look.join(_PATIENCE)
            return
        carry.join()
        with self._change:
            self._stop = True
            self._change.notify_all()
        look.join()
        self._owner.abandon()
        self._rows.settle, self._rows.driven = lambda: None, False

    def _why(self, error: BaseException) -> str:
        return error.message if isinstance(error, StorageError) else f"rank {self.exchange.rank} has failed: {error!r}"

    def _guarded(self, work: Callable[[], None], peers: Peers) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  whatever it is, the loop has to hear of it, and other workers
            with self._change:
                self._failure = self._failure or error
                self._change.notify_all()
            peers.fail(self._why(error))

    # -- the thread that looks ahead

    def _look(self) -> None:
        batch = 0
        while self._look_at(batch):
            batch += 1

    def _look_at(self, number: int) -> bool:
        """Read one batch, and tell every owner which of its rows that needs; False where there is no more."""
        with self._change:
            self._wait(lambda: self._stop or self._may_look(number))
            status = _STOP if self._stop else _BATCH
        own: Exception | None = None
        found: tuple[B, Turn] | None = None
        if status == _BATCH:
            try:
                found = self._read()
                status = _END if found is None else _BATCH
            except Exception as error:  # noqa: BLE001  of the loader, raised where its batch would have come
                own, status = error, _BROKEN
        answers = self.exchange.look(status, found[1] if found else None, "" if own is None else repr(own))
        if found is None or any(answer.status != _BATCH for answer in answers):
            self._end(number, answers, own)
            return False
        requests = [answer.request for answer in answers]
        if not self._enter(number, requests):
            return False
        size = _nbytes(found[0]) + found[1].nbytes + sum(request.nbytes for request in requests)
        with self._change:
            self._queue.append((*found, sum(answer.samples for answer in answers), size))
            self._turns[number] = found[1]
            self._queued_bytes += size
            self._known = number + 1
            self._change.notify_all()
        return True

    def _may_look(self, number: int) -> bool:
        if not self._owner.store.schedule.wants():
            return False
        return number <= self._applied + 2 + self._lag or self._queued_bytes < self._owner.owned.room.queue_bytes

    def _read(self) -> tuple[B, Turn] | None:
        try:
            batch = next(self._source)
        except StopIteration:
            return None
        found = self._ids(batch)
        ids, offsets = found if isinstance(found, tuple) else (found, None)
        flat = as_integers(ids, "ids").reshape(-1)
        edges = np.empty(0, np.int64) if offsets is None else as_offsets(offsets, len(flat))
        layout = self._tables.layout
        bags = len(flat) if offsets is None else len(edges) - 1
        turn = Turn(
            row_ids(layout, flat, edges), bags // len(layout.features), num_rows=self._tables.num_rows,
            world=self._tables.world, dim=self._tables.dim, dtype=self._rows.weight.dtype,
        )  # fmt: skip
        return batch, turn

    def _enter(self, number: int, requests: list[Local]) -> bool:
        """Put a batch into the window, once there is room for it; False where it is time to stop."""
        while not self._owner.enter(number, requests):
            with self._change:
                applied = self._applied
                if number <= applied + 1 + self._lag:
                    raise InputError(
                        f"a batch of {sum(map(len, requests)):,} rows does not fit the window", hint="give more memory"
                    )
                self._wait(lambda: self._stop or self._applied > applied)  # noqa: B023
                if self._stop:
                    return False
        return True

    def _end(self, number: int, answers: list[Answer], own: Exception | None) -> None:
        """Note that no batch comes any more, and why."""
        statuses = [answer.status for answer in answers]
        with self._change:
            if _STOP in statuses:
                self._left = StorageError(
                    f"rank {statuses.index(_STOP)} has left the loop", hint="leave it in all workers at the same batch"
                )
            else:
                self._ended = number
            if _BROKEN in statuses:
                k = statuses.index(_BROKEN)
                self.at_end = own or StorageError(
                    f"the loader of rank {k} has failed: {answers[k].text}", hint="see the log of that worker"
                )
            elif _BATCH in statuses and _END in statuses:
                self.at_end = InputError(
                    f"the loader of rank {statuses.index(_END)} ended after {number} batches, "
                    f"that of rank {statuses.index(_BATCH)} has more",
                    hint="let all give as many batches, some of them empty",
                )
            self._change.notify_all()

    # -- the thread that carries

    def _carry(self) -> None:
        for number in range(1 + self._lag):
            self._prepare(number)
        number = 0
        while True:
            with self._change:
                self._wait(lambda: bool(self._gone) or self._drain or self._ended == number)  # noqa: B023
                if not self._gone:
                    return
                gone = self._gone.popleft()
            start = time.perf_counter()
            self.exchange.deliver(number, gone)
            self._owner.finish(number)
            del self._turns[number]
            number += 1
            with self._change:
                self._applied = number
                self._change.notify_all()
            self._times.moving += time.perf_counter() - start
            self._prepare(number + self._lag)

    def _prepare(self, number: int) -> None:
        """Bring the rows of a batch into memory and their values here, if there is such a batch."""
        with self._change:
            self._wait(lambda: self._known > number + 1 or self._ended is not None or self._left is not None)
            if self._known <= number + 1 and self._left is not None:
                if self._drain:
                    return
                raise self._left
            if self._ended is not None and number >= self._ended:
                return
            turn = self._turns[number]
        start = time.perf_counter()
        self._owner.load(number)
        self.exchange.prepare(number, turn)
        with self._change:
            self._ready = number + 1
            self._change.notify_all()
        self._times.moving += time.perf_counter() - start
