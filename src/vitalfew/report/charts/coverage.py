"""Coverage curves: what share of the items does what share of the work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from vitalfew.core import Curve
from vitalfew.report.charts.svg import WIDTH, Axis, fit, line, picture, text, text_width
from vitalfew.report.figures import amount
from vitalfew.report.tables import gini

__all__ = ["NUM_NAMED", "coverage_chart"]

NUM_NAMED = 4
_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 340.0, 44.0, WIDTH - 12, 10.0, 296.0
_SIZE = 12.0

_Path = list[tuple[float, float]]
_Box = tuple[float, float, float, float]


def _path(curve: Curve, x: Axis, y: Axis) -> _Path:
    """Return the curve in places; a share of zero items has no place on a logarithmic axis."""
    return [(x.place(math.log10(share)), y.place(work)) for share, work in curve.points if share > 0]


def _polyline(path: _Path, class_: str) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in path)
    dot = f'<circle cx="{path[0][0]:.1f}" cy="{path[0][1]:.1f}" r="2.5" class="start {class_}"/>'
    return f'<polyline points="{places}" class="curve {class_}"/>{dot}'


def _dense(path: _Path) -> _Path:
    """Return places along the path at most 4 apart, so that a label can be kept off it."""
    places = path[:1]
    for (x0, y0), (x1, y1) in pairwise(path):
        n = max(1, math.ceil(math.dist((x0, y0), (x1, y1)) / 4))
        places += [(x0 + (x1 - x0) * k / n, y0 + (y1 - y0) * k / n) for k in range(1, n + 1)]
    return places


def _inside(box: _Box, places: _Path) -> int:
    x0, y0, x1, y1 = box
    return sum(x0 <= x <= x1 and y0 <= y <= y1 for x, y in places)


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _label(name: str, path: _Path, others: _Path, taken: list[_Box]) -> tuple[float, float, _Box] | None:
    """Return where beside its curve a name hides the least; None where every place is taken."""
    width = text_width(name, _SIZE)
    best = None
    for x, y in path:
        # Above and to the left of a rising curve, or below and to the right of it.
        for left, base in ((x - 7 - width, y - 2), (x + 8, y + 12)):
            box = (left - 2, base - _SIZE, left + width + 2, base + 4)
            if box[0] < _LEFT or box[2] > _RIGHT or box[1] < _TOP or box[3] > _BOTTOM:
                continue
            if any(_overlap(box, other) for other in taken):
                continue
            cost = _inside(box, others)
            if best is None or cost < best[0]:
                best = cost, left, base, box
    return best[1:] if best else None


def _frame(x: Axis, y: Axis) -> list[str]:
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = y.place(share)
        parts.append(line(_LEFT, at, _RIGHT, at, "grid"))
        parts.append(text(_LEFT - 8, at + 4, amount(share, "share") if share else "0", "tick", "end"))
    decades = round(-x.low)
    every = math.ceil(decades / 5)
    for k in range(0, decades + 1, every):
        at = x.place(-k)
        parts.append(line(at, _TOP, at, _BOTTOM, "grid"))
        percent = f"{10.0 ** (2 - k):.10f}".rstrip("0").rstrip(".") if k <= 6 else f"1e-{k - 2}"
        parts.append(text(at, _BOTTOM + 16, f"{percent} %", "tick", "end" if k == 0 else "middle"))
    parts.append(text((_LEFT + _RIGHT) / 2, _BOTTOM + 36, "of the items, busiest first", "head", "middle"))
    even = [(x.low * k / 40, 10 ** (x.low * k / 40)) for k in range(41)]
    places = " ".join(f"{x.place(log):.1f},{y.place(share):.1f}" for log, share in even)
    parts.append(f'<polyline points="{places}" class="even"/>')
    return parts


def coverage_chart(curves: Sequence[Curve]) -> str:
    """Return the picture of the coverage curves; the most skewed carry their names, the others are grey.

    Examples
    --------
    >>> "site" in coverage_chart([Curve("site", ((0.01, 0.6), (1.0, 1.0)), 100)])
    True
    """
    drawn = sorted(
        (curve for curve in curves if any(share > 0 for share, _ in curve.points)), key=lambda c: (-gini(c), c.name)
    )
    if not drawn:
        return ""
    least = min(share for curve in drawn for share, _ in curve.points if share > 0)
    decades = min(12, max(1, math.ceil(-math.log10(least) - 1e-9))) if least < 1 else 1
    x, y = Axis(-decades, 0.0, _LEFT, _RIGHT), Axis(0.0, 1.0, _BOTTOM, _TOP)
    paths = [_path(curve, x, y) for curve in drawn]
    parts = _frame(x, y)
    parts += [_polyline(path, "other") for path in paths[NUM_NAMED:]]
    parts += [_polyline(path, f"c{i}") for i, path in reversed(list(enumerate(paths[:NUM_NAMED])))]

    dense = [_dense(path) for path in paths[:NUM_NAMED]]
    taken: list[_Box] = []
    for i, (curve, path) in enumerate(zip(drawn, dense, strict=False)):
        name = fit(curve.name, 150, _SIZE)
        found = _label(name, path, [place for each in dense for place in each], taken)
        if found:
            left, base, box = found
            taken.append(box)
            parts.append(text(left, base, name, f"label c{i}"))
    return picture("Share of the work against share of the items", _HEIGHT, parts)
