"""What fused rows would save on a log, foretold from a few timed steps on ids drawn from its own counts."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitalfew.data.encoded import Encoded
from vitalfew.embeddings.fitting import train_step
from vitalfew.embeddings.settings import Settings, build_arm

__all__ = ["Payoff", "predict_payoff", "step_seconds"]

_ROWS = 200_000
"""Tables are cut to this many of their busiest rows for the timing; the rest share the last ones."""


@dataclass(frozen=True, slots=True)
class Payoff:
    """Foretold seconds per step, the plain way and ours, and the distinct rows per batch.

    Attributes
    ----------
    plain, ours
        Median seconds per step.
    lookups, distinct
        Ids in one batch, and how many differ: the rows a step must touch.
    """

    plain: float
    ours: float
    lookups: int
    distinct: int

    @property
    def ratio(self) -> float:
        """How many times faster a step would be."""
        return self.plain / self.ours


def _draw(
    num_rows: Mapping[str, int], counts: Mapping[str, NDArray[np.uint64]], size: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    columns = []
    for name, rows in num_rows.items():
        if name in counts and counts[name].any():
            heights = np.cumsum(counts[name].astype(np.float64))
            columns.append(np.searchsorted(heights, rng.random(size) * heights[-1], side="right"))
        else:
            columns.append(rng.integers(0, rows, size))
    return np.stack(columns, axis=1).astype(np.int64)


def predict_payoff(
    num_rows: Mapping[str, int],
    counts: Mapping[str, NDArray[np.uint64]],
    num_dense: int,
    settings: Settings,
    *,
    max_rows: int | None = None,
    steps: int = 10,
) -> Payoff:
    """Time a few steps of both ways, in turns, on ids drawn from the counts; feature by feature, so without their ties.

    Parameters
    ----------
    num_rows, counts
        Rows per feature and how often each came up, as an `Encoder` has them. A list counts as one id.
    max_rows
        Rows of the log: no batch is larger.
    """
    size = min(settings.batch_size, max_rows or settings.batch_size)
    rng = np.random.default_rng(settings.seed)
    batches = []
    for _ in range(steps + 2):
        ids = _draw(num_rows, counts, size * settings.items, rng).reshape(size, -1)
        dense = rng.standard_normal((size, settings.items * num_dense)).astype(np.float32)
        batches.append(Encoded(dense, ids, label=rng.integers(0, 2, len(ids)).astype(np.float32)))
    by_row = [batch.ids.reshape(-1, len(num_rows)) for batch in batches]
    distinct = round(statistics.mean(sum(len(np.unique(column)) for column in ids.T) for ids in by_row))
    plain, ours = _time(num_rows, batches, settings, plain=(True, False))
    return Payoff(plain, ours, batches[0].ids.size, distinct)


def step_seconds(num_rows: Mapping[str, int], batches: Sequence[Encoded], settings: Settings) -> float:
    """Return the median seconds of a step our way on some batches, with tables cut to what memory surely takes.

    Parameters
    ----------
    batches
        Three or more; the first two warm up.
    """
    return _time(num_rows, batches, settings, plain=(False,))[0]


def _time(
    num_rows: Mapping[str, int], batches: Sequence[Encoded], settings: Settings, *, plain: Sequence[bool]
) -> list[float]:
    """Time steps of the ways to train, in turns; return the median of each."""
    cut = {name: min(rows, _ROWS) for name, rows in num_rows.items()}
    limit = np.tile(list(cut.values()), settings.items)
    num_dense = batches[0].dense.shape[1] // settings.items
    arms = [build_arm(cut, num_dense, settings, plain=each) for each in plain]
    times: list[list[float]] = [[] for _ in arms]
    for turn, batch in enumerate(batches):
        if batch.offsets is None:
            most = limit
        else:
            features = np.arange(len(batch.offsets) - 1) % len(limit)
            most = np.repeat(limit[features], np.diff(batch.offsets))
        small = dataclasses.replace(batch, ids=np.where(batch.ids < most, batch.ids, batch.ids % most))
        for (model, optimizers), seconds in zip(arms, times, strict=True):
            start = time.perf_counter()
            train_step(model, optimizers, small)
            if turn >= min(2, len(batches) - 1):  # the first steps compile and warm up
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]
