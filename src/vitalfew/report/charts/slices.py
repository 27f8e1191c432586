"""Lines over slices of time: how figures change as a log goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from vitalfew.report.charts.svg import (
    WIDTH,
    Axis,
    apart,
    circle,
    fit,
    line,
    picture,
    polyline,
    spaced,
    text,
    text_width,
)

__all__ = ["Point", "slices_chart"]

Point: TypeAlias = "tuple[float, float | None, float | None] | None"
"""A figure with its interval, where it has one; None where there is no figure."""

_HEIGHT, _LEFT, _TOP, _BOTTOM = 300.0, 44.0, 24.0, 256.0
_SIZE = 12.0
_COLOURS = 4
_WIDEST_NAME = 132.0


def slices_chart(
    title: str,
    lines: Mapping[str, Sequence[Point]],
    starts: Sequence[str],
    *,
    what: str,
    marks: Mapping[float, str] | None = None,
    floor: float | None = None,
    below: str = "slice from",
) -> str:
    """Return the picture of a line per name; the first four names are coloured, the others stand behind in grey.

    Parameters
    ----------
    title
        What a screen reader says.
    lines
        A point for each slice, by name.
    starts
        When each slice begins.
    what
        Stands above the axis.
    marks
        Heights to mark with a dotted line, and what to write there.
    floor
        Where the axis begins; by default at the lowest point.
    below
        Stands below the axis.

    Examples
    --------
    >>> "user" in slices_chart("drift", {"user": [(0.1, None, None), (0.3, 0.2, 0.4)]}, ["May", "June"], what="PSI")
    True
    >>> slices_chart("drift", {}, [], what="PSI")
    ''
    """
    drawn = {name: points for name, points in lines.items() if any(point is not None for point in points)}
    if not drawn:
        return ""
    marks = marks or {}
    coloured = list(drawn)[:_COLOURS]
    right = WIDTH - 14 - min(max(text_width(name, _SIZE) for name in coloured), _WIDEST_NAME)
    heights = [each for points in drawn.values() for point in points if point for each in point if each is not None]
    shown = [height for height in marks if height <= 1.15 * max(heights)]
    x = Axis(-0.25, len(starts) - 0.75, _LEFT, right)
    y = Axis.over([*heights, *shown, *([] if floor is None else [floor])], _BOTTOM, _TOP, pad=0.04, least=1e-3)
    if floor is not None:
        y = Axis(min(floor, *heights), y.high, _BOTTOM, _TOP)
    parts = [text(0.0, 10.0, what, "head")]
    for height in y.ticks(7):
        at = y.place(height)
        parts += [line(_LEFT, at, right, at, "grid"), text(_LEFT - 8, at + 4, f"{height:g}", "tick", "end")]
    labels = [(x.place(k), start) for k, start in enumerate(starts)]
    # The first and the last have precedence.
    for _, at, label in spaced([*labels[:1], *labels[-1:], *labels[1:-1]], (0.0, right + 14), 11.0):
        parts.append(text(at, _BOTTOM + 18, label, "tick", "middle"))
    parts.append(text((_LEFT + right) / 2, _BOTTOM + 38, below, "head", "middle"))
    for height in shown:
        at = y.place(height)
        parts.append(f'<line x1="{_LEFT:.1f}" y1="{at:.1f}" x2="{right:.1f}" y2="{at:.1f}" class="even"/>')
        parts.append(text(_LEFT + 4, at - 4, marks[height], "detail"))
    ends: dict[str, float] = {}
    width = (right - _LEFT) / max(len(starts), 1)
    for i, (name, points) in reversed(list(enumerate(drawn.items()))):
        class_ = f"c{i}" if i < _COLOURS else "other"
        # Side by side, or the intervals of different lines hide each other.
        aside = (i - (min(len(drawn), _COLOURS) - 1) / 2) * min(5.0, width / 8) if i < _COLOURS else 0.0
        found = [(x.place(k), point) for k, point in enumerate(points) if point is not None]
        if any(point[1] is not None for _, point in found):
            found = [(at + aside, point) for at, point in found]
        for at, (_, low, high) in found:
            if low is not None and high is not None:
                parts.append(line(at, y.place(low), at, y.place(high), f"curve {class_}"))
        parts.append(polyline([(at, y.place(point[0])) for at, point in found], f"curve {class_}"))
        if i < _COLOURS:
            parts += [circle(at, y.place(point[0]), 3.0, f"start {class_}") for at, point in found]
            ends[name] = y.place(found[-1][1][0]) + 4
    for name, base in apart(ends, _SIZE + 2, _BOTTOM).items():
        class_ = f"label c{coloured.index(name)}"
        parts.append(text(right + 12, base, fit(name, _WIDEST_NAME, _SIZE), class_))
    return picture(title, _HEIGHT, parts)
