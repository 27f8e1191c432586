"""Grams by hand, and intensities that cannot be."""

from __future__ import annotations

import math

import pytest

from vitalfew.core.errors import InputError
from vitalfew.meter import Figure, Intensity, emissions

GRID = Intensity(250, "by hand")


def test_grams_by_hand():
    # 7.2 MJ are 2 kWh; at 250 g each that is 500 g.
    carbon = emissions(Figure("energy_gpu0", 7.2e6, "J", "measured", 3.6e6, 14.4e6, "counter"), GRID)
    assert (carbon.value, carbon.low, carbon.high) == (500, 250, 1000)
    assert (carbon.name, carbon.unit, carbon.how) == ("carbon_gpu0", "gCO2e", "modelled")
    assert carbon.source == "counter; 250 gCO2e/kWh (by hand)"


@pytest.mark.parametrize("how", ["measured", "counted", "modelled"])
def test_carbon_is_never_better_than_modelled(how):
    carbon = emissions(Figure("energy", 3.6e6, "J", how), GRID)
    assert (carbon.how, carbon.value, carbon.low, carbon.high) == ("modelled", 250, None, None)


def test_no_carbon_is_an_amount():
    assert emissions(Figure("energy", 1e6, "J", "measured"), Intensity(0, "own solar roof")).value == 0


def test_only_energy_has_emissions():
    with pytest.raises(InputError, match="in s, not in J"):
        emissions(Figure("wall", 1, "s", "measured"), GRID)


@pytest.mark.parametrize(
    ("grams", "hint"),
    [
        (-1, "zero or more"),
        (math.nan, "zero or more"),
        (math.inf, "zero or more"),
        (True, "zero or more"),
        ("380", "zero or more"),
        (0.38, "kg per kWh, write 380"),
        (380_000, "per MWh, write 380"),
    ],
)
def test_an_intensity_in_another_unit_is_refused_with_a_hint(grams, hint):
    with pytest.raises(InputError) as caught:
        Intensity(grams, "grid")
    assert hint in caught.value.hint


def test_an_intensity_needs_a_source():
    with pytest.raises(InputError, match="source"):
        Intensity(380, " ")
