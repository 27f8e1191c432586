"""Many methods on many logs at a glance: a small bar for each speed, and a mark where the quality differs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vitalfew.report.charts.svg import WIDTH, Axis, fit, line, picture, rect, text
from vitalfew.report.figures import factor

__all__ = ["Cell", "gallery_chart"]

_LEFT, _TOP, _ROW = 92.0, 60.0, 46.0


@dataclass(frozen=True, slots=True)
class Cell:
    """What a method did on a log.

    Attributes
    ----------
    times
        Its speed in times of the baseline's, over 0: the median of the runs.
    low, high
        The range of the runs.
    difference
        Of the quality, ours less the baseline's; None where it is not known.
    """

    times: float
    low: float
    high: float
    difference: float | None = None


def gallery_chart(
    logs: Mapping[str, Mapping[str, Cell]], tolerance: float, *, metric: str = "AUC", baseline: str = "baseline"
) -> str:
    """Return the picture of a row per method and a column per log.

    A bar goes right where the method is faster than the baseline and left where it is slower, on one logarithmic scale
    for all. It is hollow, with the difference below, where the quality differs by more than the tolerance.

    Parameters
    ----------
    logs
        The cells by log and method; the methods need not be the same for every log.
    tolerance
        The largest difference of the quality that counts as none.
    metric, baseline
        Names, for the texts.

    Examples
    --------
    >>> svg = gallery_chart({"clicks": {"skip rows": Cell(1.5, 1.4, 1.6, -0.004)}}, 0.001)
    >>> "1.5x" in svg, "-.004" in svg
    (True, True)
    >>> gallery_chart({}, 0.001)
    ''
    """
    methods = list(dict.fromkeys(name for cells in logs.values() for name in cells))
    if not methods:
        return ""
    width = (WIDTH - _LEFT) / len(logs)
    ends = [math.log(end) for cells in logs.values() for cell in cells.values() for end in (cell.low, cell.high)]
    reach = max(*map(abs, ends), math.log(1.5))
    bottom = _TOP + _ROW * len(methods)
    caption = f"speed, times {baseline}; hollow: {metric} differs by more than {tolerance:g}"
    parts = [text(0.0, 10.0, fit(caption, WIDTH, 12), "head")]
    for row, name in enumerate(methods):
        top = _TOP + row * _ROW
        parts += [line(0.0, top, WIDTH, top, "rule"), text(0.0, top + 18, fit(name, _LEFT - 4, 12), "name small")]
    for column, (log, cells) in enumerate(logs.items()):
        axis = Axis(-reach, reach, _LEFT + column * width + 4, _LEFT + (column + 1) * width - 4)
        one = axis.place(0.0)
        for k, words in enumerate(_in_two(log)):
            parts.append(text(one, _TOP - 20 + 13 * k, fit(words, width - 2, 11), "tick", "middle"))
        for row, name in enumerate(methods):
            top = _TOP + row * _ROW
            # The line is cut into one short piece a row, so that it never runs through a text.
            parts.append(line(one, top + 3, one, top + 16, "centre"))
            parts += _cell(cells[name], axis, top, tolerance) if name in cells else []
    return picture(f"Speed of {len(methods)} methods on {len(logs)} logs, in times of {baseline}", bottom + 4, parts)


def _cell(cell: Cell, axis: Axis, top: float, tolerance: float) -> list[str]:
    one, x = axis.place(0.0), axis.place(math.log(cell.times))
    low, high = axis.place(math.log(cell.low)), axis.place(math.log(cell.high))
    differs = cell.difference is not None and abs(cell.difference) > tolerance
    parts = [
        rect(min(one, x), top + 5, max(abs(x - one), 1.5), 9.0, "ours hollow" if differs else "ours"),
        line(low, top + 9.5, high, top + 9.5, "spread"),
        text(one, top + 28, factor(math.log(cell.times)), "small", "middle"),
    ]
    if differs and cell.difference is not None:
        parts.append(text(one, top + 41, _short(cell.difference), "tick", "middle"))
    return parts


def _short(difference: float) -> str:
    """Return a difference without a zero before its point, as there is little room."""
    return f"{difference:+.3f}".replace("+0.", "+.").replace("-0.", "-.")


def _in_two(name: str) -> tuple[str, str]:
    """Return a name as two lines of about the same length, cut at a blank or after a hyphen; one word stands below.

    Examples
    --------
    >>> _in_two("amazon-book"), _in_two("retail")
    (('amazon-', 'book'), ('', 'retail'))
    """
    cuts = [0, *(i + 1 for i, letter in enumerate(name) if letter in " -")]
    cut = min(cuts, key=lambda i: abs(2 * i - len(name)) if i else len(name))
    return name[:cut].rstrip(), name[cut:]
