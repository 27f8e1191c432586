"""Look at a click log: how skewed each column is, how few rows do the work, what fused rows would save."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitalfew.core import Curve, Profile
from vitalfew.data import Schema
from vitalfew.embeddings.account import curves
from vitalfew.embeddings.options import LogOptions, Progress, open_with, silent
from vitalfew.embeddings.payoff import Payoff, predict_payoff
from vitalfew.embeddings.preparing import fit_encoder
from vitalfew.embeddings.settings import Settings

__all__ = ["ColumnLook", "Look", "look_at_log"]


@dataclass(frozen=True, slots=True)
class ColumnLook:
    """One feature: its distinct values and how the lookups spread over them, counted.

    Attributes
    ----------
    num_rows
        Distinct values (rows of its table).
    lookups
        How often the feature was looked up in the log.
    top
        Share of the lookups that the busiest 1 % of the values do.
    rows_for_90
        The fewest values that do 90 % of the lookups.
    skew
        Gini coefficient, 0 to 1.
    missing
        Share of the lookups that go to the row of missing (and too rare) values.
    """

    name: str
    num_rows: int
    lookups: int
    top: float
    rows_for_90: int
    skew: float
    missing: float


@dataclass(frozen=True, slots=True)
class Look:
    """What there is to see, and what training with fused rows is foretold to save."""

    num_rows: int
    click_rate: float
    schema: Schema
    columns: tuple[ColumnLook, ...]
    table_rows: int
    table_bytes: int
    rows_for_90: int
    payoff: Payoff
    settings: Settings
    curves: tuple[Curve, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "rows": self.num_rows,
            "click_rate": self.click_rate,
            "schema": self.schema.to_dict(),
            "columns": [dataclasses.asdict(column) for column in self.columns],
            "table_rows": self.table_rows,
            "table_bytes": self.table_bytes,
            "rows_for_90": self.rows_for_90,
            "predicted": {**dataclasses.asdict(self.payoff), "factor": self.payoff.ratio, "how": "modelled"},
            "settings": self.settings.to_dict(),
        }


def _profile(name: str, counts: np.ndarray[Any, np.dtype[Any]]) -> Profile:
    values = counts.astype(np.float64)
    return Profile(name, np.arange(len(values)), values, float(values.sum()), values[None, :])


def look_at_log(
    path: str | Sequence[str], options: LogOptions, settings: Settings | None = None, *, progress: Progress = silent
) -> Look:
    """Read a log once, count every id, and time a few training steps on ids drawn from the counts.

    Parameters
    ----------
    path
        The log; nothing is written.
    options
        Its label and the kinds of its columns; every row is counted, test slice or not.
    settings
        The model whose training is foretold.

    Notes
    -----
    Cost: one pass over the log, memory for its distinct values, and some seconds of training steps.
    """
    settings = settings or Settings()
    reader, schema = open_with(path if isinstance(path, str) else list(path), options)
    encoder = fit_encoder(reader, schema, options, settings.seed, progress)
    rows = sum(encoder.label_counts)
    columns = []
    every: list[np.ndarray[Any, np.dtype[Any]]] = []
    for name, counts in encoder.counts.items():
        every.append(counts)
        profile = _profile(name, counts)
        top = max(1, round(0.01 * len(counts)))
        columns.append(
            ColumnLook(
                name,
                len(counts),
                int(profile.total),
                profile.coverage(top),
                profile.items_for(0.9),
                profile.skew(),
                float(counts[0]) / max(profile.total, 1.0),
            )
        )
    whole = _profile("all tables", np.concatenate([np.zeros(0), *every]))
    progress("time steps", 0.0)
    payoff = predict_payoff(encoder.num_rows, encoder.counts, len(schema.numeric), settings, max_rows=rows)
    progress("time steps", 1.0)
    table_rows = sum(encoder.num_rows.values())
    width = 4 * settings.dim + settings.rule().state_bytes(settings.dim)
    return Look(
        rows,
        encoder.label_counts[1] / rows,
        schema,
        tuple(columns),
        table_rows,
        table_rows * width,
        whole.items_for(0.9),
        payoff,
        settings,
        curves(encoder),
    )
