"""Train both ways on the user's own rows, in pairs that take turns, and say what came of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field

from vitalfew.core import Comparison, Line, Outcome, Quality, Rule, compare, judge
from vitalfew.core.compare import Arm
from vitalfew.core.receipt import Pair
from vitalfew.data.batches import Batches
from vitalfew.data.log import EncodedLog
from vitalfew.embeddings.fitting import evaluate, train_step
from vitalfew.embeddings.metrics import BinaryMetrics
from vitalfew.embeddings.settings import Settings, build_arm
from vitalfew.embeddings.tables import EmbeddingBags

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
            Line(
                "sparse gradient built",
                "B",
                float(self.gradient_bytes),
                0.0,
                "counted",
                note="per step",
            ),
            Line("table rows written", "rows", None, written, "counted", note=f"of {self.table_rows:,} in the tables"),
        )

    def qualities(self) -> tuple[Quality, ...]:
        """Return AUC, log loss and calibration with their paired differences."""
        rule = self.comparison.rule
        others = []
        for metric, better in (("log loss", -1.0), ("calibration", 1.0)):
            name = metric.replace(" ", "_")
            pairs = [
                Pair(
                    i,
                    "base",
                    1.0,
                    1.0,
                    better * getattr(b.metrics, name),
                    better * getattr(f.metrics, name),
                )
                for i, (b, f) in enumerate(zip(self.runs["base"], self.runs["few"], strict=True))
            ]
            tolerance = rule.tolerance if metric == "log loss" else 10 * rule.tolerance
            found = judge(dataclasses.replace(rule, tolerance=tolerance), pairs, metric=metric).quality
            if better < 0:
                found = dataclasses.replace(
                    found,
                    before=-found.before,
                    after=-found.after,
                    difference=-found.difference,
                    low=None if found.high is None else -found.high,
                    high=None if found.low is None else -found.low,
                )
            others.append(found)
        return (self.comparison.quality, *others)


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
) -> Trial:
    """Train a DLRM the plain PyTorch way and with fused rows, on equal work, and judge by the rule.

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
    """
    runs: dict[str, list[_Run]] = {"base": [], "few": []}
    info: dict[str, int] = {}
    num_dense = train.num_dense

    def arm(name: str, *, plain: bool) -> Arm:
        def run(seed: int) -> Generator[None, None, Outcome]:
            mine = dataclasses.replace(settings, seed=settings.seed + seed)
            model, optimizers = build_arm(num_rows, num_dense, mine, plain=plain)
            batches = Batches(train, mine.batch_size, seed=mine.seed)
            steps = min(len(batches), max_steps or len(batches))
            info["steps"] = steps
            seconds, rows, done = 0.0, 0, 0
            stream = batches.epoch(0)
            while done < steps:
                start = time.perf_counter()
                before = done
                for _ in range(min(_SLICE, steps - done)):
                    batch = next(stream)
                    train_step(model, optimizers, batch)
                    rows += len(batch)
                    done += 1
                seconds += time.perf_counter() - start
                if progress:
                    progress(done - before)
                yield
            metrics = evaluate(model, test)
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
    return Trial(comparison, runs, total, int(ids.size) * (settings.dim * 4 + 8), info["steps"])


def _warm_up(num_rows: Mapping[str, int], train: EncodedLog, settings: Settings) -> None:
    """Take two steps each way on small tables: kernels compile and torch loads what it needs before the clock runs."""
    block = train.block(0, min(256, len(train)))
    rows = {name: min(size, 1000) for name, size in num_rows.items()}
    small = dataclasses.replace(block, ids=block.ids % min(rows.values()))
    for plain in (True, False):
        model, optimizers = build_arm(rows, train.num_dense, settings, plain=plain)
        for _ in range(2):
            train_step(model, optimizers, small)
