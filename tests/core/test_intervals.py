from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vitalfew.core.intervals import Interval, mean_interval, pairs_needed, student_quantile

CONFIDENCES = st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99, 0.999])
VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=12)


@given(st.floats(0.501, 0.9999), st.integers(1, 300))
def test_the_quantile_is_that_of_scipy(p, df):
    assert student_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-8)


@pytest.mark.parametrize(("p", "df"), [(0.5, 3), (1.0, 3), (0.2, 3), (float("nan"), 3), (0.9, 0)])
def test_a_quantile_needs_a_probability_and_two_values(p, df, refuses):
    with refuses(f"got {p} and {df}"):
        student_quantile(p, df)


@given(VALUES, CONFIDENCES)
def test_the_interval_is_that_of_scipy(values, confidence):
    mean, error = np.mean(values), stats.sem(values)
    found = mean_interval(values, confidence)
    low, high = stats.t.interval(confidence, len(values) - 1, mean, error) if error else (mean, mean)
    assert found.mean == pytest.approx(mean, rel=1e-9, abs=1e-9)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-7, abs=1e-9)


def test_one_value_says_nothing_about_the_spread():
    assert mean_interval([3.0], 0.95) == Interval(3.0, -math.inf, math.inf)


@given(VALUES, st.floats(0.01, 200), CONFIDENCES)
def test_the_pairs_needed_are_the_fewest_that_fit_the_room(values, room, confidence):
    sizes = np.arange(2, 1001)
    half = stats.t.ppf((1 + confidence) / 2, sizes - 1) * np.std(values, ddof=1) / np.sqrt(sizes)
    found = pairs_needed(values, room, confidence)
    surely, maybe = sizes[half <= room * (1 - 1e-9)], sizes[half <= room * (1 + 1e-9)]
    assert found in {int(fit[0]) if len(fit) else None for fit in (surely, maybe)}


def test_no_number_of_pairs_is_named_when_none_would_do():
    assert pairs_needed([1.0, 2.0], 0.0, 0.95) is None
    assert pairs_needed([1.0, 2.0], -1.0, 0.95) is None
    assert pairs_needed([1.0], 1.0, 0.95) is None
    assert pairs_needed([0.0, 100.0], 0.001, 0.95) is None
    assert pairs_needed([0.0, 100.0], 10.0, 0.95, most=50) is None
    assert pairs_needed([1.0, 1.0], 0.001, 0.95) == 2
