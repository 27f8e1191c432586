"""Miss ratios: how many of the rows that batches need have to be fetched, with more and more memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vitalfew.report.charts.svg import WIDTH, Axis, apart, circle, fit, line, picture, polyline, text, text_width
from vitalfew.report.figures import amount

__all__ = ["miss_ratio_chart"]

_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 340.0, 44.0, WIDTH - 12, 22.0, 296.0
_SIZE = 12.0
_COLOURS = 4
_NAMES = {"lru": "LRU", "lfu": "LFU", "lookahead": "look-ahead", "belady": "Belady"}
_STEPS = (1, 2, 5)

Points = Sequence[tuple[float, float]]
Path = list[tuple[float, float]]


def _ticks(low: float) -> list[float]:
    """Return shares of 1, 2 or 5 and zeros, from the smallest to all; only powers of ten where they are many."""
    decades = range(math.floor(low), 1)
    steps = _STEPS if low > -3 else (1,)
    values = [step * 10.0**decade for decade in decades for step in steps]
    return [value for value in values if low - 1e-9 <= math.log10(value) <= 1e-9]


def _frame(x: Axis, y: Axis) -> list[str]:
    parts = []
    for ratio in y.ticks(5):
        at = y.place(ratio)
        parts.append(line(_LEFT, at, _RIGHT, at, "grid"))
        parts.append(text(_LEFT - 8, at + 4, amount(ratio, "share") if ratio else "0", "tick", "end"))
    for share in _ticks(x.low):
        at = x.place(math.log10(share))
        parts.append(line(at, _TOP, at, _BOTTOM, "grid"))
        label = f"{100 * share:.10f}".rstrip("0").rstrip(".") if share > 1e-7 else f"{100 * share:.0e}"
        parts.append(text(at, _BOTTOM + 16, f"{label} %", "tick", "end" if share == 1 else "middle"))
    parts.append(text((_LEFT + _RIGHT) / 2, _BOTTOM + 36, "of the rows in memory", "head", "middle"))
    parts.append(text(0.0, 10.0, "rows fetched, of those that batches need", "head"))
    return parts


def miss_ratio_chart(
    policies: Mapping[str, Points], exact: Points = (), enough: tuple[float, str] | None = None
) -> str:
    """Return the picture of a line per policy over the share of the rows in memory.

    Parameters
    ----------
    policies
        (share of the rows, miss ratio) by policy.
    exact
        The same for LRU at every size, drawn thin.
    enough
        A share that is to be marked, and what to write there.

    Examples
    --------
    >>> "look-ahead" in miss_ratio_chart({"lookahead": [(0.01, 0.5), (0.1, 0.2)]})
    True
    >>> miss_ratio_chart({})
    ''
    """
    drawn = {name: sorted((s, m) for s, m in points if 0 < s <= 1) for name, points in policies.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    least = min([points[0][0] for points in drawn.values()] + ([enough[0]] if enough and enough[0] > 0 else []))
    # The names stand to the left of the lines.
    low = min(math.log10(least) / (1 - 96 / (_RIGHT - _LEFT)), -0.3)
    shown = [(share, miss) for share, miss in exact if share > 0 and low <= math.log10(share) <= 0]
    top = max(miss for points in (*drawn.values(), shown) for _, miss in points)
    x, y = Axis(low, 0.0, _LEFT, _RIGHT), Axis(0.0, min(1.0, 1.05 * top) or 1.0, _BOTTOM, _TOP)

    def path(points: Points) -> Path:
        return [(x.place(math.log10(share)), y.place(miss)) for share, miss in points]

    # The bound is no policy that could be chosen: dotted, without a colour.
    coloured = [name for name in drawn if name != "belady"]
    classes = {name: f"c{i}" if i < _COLOURS else "other" for i, name in enumerate(coloured)} | {"belady": "bound"}
    parts = _frame(x, y)
    if len(shown) > 1:
        parts.append(polyline(path(shown), "curve other"))
    paths = {name: path(points) for name, points in drawn.items()}
    for name, places in reversed(paths.items()):
        parts.append(polyline(places, "even" if name == "belady" else f"curve {classes[name]}"))
        if name != "belady":
            parts += [circle(px, py, 3.0, f"start {classes[name]}") for px, py in places]

    if enough is not None and 0 < enough[0] <= 1:
        at, label = x.place(math.log10(enough[0])), fit(enough[1], 150, _SIZE)
        left = at + 6 if at + 6 + text_width(label, _SIZE) < _RIGHT else at - 6 - text_width(label, _SIZE)
        parts += [line(at, _TOP, at, _BOTTOM, "centre"), text(left, _TOP + 12, label, "head")]
    ends = {name: places[0] for name, places in paths.items()}
    for name, base in apart({name: py + 4 for name, (_, py) in ends.items()}, _SIZE + 2, _BOTTOM - 2).items():
        parts.append(
            text(ends[name][0] - 8, base, fit(_NAMES.get(name, name), 76, _SIZE), f"label {classes[name]}", "end")
        )
    return picture("Miss ratio against the share of the rows in memory", _HEIGHT, parts)
