"""A figure: a number with its unit, its origin and, where it is not exact, its interval."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vitalfew.core.errors import InputError

__all__ = ["Figure", "How", "human", "total"]

How = Literal["measured", "counted", "modelled"]

_BINARY = tuple((2.0 ** (10 * n), f" {p}B") for n, p in reversed(list(enumerate(("", "Ki", "Mi", "Gi", "Ti", "Pi")))))
_SCALES: dict[str, tuple[tuple[float, str], ...]] = {
    "B": _BINARY,
    "s": ((7200.0, " h"), (120.0, " min"), (1.0, " s"), (1e-3, " ms"), (1e-6, " us")),
    "J": ((1e9, " GJ"), (1e6, " MJ"), (1e3, " kJ"), (1.0, " J"), (1e-3, " mJ"), (1e-6, " uJ")),
    "gCO2e": ((1e6, " tCO2e"), (1e3, " kgCO2e"), (1.0, " gCO2e"), (1e-3, " mgCO2e"), (1e-6, " ugCO2e")),
    "FLOP": ((1e15, " PFLOP"), (1e12, " TFLOP"), (1e9, " GFLOP"), (1e6, " MFLOP"), (1e3, " kFLOP"), (1.0, " FLOP")),
}
# Long times change their unit later than at one: 90 s reads better than 1.5 min.
_DIVISOR = {" h": 3600.0, " min": 60.0}


def _scale(value: float, unit: str) -> tuple[float, str]:
    """Return what to divide by, and what to write behind the number."""
    if unit == "share":
        return 0.01, " %"
    steps = _SCALES.get(unit)
    if steps is None:
        return 1.0, f" {unit}" if unit else ""
    if value == 0:
        return 1.0, f" {unit}"
    # A value that rounds up to the next step is written in that step: 1 kJ, not 1000 J.
    least, label = next((step for step in steps if abs(value) * 1.0005 >= step[0]), steps[-1])
    return _DIVISOR.get(label, least), label


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.2e}"


def human(value: float, unit: str) -> str:
    """Return a number as people write it: three digits, a prefix, the unit.

    Parameters
    ----------
    value
        Any finite number.
    unit
        ``s``, ``B``, ``J``, ``gCO2e``, ``FLOP`` and ``share`` are scaled; any other unit is written as it is.

    Examples
    --------
    >>> human(3 * 2**20, "B"), human(0.125, "share"), human(41_200, "J"), human(1234567, "rows")
    ('3 MiB', '12.5 %', '41.2 kJ', '1,234,567 rows')
    """
    divisor, label = _scale(value, unit)
    return _number(value / divisor) + label


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of an account, with unit and origin.

    Parameters
    ----------
    name
        What it is, as a key: ``wall``, ``peak_rss``, ``energy_gpu0``.
    value, unit
        The number and its unit: ``s``, ``B``, ``J``, ``gCO2e``, ``FLOP``, ``rows``, ``share``.
    how
        ``measured``: a clock or a counter saw it. ``counted``: exact arithmetic on what was done.
        ``modelled``: a formula.
    low, high
        The interval, both or neither.
    source
        Which clock, counter or formula.

    Examples
    --------
    >>> print(Figure("energy", 41e3, "J", "modelled", 38e3, 45e3, "package power curve"))
    41 kJ (38-45 kJ), modelled: package power curve
    """

    name: str
    value: float
    unit: str
    how: How
    low: float | None = None
    high: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if self.how not in get_args(How):
            raise InputError(
                f"{self.name} has the origin {self.how!r}", hint="one of measured, counted and modelled is needed"
            )
        if not math.isfinite(self.value):
            raise InputError(f"{self.name} is {self.value}", hint="leave out a figure that is not known")
        if self.low is None and self.high is None:
            return
        if self.low is None or self.high is None or not self.low <= self.value <= self.high:
            raise InputError(
                f"{self.name} is {self.value} with the interval {self.low} to {self.high}",
                hint="give both ends, with the value between them",
            )

    def __str__(self) -> str:
        text = human(self.value, self.unit)
        if self.low is not None and self.high is not None:
            divisor, label = _scale(self.value, self.unit)
            # One unit for all three numbers, unless the ends lie too far apart to be read in it.
            near = self.low == 0 or self.low * 100 > self.value
            low = _number(self.low / divisor) if near else human(self.low, self.unit)
            text += f" ({low}-{_number(self.high / divisor)}{label})"
        return f"{text}, {self.how}" + (f": {self.source}" if self.source else "")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, ready for JSON."""
        return dataclasses.asdict(self)


def _ends(figure: Figure) -> tuple[float, float]:
    low = figure.value if figure.low is None else figure.low
    high = figure.value if figure.high is None else figure.high
    return low, high


def total(figures: Iterable[Figure], name: str) -> Figure:
    """Return the sum of figures of one unit; its origin is the weakest among them.

    Parameters
    ----------
    figures
        At least one figure, all of one unit.
    name
        The name of the sum.

    Examples
    --------
    >>> gpu = Figure("energy_gpu0", 900, "J", "measured", 850, 950, "NVML")
    >>> cpu = Figure("energy_process", 100, "J", "modelled", 40, 240, "5 W per busy core")
    >>> print(total([gpu, cpu], "energy"))
    1 kJ (0.89-1.19 kJ), modelled: NVML; 5 W per busy core
    """
    parts = list(figures)
    units = sorted({part.unit for part in parts})
    if len(units) != 1:
        raise InputError(f"{name} cannot be summed over the units {units}", hint="pass figures of one unit")
    bounded = any(part.low is not None for part in parts)
    ends = [_ends(part) for part in parts]
    value = math.fsum(part.value for part in parts)
    return Figure(
        name,
        value,
        units[0],
        max((part.how for part in parts), key=get_args(How).index),
        min(value, math.fsum(low for low, _ in ends)) if bounded else None,
        max(value, math.fsum(high for _, high in ends)) if bounded else None,
        "; ".join(dict.fromkeys(part.source for part in parts if part.source)),
    )


def remainder(whole: Figure, parts: list[Figure]) -> Figure:
    """Return what is left of a figure without its parts, never below zero.

    The intervals of a model shrink with its parts, since one unknown coefficient is behind all of them. The errors of
    a counter add up, since every reading has one of its own.
    """
    sign = -1 if whole.how == "modelled" else 1
    value = max(0.0, whole.value - math.fsum(part.value for part in parts))
    if whole.low is None or whole.high is None:
        return dataclasses.replace(whole, value=value)
    ends = [_ends(part) for part in parts]
    down = whole.value - whole.low + sign * sum(p.value - low for p, (low, _) in zip(parts, ends, strict=True))
    up = whole.high - whole.value + sign * sum(high - p.value for p, (_, high) in zip(parts, ends, strict=True))
    return dataclasses.replace(whole, value=value, low=max(0.0, value - max(0.0, down)), high=value + max(0.0, up))
