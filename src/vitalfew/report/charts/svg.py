"""The few parts every chart is drawn with: elements, texts that fit, axes and ticks."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from vitalfew.report.figures import clean

__all__ = [
    "WIDTH",
    "Axis",
    "apart",
    "circle",
    "fit",
    "line",
    "picture",
    "polyline",
    "rect",
    "spaced",
    "text",
    "text_width",
]

# Narrow enough for a phone, and two fit side by side on a desk.
WIDTH = 480.0
_NARROW = set("iljtfrI.,:;|!'`()[]{} /\\-")
_WIDE = set("mwMWQOGD@%&")


def _attributes(values: dict[str, float | str]) -> str:
    return "".join(
        f' {name.rstrip("_").replace("_", "-")}="{f"{value:.1f}" if isinstance(value, float) else escape(str(value))}"'
        for name, value in values.items()
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """Return a straight line."""
    return f"<line{_attributes({'x1': x1, 'y1': y1, 'x2': x2, 'y2': y2, 'class': class_})}/>"


def polyline(path: Iterable[tuple[float, float]], class_: str) -> str:
    """Return a line through places."""
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in path)
    return f'<polyline points="{places}" class="{class_}"/>'


def rect(x: float, y: float, width: float, height: float, class_: str) -> str:
    """Return a rectangle."""
    return f"<rect{_attributes({'x': x, 'y': y, 'width': width, 'height': height, 'class': class_})}/>"


def circle(x: float, y: float, radius: float, class_: str) -> str:
    """Return a dot."""
    return f"<circle{_attributes({'cx': x, 'cy': y, 'r': radius, 'class': class_})}/>"


def text(x: float, y: float, content: str, class_: str = "", anchor: str = "start", *, detail: str = "") -> str:
    """Return a text, escaped; a detail follows it in smaller letters, wherever the reader's font makes it end.

    Examples
    --------
    >>> text(0.0, 9.0, "a < b")
    '<text x="0.0" y="9.0" class="" text-anchor="start">a &lt; b</text>'
    """
    attributes = _attributes({"x": x, "y": y, "class": class_, "text-anchor": anchor})
    more = f'<tspan class="detail" dx="10">{escape(clean(detail))}</tspan>' if detail else ""
    return f"<text{attributes}>{escape(clean(content))}{more}</text>"


def picture(title: str, height: float, parts: Iterable[str]) -> str:
    """Return a whole picture that scales with its column; the title is what a screen reader says.

    Examples
    --------
    >>> picture("Empty", 10.0, []).endswith("<title>Empty</title></svg>")
    True
    """
    name = escape(clean(title))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" '
        f'aria-label="{name}"><title>{name}</title>{"".join(parts)}</svg>'
    )


def text_width(content: str, size: float) -> float:
    """Return about how wide a text is; on the safe side, for the reader's font is not known here.

    Examples
    --------
    >>> text_width("mm", 10) > text_width("ii", 10)
    True
    """

    def share(c: str) -> float:
        if unicodedata.east_asian_width(c) in "WF":
            return 1.05
        return 0.4 if c in _NARROW else 0.92 if c in _WIDE else 0.66 if c.isupper() or c.isdigit() else 0.6

    return size * sum(map(share, content))


def fit(content: str, width: float, size: float) -> str:
    """Return the text, cut with an ellipsis where it is wider than the room.

    Examples
    --------
    >>> fit("short", 100, 10), fit("a very long name", 50, 10)
    ('short', 'a very l…')
    """
    one_line = " ".join(clean(content).split())
    if text_width(one_line, size) <= width:
        return one_line
    # Far more letters than fit are not worth measuring.
    cut = one_line[: int(width / size / 0.3) + 2]
    while cut and text_width(cut + "…", size) > width:
        cut = cut[:-1]
    return cut.rstrip() + "…"


@dataclass(frozen=True, slots=True)
class Axis:
    """Takes values from `low` to `high` to places from `start` to `end`; values outside go to the edge.

    Examples
    --------
    >>> axis = Axis.over([1.0, 3.0], 0.0, 100.0)
    >>> axis.place(2.0), axis.place(99.0)
    (50.0, 100.0)
    """

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, *, pad: float = 0.0, least: float = 0.0) -> Axis:
        """Build an axis that covers the values, is at least `least` long, and has a share `pad` of air at both ends."""
        # Halves, since the span of two huge numbers may overflow.
        low, high = min(values) / 2, max(values) / 2
        air = max((high - low) * pad, (least / 2 - (high - low)) / 2)
        return cls(2 * (low - air), 2 * (high + air), start, end)

    def place(self, value: float) -> float:
        span = self.high / 2 - self.low / 2
        share = (value / 2 - self.low / 2) / span if span > 0 else 0.5
        return self.start + (self.end - self.start) * min(1.0, max(0.0, share))

    def ticks(self, most: int) -> list[float]:
        """Return about `most` round values.

        Examples
        --------
        >>> Axis(-0.0012, 0.0011, 0, 100).ticks(4)
        [-0.001, 0.0, 0.001]
        """
        span = self.high / 2 - self.low / 2
        if not 1e-290 < span < 1e290:
            return [0.0] if self.low <= 0 <= self.high else [self.low]
        unit = 10.0 ** math.floor(math.log10(2 * span / most))
        step = next(unit * k for k in (1, 2, 5, 10) if 2 * span / (unit * k) <= most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        # Values far from zero with next to no span have no round neighbours that a float could tell apart.
        if last - first > 2 * most:
            return [self.low]
        return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def spaced(
    labels: Iterable[tuple[float, str]], room: tuple[float, float], size: float = 11.0
) -> list[tuple[float, float, str]]:
    """Return tick, place of the label and label for those that fit beside each other; the first have precedence.

    A label stands centred under its tick, or as near to that as the room allows.

    Examples
    --------
    >>> spaced([(0.0, "no"), (5.0, "one"), (90.0, "yes")], (0.0, 100.0), 10.0)
    [(0.0, 6.0, 'no'), (90.0, 90.0, 'yes')]
    """
    kept: list[tuple[float, float, str]] = []
    for tick, label in labels:
        half = text_width(label, size) / 2
        x = min(max(tick, room[0] + half), room[1] - half)
        if all(abs(x - other) >= half + text_width(taken, size) / 2 + 8 for _, other, taken in kept):
            kept.append((tick, x, label))
    return kept


def apart(bases: Mapping[str, float], gap: float, bottom: float) -> dict[str, float]:
    """Move the base lines of names apart where they are nearer than the gap, as little as keeps their order.

    Examples
    --------
    >>> apart({"low": 52.0, "high": 50.0}, 14.0, 60.0)
    {'low': 60.0, 'high': 46.0}
    """
    order = sorted(bases, key=lambda name: bases[name])
    found = dict(bases)
    for above, below in pairwise(order):
        found[below] = max(found[below], found[above] + gap)
    for below in order[-1:]:
        found[below] = min(found[below], bottom)
    for below, above in pairwise(reversed(order)):
        found[above] = min(found[above], found[below] - gap)
    return found
