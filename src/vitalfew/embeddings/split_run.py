"""One loop over batches in parts: when a part is given, and what that takes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from vitalfew.core import InputError
from vitalfew.embeddings.ahead import Prefetch, _Run
from vitalfew.embeddings.splitting import SplitChoice, SplitPlan, split_batch

__all__ = ["Part", "SplitReader", "SplitRun"]

B = TypeVar("B")
_NONE = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Part(Generic[B]):
    """Some samples of a batch.

    Attributes
    ----------
    batch
        These samples.
    samples
        Their numbers in the whole batch, rising.
    share
        Of the whole batch's samples: the weight of a mean loss.
    kind
        ``"popular"``: all rows were in memory. ``"rest"``: the others. ``"whole"``: the batch was not split.
    """

    batch: B
    samples: NDArray[np.int64]
    share: float
    kind: Literal["popular", "rest", "whole"]


class SplitReader(Prefetch[B]):
    """A `Prefetch` that gives a batch as soon as its popular part may be computed."""

    choice: SplitChoice
    run: SplitRun[B]

    def _begin(self) -> _Run[B]:
        self.run = SplitRun(self)
        return self.run


class SplitRun(_Run[B]):
    """One loop, whose batches may be given before all of their rows have come."""

    def __init__(self, owner: SplitReader[B]) -> None:
        self._choice = owner.choice
        self._plans: deque[SplitPlan] = deque()  # of the batches that are held and not done
        self._arrived = 0
        self._owed = False  # whether parts of the batch are still to be given
        self._held_at, self._done_at = 0.0, time.perf_counter()
        super().__init__(owner)

    # -- the loop's side

    def next(self) -> tuple[B] | None:
        found = super().next()
        self._owed = found is not None
        return found

    def parts(self, batch: B, cut: Callable[[B, NDArray[np.int64], int], B]) -> Iterator[Part[B]]:
        """Give the parts of a batch, each when its rows are there."""
        rows, turn, plan = self._rows, self._given, self._plans[0]
        if not plan.comes_in_parts:
            num_samples = self._num_samples(batch)
            rows.begin_part(_NONE)
            self._owed = False
            kind: Literal["popular", "rest", "whole"] = "popular" if len(plan.popular) else "rest"
            yield Part(batch, np.arange(num_samples), 1.0, kind if plan.split else "whole")
            return
        steps = rows.counts.steps
        serial = rows.begin_part(plan.popular)
        try:
            yield self._part(batch, plan.popular, plan, "popular", cut)
            if rows.counts.steps != steps:
                raise InputError(
                    "rows were updated between the parts of a batch, and would be again after the rest",
                    hint="call step() after all parts",
                )
            start = time.perf_counter()
            self._come(lambda: self._arrived >= turn)
            plan.waited = time.perf_counter() - start
            rows.begin_part(plan.rest, serial)
            self._owed = False
            yield self._part(batch, plan.rest, plan, "rest", cut)
        finally:
            if not self._stop:
                rows.begin_part(_NONE)

    def _part(
        self,
        batch: B,
        numbers: NDArray[np.int64],
        plan: SplitPlan,
        kind: Literal["popular", "rest"],
        cut: Callable[[B, NDArray[np.int64], int], B],
    ) -> Part[B]:
        return Part(cut(batch, numbers, plan.samples), numbers, len(numbers) / plan.samples, kind)

    def _num_samples(self, batch: B) -> int:
        found = self._owner._ids(batch)
        ids, offsets = found if isinstance(found, tuple) else (found, None)
        return len(ids) if offsets is None else (len(offsets) - 1) // len(self._owner.tables.features)

    def close(self) -> int:
        if not self._stop:
            self._rows.begin_part(_NONE)
        return super().close()

    def done(self) -> SplitPlan:
        """Take note that the loop is done with the batch that it was given; returns what that took."""
        if self._owed:
            raise InputError(
                "the next batch was asked for before all parts of this one: samples would be left out",
                hint="go through all parts, or break out of the loop over batches as well",
            )
        with self._change:
            plan = self._plans.popleft()
            now = time.perf_counter()
            plan.step, self._done_at = now - self._done_at, now
            self._choice.saw(plan)
        return plan

    # -- the thread's side

    def _held(self) -> None:
        n = self._schedule.loaded
        self._held_at = time.perf_counter()
        with self._change:
            split, on_trial = self._choice.next()
            batch = self._queue[n - self._given]
        plan = SplitPlan(split, on_trial, _NONE, _NONE)
        if split or on_trial:
            rows, edges = self._lookups_of(batch)
            width = len(self._owner.tables.features)
            # One flag per lookup, not per row of the tables, which may be many times more.
            here = (self._store.residency.where[rows] >= 0).view(np.uint8)
            bags = edges[::width] if len(edges) else None
            plan.popular, plan.rest = split_batch(np.arange(len(rows)), bags, width, here)
        with self._change:
            self._plans.append(plan)
            if plan.comes_in_parts:
                self._ready = n + 1
                self._change.notify_all()

    def _announce(self) -> None:
        with self._change:
            if self._schedule.loaded > self._arrived:
                self._arrived = self._schedule.loaded
                self._plans[-1].gather = time.perf_counter() - self._held_at
        super()._announce()
