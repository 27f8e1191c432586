"""Frontiers: what quality each method has at each budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vitalfew.report.charts.svg import WIDTH, Axis, apart, circle, fit, line, picture, polyline, text, text_width
from vitalfew.report.figures import amount

__all__ = ["frontier_chart"]

_HEIGHT, _LEFT, _TOP, _BOTTOM = 340.0, 52.0, 26.0, 296.0
_SIZE = 12.0
_COLOURS = 4
_WIDEST_NAME = 110.0

Point = tuple[float, float, float | None, float | None]
"""Share of the budget, figure, and the figure's interval where it has one."""


def _log_ticks(low: float, high: float) -> list[float]:
    """Return values of 1, 2 or 5 and zeros between two powers of ten; only the powers where they are many."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    steps = (1, 2, 5) if high - low < 2.5 else (1,)
    return [k * 10.0**decade for decade in decades for k in steps if low <= math.log10(k * 10.0**decade) <= high]


def _vertical(heights: Sequence[float], log: bool) -> tuple[Axis, list[tuple[float, str]]]:
    """Return the axis, of logarithms where asked for, and places and labels of its ticks."""
    if log:
        logs = [math.log10(height) for height in heights]
        axis = Axis.over(logs, _BOTTOM, _TOP, pad=0.06, least=0.5)
        ticks = [(axis.place(math.log10(value)), f"{value:.3g}") for value in _log_ticks(axis.low, axis.high)]
        return axis, ticks
    axis = Axis(min(0.0, *heights), max(*heights, 0.0) * 1.05 or 1.0, _BOTTOM, _TOP)
    return axis, [(axis.place(value), f"{value:g}") for value in axis.ticks(6)]


def frontier_chart(
    title: str,
    lines: Mapping[str, Sequence[Point]],
    *,
    what: str,
    below: str,
    log: bool = False,
    mark: tuple[float, str] | None = None,
) -> str:
    """Return the picture of a line per method over the share of the budget; the first four are coloured.

    Parameters
    ----------
    title
        What a screen reader says.
    lines
        Points by method.
    what, below
        Stand above and below.
    log
        Whether the figures, then positive, are drawn as logarithms; those that are not have no place and are left out.
    mark
        A height for a dotted line, and what to write there.

    Examples
    --------
    >>> points = {"snapkv": [(0.2, 0.08, 0.05, 0.11), (0.5, 0.02, None, None)]}
    >>> "snapkv" in frontier_chart("divergence", points, what="KL", below="of the bytes", log=True)
    True
    >>> frontier_chart("divergence", {}, what="KL", below="of the bytes")
    ''
    """
    drawn = {
        name: sorted((point for point in points if not log or point[1] > 0), key=lambda point: point[0])
        for name, points in lines.items()
    }
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    room = min(max(text_width(name, _SIZE) for name in drawn), _WIDEST_NAME)
    right = WIDTH - 14 - room
    found = [point for points in drawn.values() for point in points]
    heights = [each for point in found for each in point[1:] if each is not None and (each > 0 or not log)]
    y, ticks = _vertical([*heights, *([mark[0]] if mark else [])], log)
    shares = [point[0] for point in found]
    x = Axis(max(0.0, min(shares) - 0.05), max(shares) + 0.02, _LEFT, right)

    def height(value: float) -> float:
        if log:
            return y.place(math.log10(value)) if value > 0 else _BOTTOM
        return y.place(value)

    parts = [text(0.0, 10.0, what, "head")]
    for at, label in ticks:
        parts += [line(_LEFT, at, right, at, "grid"), text(_LEFT - 8, at + 4, label, "tick", "end")]
    for share in x.ticks(6):
        at = x.place(share)
        parts.append(line(at, _TOP, at, _BOTTOM, "grid"))
        parts.append(text(at, _BOTTOM + 16, amount(share, "share") if share else "0", "tick", "middle"))
    parts.append(text((_LEFT + right) / 2, _BOTTOM + 36, below, "head", "middle"))
    if mark:
        at = height(mark[0])
        parts += [polyline([(_LEFT, at), (right, at)], "even"), text(_LEFT + 4, at - 4, mark[1], "detail")]
    ends: dict[str, float] = {}
    for i, (name, points) in reversed(list(enumerate(drawn.items()))):
        class_ = f"c{i}" if i < _COLOURS else "other"
        # Side by side, or the intervals of methods with the same budget hide each other.
        aside = (i - (len(drawn) - 1) / 2) * 3.0
        path = [(min(max(x.place(point[0]) + aside, _LEFT), right), height(point[1])) for point in points]
        for (at, _), (_, _, low, high) in zip(path, points, strict=True):
            if low is not None and high is not None:
                parts.append(line(at, height(low), at, height(high), f"curve {class_}"))
        parts.append(polyline(path, f"curve {class_}"))
        parts += [circle(px, py, 3.0, f"start {class_}") for px, py in path]
        ends[name] = path[-1][1] + 4
    names = list(drawn)
    for name, base in apart(ends, _SIZE + 2, _BOTTOM).items():
        i = names.index(name)
        class_ = f"label c{i}" if i < _COLOURS else "head"
        edge = x.place(drawn[name][-1][0])
        parts.append(text(edge + 14, base, fit(name, _WIDEST_NAME, _SIZE), class_))
    return picture(title, _HEIGHT, parts)
