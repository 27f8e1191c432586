from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitalfew.core import Budget, parse_size

BYTES = {
    "B": 1,
    "KB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "TB": 1000**4,
    "KiB": 1024,
    "MiB": 1024**2,
    "GiB": 1024**3,
    "TiB": 1024**4,
}


@given(st.decimals(0, 10**15, places=3), st.sampled_from(sorted(BYTES)), st.sampled_from(["", " ", "  "]))
def test_a_size_is_read_exactly_in_any_case(number, unit, space):
    expected = int(number * Decimal(BYTES[unit]))
    for text in (f"{number}{space}{unit}", f" {number}{space}{unit.lower()} ", f"{number}{space}{unit.upper()}"):
        assert parse_size(text) == expected


def test_a_size_beyond_floating_point_stays_exact():
    assert parse_size("9007199254740993 B") == 2**53 + 1
    assert parse_size("1" + "0" * 400 + " B") == 10**400


@pytest.mark.parametrize(
    "text", ["", "MiB", "12", "-1 MiB", "1e3 MB", "1.2.3 MB", "1 PB", "1 M", "5 \u212aB", "5 k\u0131B"]
)
def test_what_is_no_size_is_refused(text, refuses):
    with refuses(repr(text)):
        parse_size(text)
    with refuses(repr(text)):
        Budget.of(text)


@given(st.integers(0, 10**12))
def test_a_whole_number_is_a_count(number):
    assert Budget.of(number) == Budget("count", number)
    assert Budget.of(np.int64(number)) == Budget("count", number)


@given(st.floats(0, 1))
def test_a_float_is_a_share(number):
    assert Budget.of(number) == Budget("share", number)
    assert Budget.of(np.float64(number)) == Budget("share", number)
    assert Budget.of(np.float32(number)).kind == "share"


def test_one_and_one_point_zero_differ():
    assert Budget.of(1).kind == "count"
    assert Budget.of(1.0).kind == "share"


@pytest.mark.parametrize(("text", "share"), [("10%", 0.1), (" 0.5 % ", 0.005), ("100%", 1.0), ("0%", 0.0)])
def test_a_percentage_is_a_share(text, share):
    assert Budget.of(text) == Budget("share", share)


def test_a_budget_is_its_own_budget():
    budget = Budget.cover(0.9)
    assert Budget.of(budget) is budget


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (True, "True"),
        (None, "None"),
        (np.True_, "True"),
        ([1], "[1]"),
        (1j, "1j"),
        (-1, "-1"),
        (-0.5, "-0.5"),
        (1.5, "1.5"),
        ("101%", "1.01"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_what_is_no_budget_is_refused(value, shown, refuses):
    with refuses(shown):
        Budget.of(value)


@pytest.mark.parametrize(
    ("kind", "value", "shown"),
    [
        ("share", 1.01, "1.01"),
        ("coverage", 1.01, "1.01"),
        ("count", 2.5, "2.5"),
        ("bytes", -1, "-1"),
        ("bytes", float("nan"), "nan"),
        ("rows", 3, "'rows'"),
    ],
)
def test_a_budget_made_by_hand_is_held_to_the_same(kind, value, shown, refuses):
    with refuses(shown):
        Budget(kind, value)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_coverage_lies_between_nothing_and_all(share, refuses):
    with refuses(share):
        Budget.cover(share)


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget.of(0.25), "0.25 of the items"),
        (Budget.of(7), "7 items"),
        (Budget.of("2 KiB"), "2048 bytes"),
        (Budget.cover(0.9), "the fewest items that do 90% of the work"),
        (Budget.cover(0.955), "the fewest items that do 95.5% of the work"),
        (Budget.cover(0.29), "the fewest items that do 29% of the work"),
    ],
)
def test_a_budget_says_what_it_is(budget, text):
    assert str(budget) == text
