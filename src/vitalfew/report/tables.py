"""The receipt as plain tables: what the terminal, Markdown and HTML all show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vitalfew.core import Curve, Line, Pair, Prediction, Quality, Receipt
from vitalfew.report.figures import amount, change, factor, interval, log_ratio, signed, span

__all__ = ["Cell", "Table", "gini", "pair_log", "tables", "work_of"]


@dataclass(frozen=True, slots=True)
class Cell:
    """What is read, the exact number behind it, and a remark."""

    text: str
    value: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of texts; the columns named in `numeric` are set to the right."""

    key: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numeric: frozenset[str] = frozenset()

    @property
    def notes(self) -> list[str]:
        """The remarks, each behind the name of its row, for forms that have no room in the cell."""
        return [f"{row[0].text}: {cell.note}" for row in self.rows for cell in row if cell.note]


def _table(key: str, title: str, columns: str, rows: Iterable[Sequence[Cell]], words: str = "") -> Table:
    """Build a table from ``"A | B"``; all columns but the first and those in `words` are numeric."""
    names = tuple(columns.split(" | "))
    return Table(key, title, names, tuple(map(tuple, rows)), frozenset(names[1:]) - set(words.split(" | ")))


def _drop_empty(table: Table) -> Table:
    keep = [i for i in range(len(table.columns)) if i == 0 or any(row[i].text != "-" for row in table.rows)]
    rows = tuple(tuple(row[i] for i in keep) for row in table.rows)
    return Table(table.key, table.title, tuple(table.columns[i] for i in keep), rows, table.numeric)


def _line(line: Line) -> list[Cell]:
    after = amount(line.after, line.unit)
    if line.low is not None and line.high is not None:
        after += f" ({span(line.low, line.high, line.unit)})"
    return [
        Cell(line.what, note=line.note),
        Cell(amount(line.before, line.unit), line.before),
        Cell(after, line.after),
        Cell(change(line.before, line.after)),
        Cell(line.how),
    ]


def _quality(q: Quality) -> list[Cell]:
    return [
        Cell(q.metric),
        Cell(signed(q.before, q.tolerance, sign=False), q.before),
        Cell(signed(q.after, q.tolerance, sign=False), q.after),
        Cell(signed(q.difference, q.tolerance), q.difference),
        Cell(interval(q)),
        Cell(f"{q.tolerance:.4g}", q.tolerance),
        Cell(q.finding),
    ]


def pair_log(pair: Pair, rule: str) -> float:
    """Return the logarithm of the pair's ratio as the rule counts it; above 0 is a saving.

    Examples
    --------
    >>> pair_log(Pair(0, "base", 2.0, 2.0, 0.7, 0.7, base_work=5.0, few_work=5.0), "At equal cost: ...")
    0.0
    """
    # The text of the rule is the only record of what both arms held equal.
    if rule.startswith("At equal cost"):
        return log_ratio(pair.base_work, pair.few_work) or 0.0
    return log_ratio(pair.few_cost, pair.base_cost) or 0.0


def _pair(pair: Pair, rule: str, step: float) -> list[Cell]:
    difference = pair.few_quality - pair.base_quality
    return [
        Cell(str(pair.seed)),
        Cell("baseline" if pair.first == "base" else "ours"),
        Cell(f"{pair.base_cost:.4g}", pair.base_cost),
        Cell(f"{pair.few_cost:.4g}", pair.few_cost),
        Cell(factor(pair_log(pair, rule))),
        Cell(signed(pair.base_quality, step, sign=False), pair.base_quality),
        Cell(signed(pair.few_quality, step, sign=False), pair.few_quality),
        Cell(signed(difference, step)),
    ]


def _prediction(p: Prediction) -> list[Cell]:
    return [
        Cell(p.what, note=p.basis),
        Cell(amount(p.predicted, p.unit), p.predicted),
        Cell(amount(p.measured, p.unit), p.measured),
        Cell(change(p.predicted, p.measured)),
    ]


def work_of(curve: Curve, share: float) -> float | None:
    """Return the share of the work that this share of the items does; None where it is less than one item.

    Examples
    --------
    >>> work_of(Curve("site", ((0.1, 0.6), (0.2, 0.8), (1.0, 1.0)), 10), 0.15)
    0.7
    """
    if not curve.points or share * curve.num_items < 1:
        return None
    if share <= curve.points[0][0]:
        return curve.points[0][1]
    for (x0, y0), (x1, y1) in pairwise(curve.points):
        if x0 <= share <= x1:
            return round(y0 + (y1 - y0) * (share - x0) / (x1 - x0), 12) if x1 > x0 else y1
    return curve.points[-1][1]


def gini(curve: Curve) -> float:
    """Return how unequal the items are, from the area under the curve: 0 if all do the same, towards 1 if one does all.

    Examples
    --------
    >>> gini(Curve("equal", ((0.5, 0.5), (1.0, 1.0)), 2))
    0.0
    """
    points = ((0.0, 0.0), *curve.points)
    return sum((x1 - x0) * (y0 + y1) for (x0, y0), (x1, y1) in pairwise(points)) - 1


def _curve(curve: Curve) -> list[Cell]:
    shares = [work_of(curve, share) for share in (0.01, 0.1)]
    return [
        Cell(curve.name),
        Cell(f"{curve.num_items:,}", curve.num_items),
        *(Cell(amount(share, "share"), share) for share in shares),
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            yield f"{prefix}{key}", text


def tables(receipt: Receipt) -> dict[str, Table]:
    """Return the tables that hold something, by key, in reading order.

    Examples
    --------
    >>> receipt = Receipt("t", "m", (Line("time", "s", 10.0, 2.0, "measured"),), "undecided", "one pair only")
    >>> [[cell.text for cell in row] for row in tables(receipt)["figures"].rows]
    [['time', '10 s', '2 s', '5x less', 'measured']]
    """
    line = "What | Before | After | Change | How"
    quality = "Metric | Baseline | Ours | Difference | Interval | Tolerance | Finding"
    pair = "Seed | First | Baseline cost | Our cost | Ratio | Baseline quality | Our quality | Difference"
    step = receipt.quality[0].tolerance if receipt.quality else 0.01
    skewed = sorted(receipt.curves, key=lambda curve: (-gini(curve), curve.name))
    every = [
        _drop_empty(_table("figures", "Before and after", line, map(_line, receipt.lines), "How")),
        _table("quality", "Quality", quality, map(_quality, receipt.quality), "Finding"),
        _table("pairs", "Paired runs", pair, (_pair(p, receipt.rule, step) for p in receipt.pairs), "First"),
        _table(
            "predictions",
            "Predictions",
            "What | Predicted | Measured | Measured is",
            map(_prediction, receipt.predictions),
        ),
        _table("coverage", "Coverage", "Items of | Number | Top 1 % do | Top 10 % do", map(_curve, skewed)),
        _table(
            "declined",
            "Looked at and declined",
            "Method | Reason",
            ([Cell(d.method), Cell(d.reason)] for d in receipt.declined),
            "Reason",
        ),
        _drop_empty(
            _table("overhead", "Overhead", line.replace("After", "Amount"), map(_line, receipt.overhead), "How")
        ),
        _table(
            "environment",
            "Environment",
            "Name | Value",
            ([Cell(k), Cell(v)] for k, v in _flat(receipt.environment)),
            "Value",
        ),
    ]
    return {table.key: table for table in every if table.rows}
