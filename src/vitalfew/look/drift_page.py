"""What was seen of drift, as tables, sentences and charts: the same on the terminal and on a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from vitalfew.look.drift import LARGE, SHIFT, ColumnDrift, DriftLook
from vitalfew.report.charts import slices_chart
from vitalfew.report.html import figure, section
from vitalfew.report.tables import Cell, Table

if TYPE_CHECKING:
    from vitalfew.embeddings.slices import SliceQuality

__all__ = ["Models", "column_table", "drift_answer", "drift_facts", "drift_parts", "model_table", "slice_table"]

Models = Mapping[str, "Sequence[SliceQuality]"]
"""The quality of each model in each slice after the base."""


def _by_drift(look: DriftLook) -> list[ColumnDrift]:
    return sorted(look.columns, key=lambda column: -max(column.psi))


def _headline(look: DriftLook) -> str:
    moved = sum(column.finding != "steady" for column in look.columns)
    return f"{moved or 'none'} of {len(look.columns)} columns drift{'s' * (moved < 2)}"


def _detail(look: DriftLook) -> str:
    moved = [f"{each.name} (PSI {max(each.psi):.2f})" for each in _by_drift(look) if each.finding != "steady"]
    told = look.slices[-1].auc
    parts = [", ".join(moved[:3]) + ", ..." * (len(moved) > 3)] if moved else []
    if told is not None:
        parts.append(f"the last slice is told from the base with an AUC of {told.mean:.2f}")
    return "; ".join(parts)


def drift_answer(look: DriftLook) -> str:
    """Return how far the log is from where it began, in a sentence."""
    return ": ".join(filter(None, (_headline(look), _detail(look))))


def drift_facts(look: DriftLook) -> list[str]:
    """Return what the figures rest on, a line each."""
    base = look.base
    facts = [
        f"base: {base.rows:,} rows from {base.start} to {base.stop}, by `{look.time}`",
        "PSI: population stability index against the base, counted in bins of the base; rare and new ids share a bin; "
        f"{SHIFT:g} is called a shift and {LARGE:g} a far one (a rule of thumb), and chance alone adds up to "
        f"{max(max(column.chance) for column in look.columns):.2g}",
        "new: values that the base does not have, in the last slice; usual: their share if nothing changed, by Good "
        "and Turing",
        "AUC: how well a small classifier, on rows it has not seen, tells a slice from the base; 0.5 is not at all",
    ]
    return facts if look.exact else [*facts, "the slices were cut by a sample of the times"]


def column_table(look: DriftLook) -> Table:
    """Return the columns, the most drifting first, with the index of each slice."""
    slices = tuple(f"PSI {k}" for k in range(2, len(look.slices) + 2))
    names = ("Column", "Finding", *slices, "New", "Usual", "Missing", "AUC")
    rows = tuple(
        (
            Cell(column.name),
            Cell(column.finding),
            *(Cell(f"{psi:.2f}", psi) for psi in column.psi),
            Cell(f"{column.new[-1]:.0%}", column.new[-1]),
            Cell(f"{column.usual_new:.0%}", column.usual_new),
            Cell(f"{column.missing[-1]:.0%}", column.missing[-1]),
            _number(column.auc[-1]),
        )
        for column in _by_drift(look)
    )
    return Table("drift", "Columns against the base", names, rows, frozenset(names[2:]))


def slice_table(look: DriftLook) -> Table:
    """Return the slices in order of time, the base first."""
    names = ("Slice", "From", "To", "Rows", "Positive", "AUC", "95 % interval")
    rows = tuple(
        (
            Cell(str(k)),
            Cell(each.start),
            Cell(each.stop),
            Cell(f"{each.rows:,}", each.rows),
            Cell(f"{each.click_rate:.1%}", each.click_rate),
            _number(None if each.auc is None else each.auc.mean),
            Cell("-" if each.auc is None else f"{each.auc.low:.2f} to {each.auc.high:.2f}"),
        )
        for k, each in enumerate((look.base, *look.slices), 1)
    )
    return Table("slices", "Slices of time", names, rows, frozenset(names[3:]))


def model_table(models: Models) -> Table:
    """Return the AUC of each model in each slice after the base."""
    most = max(len(found) for found in models.values())
    names = ("Model", *(f"AUC {k}" for k in range(2, most + 2)))
    rows = tuple((Cell(name), *(_number(each.auc, 3) for each in found)) for name, found in models.items())
    return Table("models", "Models trained on the base", names, rows, frozenset(names[1:]))


def _number(value: float | None, digits: int = 2) -> Cell:
    return Cell("-" if value is None else f"{value:.{digits}f}", value)


def drift_parts(look: DriftLook, models: Models | None = None) -> list[str]:
    """Return the parts of a page."""
    days = [each.start.split()[0] for each in look.slices]
    starts = days if len(set(days)) == len(days) else [each.start for each in look.slices]
    psi = {column.name: [(each, None, None) for each in column.psi] for column in _by_drift(look)}
    told = [None if each.auc is None else (each.auc.mean, each.auc.low, each.auc.high) for each in look.slices]
    charts = [
        figure(
            "How far each column is from the base",
            slices_chart(
                "Population stability index over time", psi, starts, what="population stability index",
                marks={SHIFT: "a shift", LARGE: "far"}, floor=0.0,
            ),
            "The four most drifting columns by name, the others in grey.",
        ),
        figure(
            "Whether rows can be told from those of the base",
            slices_chart(
                "AUC of a domain classifier over time", {"all columns": told}, starts,
                what="AUC of a classifier", marks={0.5: "not at all"}, floor=0.45,
            ),
            "With 95 % intervals.",
        ),
    ]  # fmt: skip
    tables = [column_table(look), slice_table(look)]
    if models:
        lines = {
            name: [None if each.auc is None else (each.auc, each.low, each.high) for each in found]
            for name, found in models.items()
        }
        charts.append(
            figure(
                "Models trained on the base, later",
                slices_chart("AUC of each model over time", lines, starts, what="AUC"),
                "With 95 % intervals that take rows as independent; one training run each.",
            )
        )
        tables.append(model_table(models))
    notes = "".join(f"<li>{escape(text)}</li>" for text in drift_facts(look))
    return [
        '<section class="verdict none" aria-label="Drift"><p class="headline">'
        f"{escape(_headline(look).capitalize())}</p><p>{escape(_detail(look))}</p></section>",
        f'<div class="charts">{"".join(charts)}</div>',
        *map(section, tables),
        f"<section><h2>What the figures of drift rest on</h2><ul>{notes}</ul></section>",
    ]
