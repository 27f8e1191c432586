"""Figures: their text, their checks, their sums."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitalfew.core.errors import InputError
from vitalfew.meter import Figure, human, total
from vitalfew.meter.figure import remainder


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "s", "0 s"),
        (0, "B", "0 B"),
        (12e-6, "s", "12 us"),
        (0.0015, "s", "1.5 ms"),
        (90, "s", "90 s"),
        (600, "s", "10 min"),
        (9000, "s", "2.5 h"),
        (1023, "B", "1,023 B"),
        (1024, "B", "1 KiB"),
        (3.5 * 2**30, "B", "3.5 GiB"),
        (999.9, "J", "1 kJ"),
        (2_500_000, "J", "2.5 MJ"),
        (1234, "gCO2e", "1.23 kgCO2e"),
        (3e12, "FLOP", "3 TFLOP"),
        (0.005, "share", "0.5 %"),
        (1_000_000, "rows", "1,000,000 rows"),
        (-2048, "B", "-2 KiB"),
        (5, "", "5"),
    ],
)
def test_human_text(value, unit, text):
    assert human(value, unit) == text


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["s", "B", "J", "FLOP", "share", "rows"]))
def test_any_number_has_a_text(value, unit):
    assert human(value, unit)


@pytest.mark.parametrize(
    "fields",
    [
        {"value": math.nan},
        {"value": math.inf},
        {"how": "guessed"},
        {"low": 1},
        {"high": 9},
        {"low": 6, "high": 9},
        {"low": 1, "high": 4},
        {"low": math.nan, "high": 9},
    ],
)
def test_a_figure_that_cannot_be_is_refused(fields):
    with pytest.raises(InputError):
        Figure(**{"name": "x", "value": 5, "unit": "J", "how": "measured", **fields})


def test_an_interval_far_from_its_value_keeps_its_own_unit():
    assert str(Figure("x", 2**30, "B", "measured", 2**20, 2**31)) == "1 GiB (1 MiB-2 GiB), measured"


def test_a_sum_is_as_sure_as_its_weakest_part():
    parts = [Figure("a", 1, "J", "counted"), Figure("b", 2, "J", "modelled", 1, 4, "m")]
    assert total(parts, "all") == Figure("all", 3, "J", "modelled", 2, 5, "m")
    assert total([*parts[:1], Figure("c", 1, "J", "measured")], "all").how == "counted"


def test_units_do_not_mix():
    with pytest.raises(InputError, match=r"\['B', 'J'\]"):
        total([Figure("a", 1, "J", "counted"), Figure("b", 1, "B", "counted")], "all")
    with pytest.raises(InputError):
        total([], "all")


def test_intervals_of_a_model_shrink_and_errors_of_a_counter_grow():
    model = remainder(Figure("x", 10, "J", "modelled", 4, 24), [Figure("x", 5, "J", "modelled", 2, 12)])
    counter = remainder(Figure("x", 10, "J", "measured", 9, 11), [Figure("x", 5, "J", "measured", 4, 6)])
    assert (model.low, model.value, model.high) == (2, 5, 12)
    assert (counter.low, counter.value, counter.high) == (3, 5, 7)
