"""Student's t intervals for a handful of paired differences."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from vitalfew.core.errors import InputError

__all__ = ["Interval", "mean_interval", "pairs_needed", "student_quantile"]


def _student_cdf(t: float, df: int) -> float:
    """P(T <= t) for a whole number of degrees of freedom: the finite sums of Abramowitz and Stegun 26.7.3-4."""
    theta = math.atan(t / math.sqrt(df))
    sin, cos = math.sin(theta), math.cos(theta)
    if df % 2:
        term, series = cos, 0.0
        for k in range(1, (df - 1) // 2 + 1):
            series += term
            term *= cos * cos * 2 * k / (2 * k + 1)
        inside = 2 / math.pi * (theta + sin * series)
    else:
        term, series = 1.0, 0.0
        for k in range(1, df // 2 + 1):
            series += term
            term *= cos * cos * (2 * k - 1) / (2 * k)
        inside = sin * series
    return (1 + inside) / 2


@cache
def student_quantile(p: float, df: int) -> float:
    """Return t with P(T <= t) = p for Student's distribution with `df` degrees of freedom, p in (0.5, 1).

    Examples
    --------
    >>> round(student_quantile(0.999, 34), 3)
    3.348
    """
    if not 0.5 < p < 1 or df < 1:
        raise InputError(f"need 0.5 < p < 1 and df >= 1, got {p} and {df}", hint="use at least two observations")
    low, high = 0.0, 1.0
    while _student_cdf(high, df) < p:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the interval around it."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], confidence: float) -> Interval:
    """Return the mean of the values with its t interval; one value alone has an infinite one.

    Examples
    --------
    >>> i = mean_interval([1.0, 2.0, 3.0], 0.95)
    >>> round(i.low, 2), i.mean, round(i.high, 2)
    (-0.48, 2.0, 4.48)
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, -math.inf, math.inf)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = student_quantile((1 + confidence) / 2, n - 1) * spread / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def pairs_needed(values: Sequence[float], room: float, confidence: float, most: int = 1000) -> int | None:
    """Return how many values would make the interval's half width fit the room, if the spread stays as it is.

    None when the room is not positive (the mean itself lies on the limit) or more than `most` would be needed.
    """
    n = len(values)
    if n < 2 or room <= 0:
        return None
    mean = math.fsum(values) / n
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    sizes = range(2, most + 1)  # the half width falls with every one
    first = bisect_left(
        sizes, True, key=lambda m: student_quantile((1 + confidence) / 2, m - 1) * spread / math.sqrt(m) <= room
    )
    return sizes[first] if first < len(sizes) else None
