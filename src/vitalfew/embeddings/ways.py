"""Train in one of the ways, on rows in memory or over tiers, and tell what came of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vitalfew.core import Receipt
from vitalfew.data.encoded import Encoded
from vitalfew.embeddings.course import Course, MemorySource
from vitalfew.embeddings.fitting import predict
from vitalfew.embeddings.metrics import BinaryMetrics, binary_metrics
from vitalfew.embeddings.models import ClickModel
from vitalfew.embeddings.settings import Settings, build_arm
from vitalfew.embeddings.tiered import TieredEmbeddings
from vitalfew.embeddings.tiering import Tiering
from vitalfew.embeddings.way import Way

__all__ = ["WayRun", "measure", "run_way"]

_EVALUATED = 8192


@dataclass(slots=True)
class WayRun:
    """What one run gave.

    Attributes
    ----------
    seconds
        Of training alone.
    samples
        Of the log, used or skipped.
    steps
        Updates of the dense layers.
    row_bytes, device_bytes
        Read and written across the border of the fast tier: rows, and what the device moved for them.
    receipts
        Of the methods that acted.
    """

    seconds: float
    samples: int
    steps: int
    metrics: BinaryMetrics
    row_bytes: float = 0.0
    device_bytes: float = 0.0
    receipts: dict[str, Receipt] = field(default_factory=dict)


def run_way(
    way: Way,
    train: Encoded,
    test: Encoded,
    num_rows: Mapping[str, int],
    settings: Settings,
    *,
    seed: int = 0,
    tiers: Tiering | None = None,
    store: Path | None = None,
    reads_ahead: bool = True,
    turn: int = 8,
) -> Generator[None, None, WayRun]:
    """Train one epoch in a way, yielding after every few steps, and return what came of it.

    Parameters
    ----------
    train, test
        Samples in memory; each epoch shuffles those to train by the seed.
    tiers, store
        Rows over memory and a folder, which must be free; without them all rows are in memory. Steps then run without
        a pause: rows read ahead while another run is timed would cost nothing.
    reads_ahead
        False brings rows in on demand.
    turn
        Steps between two yields.
    """
    mine = dataclasses.replace(settings, seed=settings.seed + seed)
    with ExitStack() as stack:
        tiered = tiers if way.fused else None
        model, optimizers = build_arm(
            num_rows, train.dense.shape[1], mine, plain=not way.fused, tiers=tiered, store=store,
            update=way.update,
        )  # fmt: skip
        if isinstance(model.tables, TieredEmbeddings):
            stack.enter_context(model.tables)
            turn = 1 << 62
        source = MemorySource(train, mine.batch_size, mine.seed)
        course = Course(way, model, optimizers, source, reads_ahead=reads_ahead)
        seconds, start = 0.0, time.perf_counter()
        for step, _ in enumerate(course, 1):
            if step % turn == 0:
                seconds += time.perf_counter() - start
                yield
                start = time.perf_counter()
        seconds += time.perf_counter() - start
        metrics = measure(model, test, mine.batch_size if tiered else _EVALUATED)
        run = WayRun(seconds, course.samples, course.steps, metrics, receipts=course.receipts)
        if isinstance(model.tables, TieredEmbeddings):
            moves, traffic = model.tables.moves, model.tables.store.lower.traffic
            record = model.tables.store.record.nbytes
            run.row_bytes = float((moves.missed - moves.fresh + moves.left - moves.clean) * record)
            run.device_bytes = float(traffic.bytes_read + traffic.bytes_written)
    return run


def measure(model: ClickModel, rows: Encoded, batch_rows: int) -> BinaryMetrics:
    """Measure a model on samples in memory."""
    assert rows.label is not None
    cuts = range(0, len(rows), batch_rows)
    parts: Iterator[Encoded] = (rows.take(np.arange(at, min(at + batch_rows, len(rows)))) for at in cuts)
    return binary_metrics(rows.label, predict(model, parts))
