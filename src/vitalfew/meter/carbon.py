"""Carbon: energy times an intensity that the user gives. Nothing is looked up and no average is assumed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vitalfew.core.errors import InputError
from vitalfew.meter.figure import Figure

__all__ = ["Intensity", "emissions"]

_JOULES_PER_KWH = 3.6e6
# No grid and no power plant comes near: such a number is in another unit.
_MAX_GRAMS = 3000.0


@dataclass(frozen=True, slots=True)
class Intensity:
    """How much carbon a kilowatt-hour costs, and who says so.

    Parameters
    ----------
    grams_per_kwh
        In gCO2e per kWh; coal is near 1000, hydropower near 10.
    source
        Where the number is from: the grid operator, the year, the contract.

    Examples
    --------
    >>> print(Intensity(380, "grid operator, 2024 average"))
    380 gCO2e/kWh (grid operator, 2024 average)
    """

    grams_per_kwh: float
    source: str

    def __post_init__(self) -> None:
        grams = self.grams_per_kwh
        if isinstance(grams, bool) or not isinstance(grams, int | float) or not math.isfinite(grams) or grams < 0:
            raise InputError(f"an intensity of {grams!r} is no amount", hint="give gCO2e per kWh, zero or more")
        if grams > _MAX_GRAMS:
            raise InputError(
                f"an intensity of {grams} gCO2e/kWh is above any grid's",
                hint=f"if it is per MWh, write {grams / 1000:g}",
            )
        if 0 < grams < 1:
            raise InputError(
                f"an intensity of {grams} gCO2e/kWh is below any grid's",
                hint=f"if it is in kg per kWh, write {grams * 1000:g}",
            )
        if not self.source.strip():
            raise InputError("an intensity needs its source", hint='such as source="grid operator, 2024 average"')

    def __str__(self) -> str:
        return f"{self.grams_per_kwh:g} gCO2e/kWh ({self.source})"


def emissions(energy: Figure, intensity: Intensity) -> Figure:
    """Return the carbon behind an energy figure, with its interval.

    The origin is ``modelled`` whatever that of the energy is: an intensity is an average over plants and time.

    Parameters
    ----------
    energy
        A figure in J.
    intensity
        What a kilowatt-hour costs.

    Examples
    --------
    >>> energy = Figure("energy_gpu0", 3.6e6, "J", "measured", source="NVML")
    >>> print(emissions(energy, Intensity(380, "grid operator, 2024 average")))
    380 gCO2e, modelled: NVML; 380 gCO2e/kWh (grid operator, 2024 average)
    """
    if energy.unit != "J":
        raise InputError(f"{energy.name} is in {energy.unit}, not in J", hint="pass a figure of energy")

    def grams(joules: float) -> float:
        return joules / _JOULES_PER_KWH * intensity.grams_per_kwh

    return Figure(
        f"carbon_{energy.name.removeprefix('energy_')}",
        grams(energy.value),
        "gCO2e",
        "modelled",
        None if energy.low is None else grams(energy.low),
        None if energy.high is None else grams(energy.high),
        f"{energy.source}; {intensity}" if energy.source else str(intensity),
    )
