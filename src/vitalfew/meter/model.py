"""Energy without a counter: nominal watts, always with an interval and always with the coefficients printed."""

from __future__ import annotations

from dataclasses import dataclass

from vitalfew.core.errors import InputError
from vitalfew.meter.figure import Figure

__all__ = ["BUSY_CORE", "GPU_SHARE", "IDLE_CORE", "Power", "Watts"]


@dataclass(frozen=True, slots=True)
class Watts:
    """Nominal watts with an interval of at least a factor of two.

    Examples
    --------
    >>> print(Watts(2, 5, 12))
    5 W (2-12 W)
    """

    low: float
    nominal: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.nominal <= self.high or self.high < 2 * self.low:
            raise InputError(
                f"{self.low} to {self.high} W around {self.nominal} W is no honest guess",
                hint="without a counter the ends lie a factor of two apart or more",
            )

    def __mul__(self, factor: float) -> Watts:
        return Watts(self.low * factor, self.nominal * factor, self.high * factor)

    def __str__(self) -> str:
        return f"{self.nominal:.3g} W ({self.low:.3g}-{self.high:.3g} W)"


# Per logical core. Nominal package power over the number of cores lies near 2 W for many-core Arm servers, 4 to 8 W for
# x86 servers, and up to 12 W for desktops; the nominal value is the geometric middle. At rest, published idle powers of
# servers and cloud instances come to some tenths of a watt up to two per core.
BUSY_CORE = Watts(2.0, 5.0, 12.0)
IDLE_CORE = Watts(0.2, 0.7, 2.0)
# Of the power limit of a GPU: from a card at rest to one at its limit.
GPU_SHARE = Watts(0.1, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Power:
    """Watts that flow all the time, and watts that flow per busy core.

    Both terms are linear, so the parts of a scope add up to the whole.

    Parameters
    ----------
    always
        Watts over the wall time, if any.
    busy
        Watts over the CPU time of the process, if any.
    note
        What the coefficients stand on.

    Examples
    --------
    >>> power = Power(busy=Watts(2, 5, 12), note="per busy core")
    >>> print(power.energy("energy_process", wall=10, cpu=4, why="no counter"))
    20 J (8-48 J), modelled: busy 5 W (2-12 W), per busy core; no counter
    """

    always: Watts | None = None
    busy: Watts | None = None
    note: str = ""

    def energy(self, name: str, *, wall: float, cpu: float, why: str) -> Figure:
        """Return the joules over ``wall`` seconds with ``cpu`` seconds of CPU time, and why they are modelled."""
        terms = [(label, w, s) for label, w, s in (("always", self.always, wall), ("busy", self.busy, cpu)) if w]
        joules = [sum(end * s for end, s in ends) for ends in zip(*(_ends(w, s) for _, w, s in terms), strict=True)]
        low, value, high = joules or (0.0, 0.0, 0.0)
        source = ", ".join([*(f"{label} {w}" for label, w, _ in terms), *([self.note] if self.note else [])])
        return Figure(name, value, "J", "modelled", low, high, f"{source}; {why}" if why else source)


def _ends(watts: Watts, seconds: float) -> tuple[tuple[float, float], ...]:
    return (watts.low, seconds), (watts.nominal, seconds), (watts.high, seconds)
