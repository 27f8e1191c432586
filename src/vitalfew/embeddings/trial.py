"""Train both ways on the user's own rows, in pairs that take turns, and say what came of it."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from vitalfew.core import Comparison, Line, Outcome, Quality, Rule, compare, judge
from vitalfew.core.compare import Arm
from vitalfew.core.receipt import Pair
from vitalfew.data.batches import Batches
from vitalfew.data.encoded import Encoded
from vitalfew.data.log import EncodedLog
from vitalfew.embeddings.course import Course, LogSource, MemorySource, Source
from vitalfew.embeddings.fitting import evaluate, train_step
from vitalfew.embeddings.metrics import BinaryMetrics
from vitalfew.embeddings.settings import Settings, build_arm
from vitalfew.embeddings.tables import EmbeddingBags
from vitalfew.embeddings.tiered import TieredEmbeddings
from vitalfew.embeddings.tiering import Tiering
from vitalfew.embeddings.way import Way

__all__ = ["Trial", "paired_trial"]

_SLICE = 8
"""Steps one arm does before it is the other's turn: short against the machine's changes of speed."""


@dataclass(slots=True)
class _Run:
    """What one arm gave in one pair."""

    seconds: float
    rows: int
    metrics: BinaryMetrics
    rows_written: int


@dataclass(slots=True)
class Trial:
    """The comparison and the figures beside it, by arm and pair."""

    comparison: Comparison
    runs: dict[str, list[_Run]] = field(default_factory=dict)
    table_rows: int = 0
    gradient_bytes: int = 0
    steps: int = 0

    def lines(self) -> tuple[Line, ...]:
        """Return the account: time, speed, rows written, gradient never built."""
        base, few = self.runs["base"], self.runs["few"]
        n = len(base)
        seconds = [sum(run.seconds for run in arm) / n for arm in (base, few)]
        ratio = self.comparison.ratio
        low, high = (seconds[0] / r if 0 < r < 1e300 else None for r in (ratio.high, ratio.low))
        rows = base[0].rows
        written = float(sum(run.rows_written for run in few) / n)
        return (
            Line("training time", "s", seconds[0], seconds[1], "measured", low, high, f"{rows:,} rows, mean of pairs"),
            Line("training speed", "rows/s", rows / seconds[0], rows / seconds[1], "measured"),
            Line("sparse gradient built", "B", float(self.gradient_bytes), 0.0, "counted", note="per step"),
            Line("table rows written", "rows", None, written, "counted", note=f"of {self.table_rows:,} in the tables"),
        )

    def qualities(self) -> tuple[Quality, ...]:
        """Return AUC, log loss and calibration error with their paired differences."""
        tolerance = self.comparison.rule.tolerance
        return (
            self.comparison.quality,
            self._less_is_better("log loss", lambda m: m.log_loss, tolerance),
            self._less_is_better("calibration error", lambda m: abs(m.calibration - 1), 10 * tolerance),
        )

    def _less_is_better(self, metric: str, of: Callable[[BinaryMetrics], float], tolerance: float) -> Quality:
        """Judge the negative, in which more is better, and turn the figures back."""
        pairs = [
            Pair(seed, "base", 1.0, 1.0, -of(base.metrics), -of(few.metrics))
            for seed, (base, few) in enumerate(zip(self.runs["base"], self.runs["few"], strict=True))
        ]
        rule = dataclasses.replace(self.comparison.rule, tolerance=tolerance)
        found = judge(rule, pairs, metric=metric).quality
        return dataclasses.replace(
            found,
            before=-found.before,
            after=-found.after,
            difference=-found.difference,
            low=None if found.high is None else -found.high,
            high=None if found.low is None else -found.low,
        )


def paired_trial(
    train: EncodedLog,
    test: EncodedLog,
    num_rows: Mapping[str, int],
    settings: Settings,
    rule: Rule,
    *,
    pairs: int,
    max_steps: int | None = None,
    progress: Callable[[int], None] | None = None,
    way: Way = Way(),  # noqa: B008  frozen
    tiers: Tiering | None = None,
    store: Path | None = None,
) -> Trial:
    """Train a model the plain PyTorch way and with fused rows, on equal work, and judge by the rule.

    Both arms of a pair have the same first weights, the same batches in the same order, and alternate every few steps.
    Building the models and evaluating them is not timed.

    Parameters
    ----------
    train, test
        The encoded log; quality is measured on all of `test`.
    max_steps
        Stop each run after so many steps; by default it is one epoch.
    progress
        Called with the number of steps just done, over all arms and pairs.
    way
        The methods that act in our arm, on the same samples.
    tiers, store
        Our rows are over memory and disk, in a folder beside that of the run. The arms then take turns from run to run
        only: rows read ahead while the other arm is timed would cost nothing.
    """
    runs: dict[str, list[_Run]] = {"base": [], "few": []}
    num_steps = min(len(Batches(train, settings.batch_size)), max_steps or sys.maxsize)
    turn = _SLICE if tiers is None else num_steps

    def arm(name: str, *, plain: bool) -> Arm:
        def run(seed: int) -> Generator[None, None, Outcome]:
            mine = dataclasses.replace(settings, seed=settings.seed + seed)
            with ExitStack() as stack:
                over = None if plain else tiers
                folder = None if over is None else stack.enter_context(_beside(store))
                model, optimizers = build_arm(
                    num_rows, train.num_dense, mine, plain=plain, tiers=over, store=folder, update=way.update
                )
                if isinstance(model.tables, TieredEmbeddings):
                    stack.enter_context(model.tables)
                source: Source = LogSource(train, mine.batch_size, mine.seed, most=num_steps)
                if way.acts and not plain:  # other orders of the same samples
                    few = Encoded.concat(list(source.epoch(0)))
                    source = MemorySource(few, mine.batch_size, mine.seed)
                course = Course(Way(fused=False) if plain else way, model, optimizers, source)
                steps, seconds = iter(course), 0.0
                while True:
                    start = time.perf_counter()
                    size = sum(1 for _ in islice(steps, turn))
                    seconds += time.perf_counter() - start
                    if not size:
                        break
                    if progress:
                        progress(size)
                    yield
                rows = course.samples
                metrics = evaluate(model, test, batch_rows=sys.maxsize if tiers is None else mine.batch_size)
                written = model.tables.counts.rows_updated if isinstance(model.tables, EmbeddingBags) else 0
            runs[name].append(_Run(seconds, rows, metrics, written))
            return Outcome(seconds, metrics.auc, float(rows))

        return run

    _warm_up(num_rows, train, settings)
    comparison = compare(
        arm("base", plain=True),
        arm("few", plain=False),
        at=rule.at,
        tolerance=rule.tolerance,
        min_saving=rule.min_saving,
        confidence=rule.confidence,
        pairs=pairs,
        metric="AUC",
    )
    total = sum(num_rows.values())
    ids = train.block(0, min(settings.batch_size, len(train))).ids
    return Trial(comparison, runs, total, int(ids.size) * (settings.dim * 4 + 8), num_steps)


@contextmanager
def _beside(store: Path | None) -> Iterator[Path]:
    """Give a folder for rows on the same disk, and remove it."""
    assert store is not None
    folder = store.with_name(f".{store.name}.trial.part")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _warm_up(num_rows: Mapping[str, int], train: EncodedLog, settings: Settings) -> None:
    """Take two steps each way on small tables: kernels compile and torch loads what it needs before the clock runs."""
    block = train.block(0, min(256, len(train)))
    rows = {name: min(size, 1000) for name, size in num_rows.items()}
    small = dataclasses.replace(block, ids=block.ids % min(rows.values()))
    for plain in (True, False):
        model, optimizers = build_arm(rows, train.num_dense, settings, plain=plain)
        for _ in range(2):
            train_step(model, optimizers, small)
