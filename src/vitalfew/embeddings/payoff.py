"""What fused rows would save on a log, foretold from a few timed steps on ids drawn from its own counts."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitalfew.data.encoded import Encoded
from vitalfew.embeddings.fitting import train_step
from vitalfew.embeddings.settings import Settings, build_arm

__all__ = ["Payoff", "predict_payoff"]

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
        ids = _draw(num_rows, counts, size, rng)
        dense = rng.standard_normal((len(ids), num_dense)).astype(np.float32)
        batches.append(Encoded(dense, ids, label=rng.integers(0, 2, len(ids)).astype(np.float32)))
    distinct = round(statistics.mean(sum(len(np.unique(column)) for column in b.ids.T) for b in batches))
    cut = {name: min(rows, _ROWS) for name, rows in num_rows.items()}
    limit = np.array(list(cut.values()))
    batches = [dataclasses.replace(b, ids=np.where(b.ids < limit, b.ids, b.ids % limit)) for b in batches]

    arms = [build_arm(cut, num_dense, settings, plain=plain) for plain in (True, False)]
    times: tuple[list[float], list[float]] = ([], [])
    for turn, batch in enumerate(batches):
        for (model, optimizers), seconds in zip(arms, times, strict=True):
            start = time.perf_counter()
            train_step(model, optimizers, batch)
            if turn >= 2:  # the first steps compile and warm up
                seconds.append(time.perf_counter() - start)
    return Payoff(statistics.median(times[0]), statistics.median(times[1]), batches[0].ids.size, distinct)
