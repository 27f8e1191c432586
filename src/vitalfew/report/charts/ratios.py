"""One row per thing, one dot at how many times less or more it became: before and after, predicted and measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vitalfew.core import Line, Prediction
from vitalfew.report.charts.svg import WIDTH, Axis, circle, fit, line, picture, rect, spaced, text, text_width
from vitalfew.report.figures import amount, change, factor, log_ratio

__all__ = ["ladder_chart", "prediction_chart"]

_ROW = 54.0
_EDGE = 8.0


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    detail: str
    change: str
    log: float
    low: float | None = None
    high: float | None = None
    how: str = "measured"


def _ticks(axis: Axis, centre: str) -> list[tuple[float, float, str]]:
    """Label the centre first, then powers of ten, then the steps between as far as there is room."""
    decades = max(1, math.floor(max(-axis.low, axis.high) / math.log(10) / 2))
    labels = [(axis.place(0.0), centre)]
    for value in (10.0 ** min(decades, 300), 10.0 ** min(2 * decades, 300), 2.0, 5.0, 20.0, 50.0, 1.5, 1.2, 1.1, 1.05):
        log = math.log(value)
        if log < axis.high:
            labels.append((axis.place(log), f"{factor(log)} more"))
        if -log > axis.low:
            labels.append((axis.place(-log), f"{factor(log)} less"))
    return spaced(labels, (0.0, WIDTH))


def _dot(x: float, y: float, how: str) -> str:
    if how == "counted":
        return rect(x - 5, y - 5, 10.0, 10.0, "ours")
    return circle(x, y, 5.5, "ours hollow" if how == "modelled" else "ours")


def _chart(title: str, rows: Sequence[_Row], centre: str) -> str:
    ends = [end for row in rows for end in (row.low, row.high) if end is not None]
    axis = Axis.over([0.0, *(row.log for row in rows), *ends], _EDGE, WIDTH - _EDGE, pad=0.08, least=2 * math.log(1.25))
    bottom = _ROW * len(rows)
    parts = []
    for tick, x, label in _ticks(axis, centre):
        # The grid is cut into one short piece a row, so that it never runs through a text.
        class_ = "centre" if label == centre else "grid"
        parts += [line(tick, i * _ROW + 21, tick, i * _ROW + 39, class_) for i in range(len(rows))]
        parts.append(text(x, bottom + 12, label, "tick", "middle"))
    for i, row in enumerate(rows):
        y, zero, x = i * _ROW, axis.place(0.0), axis.place(row.log)
        room = WIDTH - text_width(row.change, 14) - 24
        # Bold letters are wider, hence the larger size to measure with.
        name = fit(row.name, max(room * 0.5, room - text_width(row.detail, 11)), 14)
        detail = fit(row.detail, room - text_width(name, 14), 11)
        parts += [
            text(0.0, y + 13, name, "name", detail=detail),
            text(WIDTH, y + 13, row.change, "name", "end"),
            line(_EDGE, y + 30, WIDTH - _EDGE, y + 30, "grid"),
            line(zero, y + 30, x, y + 30, "reach"),
        ]
        if row.low is not None and row.high is not None:
            a, b = axis.place(row.low), axis.place(row.high)
            parts += [line(a, y + 30, b, y + 30, "spread"), line(a, y + 25, a, y + 35, "spread")]
            parts.append(line(b, y + 25, b, y + 35, "spread"))
        parts += [circle(zero, y + 30, 3.5, "base"), _dot(x, y + 30, row.how)]
    return picture(title, bottom + 22, parts)


def ladder_chart(lines: Sequence[Line]) -> str:
    """Return the picture of every line that has a before and an after, each in times of its before.

    Lines without both, or with a figure that is not positive, have no factor; they are left to the table.

    Examples
    --------
    >>> "5x less" in ladder_chart([Line("time", "s", 10.0, 2.0, "measured")])
    True
    >>> ladder_chart([Line("time", "s", None, 2.0, "measured")])
    ''
    """
    rows = []
    for item in lines:
        log = log_ratio(item.before, item.after)
        if log is not None:
            detail = f"{amount(item.before, item.unit)} → {amount(item.after, item.unit)}"
            low, high = log_ratio(item.before, item.low), log_ratio(item.before, item.high)
            rows.append(_Row(item.what, detail, change(item.before, item.after), log, low, high, item.how))
    return _chart("How many times less or more of each", rows, "before") if rows else ""


def prediction_chart(predictions: Sequence[Prediction]) -> str:
    """Return the picture of what came, in times of what was predicted.

    Examples
    --------
    >>> "1.2x less" in prediction_chart([Prediction("time", "s", 12.0, 10.0)])
    True
    """
    rows = []
    for item in predictions:
        log = log_ratio(item.predicted, item.measured)
        if log is not None:
            detail = f"{amount(item.predicted, item.unit)} → {amount(item.measured, item.unit)}"
            rows.append(_Row(item.what, detail, change(item.predicted, item.measured), log))
    return _chart("What was predicted against what was measured", rows, "as predicted") if rows else ""
