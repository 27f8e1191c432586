"""Who is served when: a queue, admission by bytes, and one loop that reads prompts and writes tokens."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from vitalfew.core.errors import InputError
from vitalfew.generate.server.jobs import Done, Job
from vitalfew.generate.server.metrics import Metrics
from vitalfew.generate.server.pool import Pool
from vitalfew.generate.server.requests import ApiError
from vitalfew.generate.server.row import Row, rows_of
from vitalfew.generate.server.sampling import draw

if TYPE_CHECKING:
    from vitalfew.generate.server._transformers_engine import Engine

__all__ = ["Scheduler"]

_log = logging.getLogger("vitalfew.server")
_OVERTAKES = 16


class Scheduler:
    """Serves jobs with one model, in a thread of its own.

    Parameters
    ----------
    engine
        What runs the model.
    decode
        Tokens to text.
    ends
        Tokens that end an answer.
    memory
        Bytes for keys and values, of all requests together.
    queue
        Requests that may wait.
    timeout
        Seconds that a request may take, its waiting included.

    Notes
    -----
    First come, first served; a request that finds no room may be overtaken by smaller ones, but only by a fixed number.
    """

    def __init__(
        self, engine: Engine, decode: Callable[[Sequence[int]], str], ends: frozenset[int], *, memory: int,
        queue: int = 256, timeout: float = 600.0,
    ) -> None:  # fmt: skip
        self.engine, self.metrics, self.pool = engine, Metrics(), Pool(memory)
        self._decode, self._ends, self._most, self._timeout = decode, ends, queue, timeout
        self._queue: deque[Job] = deque()
        self._reading: Job | None = None
        self._change = threading.Condition()
        self._closed = False
        self._seconds = 1.0
        self._peak = 0
        self._thread = threading.Thread(target=self._run, name="vitalfew-server", daemon=True)
        self._gauge()
        self._thread.start()

    # From other threads

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs of one request, all or none.

        Raises
        ------
        ApiError
            If one of them can never fit, the queue is full, or the server is about to end.
        """
        for job in jobs:
            if job.need.most > self.pool.limit:
                raise ApiError(
                    400, f"this request needs {job.need.most:,} bytes of keys and values, the server has "
                    f"{self.pool.limit:,}: shorten the prompt, or ask for fewer answers", code="kv_memory_exceeded",
                )  # fmt: skip
        with self._change:
            if self._closed:
                raise ApiError(503, "the server is shutting down", code="shutting_down")
            if len(self._queue) + len(jobs) > self._most:
                self.metrics.requests["refused"] += len(jobs)
                wait = min(60, 1 + int(self._seconds * len(self._queue) / max(1, self.metrics.gauges["rows"])))
                raise ApiError(429, f"{len(self._queue)} requests are waiting already", code="queue_full", retry=wait)
            for job in jobs:
                job.deadline = job.start + self._timeout
            self._queue += jobs
            self._change.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Let go of jobs whose client has left."""
        with self._change:
            for job in jobs:
                job.cancelled = True
            self._change.notify()

    @property
    def alive(self) -> bool:
        """Whether the loop runs."""
        return self._thread.is_alive()

    def close(self) -> None:
        """End the loop after its step; whatever is still open gets an error."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join()

    # The loop

    def _run(self) -> None:
        try:
            while self._wait():
                self._sweep()
                self._admit()
                if self._reading is not None:
                    self._read(self._reading)
                if self.engine.owners:
                    self._step()
                self._gauge()
        finally:
            with self._change:
                self._closed = True  # also after a fault of ours, so that nobody waits for a loop that is gone
            for job in self._jobs():
                self._end(job, "error", ApiError(503, "the server is shutting down", code="shutting_down"))
            self._gauge()

    def _wait(self) -> bool:
        """Wait for work; False when the loop is to end."""
        with self._change:
            while not (self._closed or self._queue or self._reading or self.engine.owners):
                self._change.wait()
            return not self._closed

    def _jobs(self) -> list[Job]:
        with self._change:
            waiting = list(self._queue)
        running = dict.fromkeys(row.job for row in self.engine.owners)
        return [*waiting, *([self._reading] if self._reading is not None else []), *running]

    def _sweep(self) -> None:
        """Let go of jobs that nobody waits for, or that took too long."""
        now = time.monotonic()
        for job in self._jobs():
            if job.cancelled:
                self._end(job, "cancelled")
            elif now > job.deadline:
                error = ApiError(504, f"the request took more than {self._timeout:g} s", code="timeout")
                self._end(job, "timeout", error)

    def _admit(self) -> None:
        """Start to read the first prompt that there is room for."""
        if self._reading is not None:
            return
        with self._change:
            passed = []
            for job in self._queue:
                if self.pool.take(job.need.most):
                    break
                if job.overtaken >= _OVERTAKES:
                    return
                passed.append(job)
            else:
                return
            self._queue.remove(job)
            for earlier in passed:
                earlier.overtaken += 1
        job.held = job.need.most
        self._reading = job
        self.engine.begin(job.ids, job.new, job.plan, job.need)

    def _read(self, job: Job) -> None:
        """Read one chunk of a prompt; after the last its answers join the batch."""
        start = time.monotonic()
        try:
            logits = self.engine.advance()
            self._count()
            if logits is not None:
                rows = rows_of(job, self._decode)
                self.engine.join(rows)
        except InputError as error:
            self._end(job, "error", ApiError(400, str(error), code="cannot_evict"))
            return
        except Exception:  # noqa: BLE001 - one request's failure must not end the others
            _log.exception("reading a prompt of %d tokens failed", len(job.ids))
            self._end(job, "error", ApiError(500, "the model failed on this prompt"))
            return
        self.metrics.chunk.add(time.monotonic() - start)
        if logits is None:
            return
        self._reading = None
        self.metrics.tokens["prompt"] += len(job.ids)
        kept = job.need.row * job.need.copies
        self.pool.give(job.held - kept)
        job.held, job.open = kept, len(rows)
        self._count()
        self._write(rows, logits.expand(len(rows), -1))

    def _step(self) -> None:
        """Write one token in each row."""
        rows: list[Row] = self.engine.owners
        start = time.monotonic()
        try:
            logits = self.engine.step([row.token for row in rows])
        except Exception:  # noqa: BLE001 - the requests that wait can still be served
            _log.exception("a step of %d rows failed", len(rows))
            self._fail(rows)
            return
        self.metrics.step.add(time.monotonic() - start)
        self._count()
        self._write(rows, logits)

    def _write(self, rows: Sequence[Row], logits: torch.Tensor) -> None:
        """Choose each row's next token, hand out its text, and let go of rows that have ended."""
        how = [row.job.sampling for row in rows]
        tokens = draw(
            logits, [s.temperature for s in how], [s.top_p for s in how], [row.random.random() for row in rows]
        )
        self.metrics.tokens["answer"] += len(rows)
        failed = []
        for row, token, line, lost in zip(rows, tokens, logits, logits.isnan().any(-1).tolist(), strict=True):
            try:
                if lost:
                    raise ArithmeticError("the logits are no numbers")
                if (piece := row.take(token, line, self._ends)) is not None:
                    row.job.emit(piece)
            except Exception:  # noqa: BLE001 - a token that cannot be shown must not end the others
                _log.exception("token %d of an answer failed", row.written)
                failed.append(row)
        self._fail(failed)
        given_up = {row.job for row in failed}
        self._leave([row for row in rows if row.finish is not None and row.job not in given_up])

    def _leave(self, rows: Sequence[Row]) -> None:
        """Free the slots of answers that have ended."""
        if not rows:
            return
        self.engine.leave(set(rows))
        for row in rows:
            job = row.job
            job.open -= 1
            job.held -= job.need.row
            self.pool.give(job.need.row)
            if not job.open:
                self._seconds += 0.2 * (time.monotonic() - job.start - self._seconds)
                self.metrics.requests["done"] += 1
                full = sum(self.engine.shape.content) * (len(job.ids) * job.need.copies + job.written)
                job.emit(Done(len(job.ids), job.written, job.need.row * job.need.copies, full))

    def _fail(self, rows: Sequence[Row]) -> None:
        for job in dict.fromkeys(row.job for row in rows):
            self._end(job, "error", ApiError(500, "the model failed while it wrote this answer"))

    def _end(self, job: Job, outcome: str, error: ApiError | None = None) -> None:
        """Take a job out, wherever it is, and tell its client why."""
        with self._change:
            if job in self._queue:
                self._queue.remove(job)
        if job is self._reading:
            self._reading = None
            self.engine.drop_prompt()
        self.engine.leave({row for row in self.engine.owners if row.job is job})
        self.pool.give(job.held)
        job.held = 0
        self.metrics.requests[outcome] += 1
        if error is not None:
            job.emit(error)

    def _count(self) -> None:
        self._peak = max(self._peak, self.engine.nbytes)

    def _gauge(self) -> None:
        self.metrics.gauges.update(
            queue=len(self._queue), rows=len(self.engine.owners), kv_bytes=self.engine.nbytes, kv_bytes_peak=self._peak,
            kv_bytes_reserved=self.pool.held, kv_bytes_limit=self.pool.limit,
        )  # fmt: skip
