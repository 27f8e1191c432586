"""What a run over memory and disk will move and take, foretold before it, and compared with what came."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from vitalfew.core import Prediction
from vitalfew.data.encoded import Encoded
from vitalfew.embeddings.payoff import step_seconds
from vitalfew.embeddings.room import Room
from vitalfew.embeddings.settings import Settings
from vitalfew.embeddings.tiering import Tiering, ids_of, record_bytes, schedule_for
from vitalfew.meter import machine
from vitalfew.tiers.replay import Replayed, replay
from vitalfew.tiers.speed import Speed, expected_pages, measure_speed, pages_of, predict_step

__all__ = ["Foretold", "foretell", "speed_of"]

_TIMED = 12
_LEAST_FILE = 1 << 20


@dataclass(frozen=True, slots=True)
class Foretold:
    """What was foretold: counts of rows by a rehearsal on the same batches, times by a formula.

    Attributes
    ----------
    moved
        Rows over all steps.
    compute
        Seconds of a step with all rows in memory, measured on a few.
    speed
        Of the disk and the memory.
    rows_below
        Rows that the disk holds, on average over the run.
    planning
        Seconds per step of reading the batches and deciding what moves, measured in the rehearsal.
    """

    moved: Replayed
    compute: float
    speed: Speed
    record_bytes: int
    rows_below: float
    overlap: bool
    planning: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of a step, modelled."""
        return step_time(
            self.moved, self.compute, self.speed, self.record_bytes, self.rows_below, overlap=self.overlap,
            planning=self.planning,
        )  # fmt: skip

    def against(self, moved: Replayed, seconds: float) -> tuple[Prediction, ...]:
        """Return what was foretold beside what a run has moved, and the seconds of its steps."""
        steps, foretold = max(moved.steps, 1), max(self.moved.steps, 1)
        disk = f"{self.speed.page_reads:,.0f} pages/s read, {self.speed.write_bytes / 1e6:,.0f} MB/s written"
        counted = "the same batches, rows counted without moving them"
        return (
            Prediction("miss ratio", "", self.moved.miss_ratio, moved.miss_ratio, counted),
            Prediction(
                "row bytes moved per step",
                "B",
                _row_bytes(self.moved, self.record_bytes) / foretold,
                _row_bytes(moved, self.record_bytes) / steps,
                f"{counted}; written is every row that leaves",
            ),
            Prediction(
                "time per step",
                "s",
                self.seconds,
                seconds,
                f"modelled: {self.compute * 1e3:.3g} ms of computing with all rows in memory, a disk of {disk}",
            ),
        )


def _row_bytes(moved: Replayed, record: int) -> float:
    return float((moved.missed - moved.fresh + moved.left) * record)


def step_time(
    moved: Replayed,
    compute: float,
    speed: Speed,
    record: int,
    rows_below: float,
    *,
    overlap: bool,
    planning: float = 0.0,
) -> float:
    """Return the seconds of a step, modelled, from what all steps move."""
    steps = max(moved.steps, 1)
    read, left = (moved.missed - moved.fresh) / steps, moved.left / steps
    pages = expected_pages(read, rows_below, speed.records_per_page)
    written = left / speed.records_per_page * speed.page_bytes
    crowded = torch.get_num_threads() >= machine(())["usable_cores"]
    return predict_step(
        compute, pages, written, speed, overlap, rows_moved=read + left, planning=planning, crowded=crowded
    )


def foretell(
    batches: Iterable[Encoded],
    num_rows: Mapping[str, int],
    settings: Settings,
    tiers: Tiering,
    room: Room,
    store: Path,
    *,
    below: NDArray[Any] | None = None,
) -> Foretold:
    """Rehearse a run on its own batches, time a few steps in memory, and measure the disk.

    Parameters
    ----------
    batches
        Those of the run, read once.
    room
        What the tables of the run have.
    below
        Which rows the store holds already.
    """
    total = sum(num_rows.values())
    first: list[Encoded] = []

    def kept() -> Iterator[Encoded]:
        for batch in batches:
            if len(first) < _TIMED:
                first.append(batch)
            yield batch

    schedule = schedule_for(room, total, tiers.rule(), tiers.ahead)
    start = time.perf_counter()
    moved = replay(ids_of(kept(), num_rows), schedule, queue_bytes=room.queue_bytes, below=below)
    planning = (time.perf_counter() - start) / max(moved.steps, 1)
    record = record_bytes(settings)
    # A row is below from its first departure on: half of them on average, where they come one by one.
    at_end, at_start = int((schedule.residency.where < -1).sum()), 0 if below is None else int(below.sum())
    speed = speed_of(store, total, record)
    compute = step_seconds(num_rows, first, settings) if first else 0.0
    return Foretold(moved, compute, speed, record, (at_start + at_end) / 2, tiers.ahead > 0, planning)


def speed_of(store: Path, num_rows: int, record: int) -> Speed:
    """Measure the disk of a store with a file no larger than that of its rows: a small one is measured quickly."""
    size = min(max(pages_of(2 * num_rows, record) << 12, _LEAST_FILE), 256 << 20)
    return measure_speed(store, record, max_bytes=size, seconds=max(0.1, 2.0 * size / (256 << 20)))
