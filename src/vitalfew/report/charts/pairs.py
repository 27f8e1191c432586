"""Every paired run as one row: its ratio on the left, its quality difference on the right, the means below."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from vitalfew.core import Pair, Quality
from vitalfew.core.intervals import mean_interval
from vitalfew.report.charts.svg import WIDTH, Axis, circle, fit, line, picture, rect, spaced, text
from vitalfew.report.figures import factor, signed
from vitalfew.report.tables import pair_log

__all__ = ["CONFIDENCE", "pairs_chart"]

CONFIDENCE = 0.95
_TOP, _MOST_NAMED = 42.0, 12
_LEFT = (64.0, 254.0)
_RIGHT = (286.0, 476.0)


def _mean(axis: Axis, y: float, mean: float, ends: tuple[float, float] | None, label: str) -> list[str]:
    """Draw a diamond on its interval, with the number below."""
    x = axis.place(mean)
    parts = []
    if ends:
        a, b = axis.place(ends[0]), axis.place(ends[1])
        parts = [line(a, y, b, y, "spread"), *(line(end, y - 5, end, y + 5, "spread") for end in (a, b))]
    parts.append(f'<path d="M{x - 6:.1f} {y:.1f}l6 -6l6 6l-6 6z" class="ours"/>')
    for _, place, shown in spaced([(x, label)], (axis.start, axis.end), 12):
        parts.append(text(place, y + 28, shown, "name small", "middle"))
    return parts


def _scale(axis: Axis, labels: Iterable[tuple[float, str]], bottom: float) -> list[str]:
    parts = []
    for tick, x, label in spaced(labels, (axis.start - 12, axis.end + 4)):
        parts.append(text(x, _TOP - 7, label, "tick", "middle"))
        parts.append(line(tick, _TOP, tick, bottom, "grid"))
    return [*parts, line(axis.place(0.0), _TOP, axis.place(0.0), bottom, "centre")]


def _ratio_labels(axis: Axis) -> Iterator[tuple[float, str]]:
    for value in (1.0, 10.0, 2.0, 5.0, 100.0, 20.0, 50.0, 1000.0, 1e6, 1.5, 1.2, 1.1, 1.05, 1.02):
        for log in (math.log(value), -math.log(value)):
            if axis.low <= log <= axis.high:
                yield axis.place(log), factor(log)


def _difference_labels(axis: Axis) -> Iterator[tuple[float, str]]:
    for tick in sorted(axis.ticks(4), key=abs):
        yield axis.place(tick), f"{tick:+.4g}" if tick else "0"


def pairs_chart(pairs: Sequence[Pair], quality: Quality | None = None, rule: str = "") -> str:
    """Return the picture of the paired runs.

    Parameters
    ----------
    pairs
        In the order they ran.
    quality
        The metric that the pairs hold, with its interval and tolerance; the band is drawn where it is known.
    rule
        The text of the rule, which says what the ratio is of.

    Examples
    --------
    >>> "one pair, no interval" in pairs_chart([Pair(0, "base", 10.0, 2.0, 0.7, 0.7)])
    True
    """
    if not pairs:
        return ""
    logs = [pair_log(pair, rule) for pair in pairs]
    falls = [pair.few_quality - pair.base_quality for pair in pairs]
    step = 22.0 if len(pairs) <= _MOST_NAMED else 264.0 / len(pairs)
    rows = step * len(pairs)
    bottom = _TOP + rows + 26
    ratio = mean_interval(logs, CONFIDENCE)
    one = len(pairs) == 1
    ends = None if one else (ratio.low, ratio.high)

    left = Axis.over([0.0, *logs, *(ends or ())], *_LEFT, pad=0.06, least=math.log(1.1))
    tolerance = quality.tolerance if quality else 0.0
    mean = quality.difference if quality else sum(fall / len(falls) for fall in falls)
    span: tuple[float, float] | None = None
    if quality and quality.low is not None and quality.high is not None:
        span = quality.low, quality.high
    right = Axis.over([0.0, *falls, mean, tolerance, -tolerance, *(span or ())], *_RIGHT, pad=0.06, least=1e-12)

    parts = [
        text(
            _LEFT[0],
            14.0,
            "work ratio, ours / baseline" if rule.startswith("At equal cost") else "cost ratio, baseline / ours",
            "head",
        ),
        text(_RIGHT[0], 14.0, fit(f"{quality.metric if quality else 'quality'}, ours - baseline", 190, 12), "head"),
    ]
    if tolerance > 0:
        a, b = right.place(-tolerance), right.place(tolerance)
        parts.append(rect(a, _TOP, b - a, bottom - _TOP, "band"))
    parts += _scale(left, _ratio_labels(left), bottom)
    parts += _scale(right, _difference_labels(right), bottom)

    radius = 4.5 if len(pairs) <= _MOST_NAMED else 2.5
    for i, (pair, log, fall) in enumerate(zip(pairs, logs, falls, strict=True)):
        y = _TOP + (i + 0.5) * step
        class_ = "dot" if pair.first == "base" else "dot hollow"
        if len(pairs) <= _MOST_NAMED:
            parts.append(text(0.0, y + 4, fit(f"seed {pair.seed}", 60, 12), "tick"))
        parts += [circle(left.place(log), y, radius, class_), circle(right.place(fall), y, radius, class_)]
    if len(pairs) > _MOST_NAMED:
        parts += [text(0.0, _TOP + 10, f"{len(pairs)} pairs", "tick")]
    y = _TOP + rows + 14
    parts.append(line(0.0, _TOP + rows + 1, WIDTH, _TOP + rows + 1, "rule"))
    parts.append(text(0.0, y + 4, "mean", "name small"))
    label = "one pair, no interval" if one else f"{factor(ratio.mean)} ({factor(ratio.low)} to {factor(ratio.high)})"
    parts += _mean(left, y, ratio.mean, ends, label)
    parts += _mean(right, y, mean, span, signed(mean, tolerance or 0.01))
    return picture("Cost ratio and quality difference of each paired run", bottom + 22, parts)
