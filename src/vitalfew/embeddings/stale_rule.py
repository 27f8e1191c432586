"""The settings of stale rows, and what they mean for given tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from vitalfew.core import Budget, InputError
from vitalfew.embeddings.rows import Rows
from vitalfew.embeddings.staleness import _check
from vitalfew.embeddings.tables import EmbeddingBags
from vitalfew.embeddings.tiered import TieredEmbeddings

__all__ = ["StaleRule", "lead_of", "num_watched", "rows_of"]


@dataclass(frozen=True, slots=True)
class StaleRule:
    """When a row is stale, and what that means; see `SkipStale`."""

    mode: Literal["rows", "inputs"]
    max_change: float | Literal["auto"]
    every: int
    warm_up: float
    min_visits: int
    windows: int
    revisit: int
    share: float
    target: float
    tolerance: float
    seed: int

    def __post_init__(self) -> None:
        if self.mode not in ("rows", "inputs"):
            raise InputError(f"mode must be 'rows' or 'inputs', got {self.mode!r}", hint="'rows' changes no input")
        if isinstance(self.max_change, str) and not self.auto:
            raise InputError(f"max_change must be a number or 'auto', got {self.max_change!r}", hint="0.1 is usual")
        _check(self.first_threshold, self.min_visits, self.warm_up, self.windows)
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed must lie in [0, 2**64), got {self.seed}", hint="0 is the default")
        for name in ("every", "revisit"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}", hint="200 and 8 are usual")
        if not (0 < self.share <= 1 and 0 < self.target < 1 and self.tolerance >= 0):
            raise InputError(
                f"share, target and tolerance must lie in (0, 1], (0, 1) and from 0 on, got {self.share}, "
                f"{self.target} and {self.tolerance}",
                hint="0.8, 0.5 and 0.001 are the defaults",
            )

    @property
    def auto(self) -> bool:
        """Whether the threshold is found under a validation."""
        return self.max_change == "auto"

    @property
    def first_threshold(self) -> float:
        """The threshold to begin with."""
        return 0.0 if self.auto else float(self.max_change)

    def limits(self, threshold: float) -> dict[str, Any]:
        """Return what `quiet_windows` asks for."""
        return {"max_change": threshold, "min_visits": self.min_visits, "warm_up": self.warm_up}


def rows_of(tables: EmbeddingBags) -> Rows:
    """Return the rows of tables that can leave some of them out."""
    if type(tables) not in (EmbeddingBags, TieredEmbeddings):
        raise InputError(
            f"a {type(tables).__name__} cannot skip its stale rows", hint="use EmbeddingBags or TieredEmbeddings"
        )
    if tables.rows.on_update is not None or len(tables.rows.frozen):
        raise InputError("something else decides already which rows of these tables are trained", hint="undo() it")
    return tables.rows


def num_watched(watch: Budget | float | int | str, tables: EmbeddingBags) -> int:
    """Return how many rows to watch at most."""
    budget, num_rows = Budget.of(watch), tables.num_rows
    row_bytes = tables.dim * tables.rows.weight.element_size()
    count = {"share": budget.value * num_rows, "bytes": budget.value / row_bytes}.get(budget.kind, budget.value)
    if count < 1:
        raise InputError(f"{watch!r} of {num_rows:,} rows is not one row to watch", hint="0.1 is the default")
    return min(int(count), num_rows)


def lead_of(tables: EmbeddingBags) -> int:
    """Return how many batches ahead of training a loader of these tables may be read."""
    if not isinstance(tables, TieredEmbeddings):
        return 0
    schedule = tables.store.schedule
    return schedule.depth + schedule.ahead + 2
