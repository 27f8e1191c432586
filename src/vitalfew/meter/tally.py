"""Counts that the caller makes: amounts under a name, each name with one unit."""

from __future__ import annotations

import math
import threading

from vitalfew.core.errors import InputError
from vitalfew.meter.figure import Figure

__all__ = ["RESERVED", "Tally"]

RESERVED = frozenset({"wall", "cpu", "cpu_children", "read", "written", "peak_rss", "rss_start"})


class Tally:
    """Amounts by name, added up from any thread.

    Parameters
    ----------
    units
        The unit of each name, shared by all tallies that are added up in the end.

    Examples
    --------
    >>> tally = Tally({})
    >>> tally.add("sent", 4096, "B")
    >>> [str(figure) for figure in tally.figures()]
    ['4 KiB, counted']
    """

    def __init__(self, units: dict[str, str]) -> None:
        self.units = units
        self._amounts: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, name: str, amount: float, unit: str) -> None:
        """Add an amount, zero or more."""
        if not (math.isfinite(amount) and amount >= 0):
            raise InputError(f"{name} cannot be counted up by {amount}", hint="pass zero or more")
        if not name or name in RESERVED or name.startswith("energy_"):
            raise InputError(f"a count cannot have the name {name!r}", hint="use one that no other figure has")
        known = self.units.setdefault(name, unit)
        if known != unit:
            raise InputError(f"{name} is counted in {known}, not in {unit}", hint="keep to one unit per name")
        self._add(name, amount)

    def take(self, part: Tally) -> None:
        """Add all that a part counted."""
        for name, amount in part._amounts.items():
            self._add(name, amount)

    def _add(self, name: str, amount: float) -> None:
        with self._lock:
            self._amounts[name] = self._amounts.get(name, 0) + amount

    def figures(self) -> list[Figure]:
        """Return the counts."""
        return [Figure(name, amount, self.units[name], "counted") for name, amount in self._amounts.items()]
