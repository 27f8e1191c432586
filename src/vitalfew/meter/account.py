"""From two readings to figures, and from the figures of a scope to what it did itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vitalfew.meter.energy import Energy
from vitalfew.meter.figure import Figure, remainder
from vitalfew.meter.instruments import Reading

__all__ = ["NOT_ADDITIVE", "clocks_right", "exclusive", "inclusive"]

NOT_ADDITIVE = frozenset({"peak_rss", "rss_start"})
# Clocks of the system drift apart by less than this, and no suspension is shorter.
_SUSPENDED = 1.0


def _seconds(first: float, last: float) -> float | None:
    """Return the seconds between two readings, or None where the clock cannot be right."""
    seconds = last - first
    return seconds if 0 <= seconds < math.inf else None


def _spans(start: Reading, end: Reading) -> tuple[float | None, float | None, float | None]:
    """Return wall time, CPU time and that of children, each None where its clock cannot be right."""
    suspended = end.asleep - start.asleep > _SUSPENDED
    return (
        None if suspended else _seconds(start.wall, end.wall),
        _seconds(start.cpu, end.cpu),
        _seconds(start.cpu_children, end.cpu_children),
    )


def clocks_right(start: Reading, end: Reading) -> bool:
    """Return whether no clock went backwards and the machine was not suspended.

    Examples
    --------
    >>> def at(second): return Reading(wall=second, cpu=0, cpu_children=0, asleep=0, disk=None, energy=())
    >>> clocks_right(at(1), at(3)), clocks_right(at(3), at(1))
    (True, False)
    """
    return None not in _spans(start, end)


def inclusive(start: Reading, end: Reading, energy: Energy) -> list[Figure]:
    """Return the figures between two readings, without those of a clock that was not right.

    Examples
    --------
    >>> def at(second): return Reading(wall=second, cpu=0, cpu_children=0, asleep=0, disk=None, energy=())
    >>> [str(figure) for figure in inclusive(at(1), at(3), Energy([]))]
    ['2 s, measured: perf_counter', '0 s, measured: CPU time of the process, all threads']
    """
    wall, cpu, children = _spans(start, end)
    figures = []
    if wall is not None:
        figures.append(Figure("wall", wall, "s", "measured", source="perf_counter"))
    if cpu is not None:
        figures.append(Figure("cpu", cpu, "s", "measured", source="CPU time of the process, all threads"))
    if children:
        source = "CPU time of children that were waited for"
        figures.append(Figure("cpu_children", children, "s", "measured", source=source))
    if start.disk and end.disk:
        for name, first, last, verb in zip(("read", "written"), start.disk, end.disk, ("from", "to"), strict=True):
            source = f"bytes of the process {verb} storage; what the page cache serves is not among them"
            figures.append(Figure(name, max(0, last - first), "B", "measured", source=source))
    busy = None if cpu is None or children is None else cpu + children
    return figures + energy.figures(start.energy, end.energy, wall=wall, cpu=busy)


def exclusive(own: Mapping[str, Figure], parts: Sequence[Mapping[str, Figure]]) -> dict[str, Figure]:
    """Return what is left of the figures of a scope without those of the scopes inside it.

    A figure is left out where a part lacks it, or has it from another origin: their difference would mean nothing.

    Examples
    --------
    >>> whole, part = (Figure("wall", seconds, "s", "measured") for seconds in (5, 2))
    >>> print(exclusive({"wall": whole}, [{"wall": part}])["wall"])
    3 s, measured
    """
    left = {}
    for name, figure in own.items():
        found = [part[name] for part in parts if name in part]
        # A part that counted nothing counted zero, and children that nobody waited for used no time.
        complete = len(found) == len(parts) or figure.how == "counted" or name == "cpu_children"
        if name not in NOT_ADDITIVE and complete and all(part.how == figure.how for part in found):
            left[name] = remainder(figure, found)
    return left
