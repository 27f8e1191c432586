from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitalfew.core import Profile, profile

IDS = st.integers(-5, 25)
WINDOWS = st.lists(st.lists(IDS, max_size=40), max_size=6)


def make(counts, **changes):
    counts = np.asarray(counts, float)
    values = {"ids": np.arange(len(counts)), "total": counts.sum(), "windows": counts[None]} | changes
    return Profile("items", values["ids"], counts, values["total"], values["windows"])


@given(WINDOWS)
def test_counts_are_those_of_a_counter(windows):
    truth = Counter(chain.from_iterable(windows))
    p = profile(iter(windows), name="rows")
    assert p.ids.dtype == np.int64
    assert p.ids.tolist() == sorted(truth)
    assert dict(zip(p.ids.tolist(), p.counts.tolist(), strict=True)) == truth
    assert (p.name, p.total, p.error, p.exact) == ("rows", truth.total(), 0.0, True)
    assert p.windows.shape == (len(windows), len(truth)) or not windows
    for row, window in zip(p.windows, windows, strict=False):
        assert Counter(dict(zip(p.ids.tolist(), row.tolist(), strict=True))) == Counter(window)


@given(WINDOWS)
def test_where_the_windows_are_cut_does_not_change_the_counts(windows):
    whole = profile([list(chain.from_iterable(windows))])
    cut = profile(windows)
    assert whole.ids.tolist() == cut.ids.tolist()
    assert whole.counts.tolist() == cut.counts.tolist() == cut.windows.sum(axis=0).tolist()


def test_any_kind_of_whole_numbers_in_any_shape_will_do():
    for kind in (np.int8, np.uint16, np.int32, np.uint64, np.int64):
        p = profile([np.array([[3, 1], [1, 0]], kind)])
        assert (p.ids.tolist(), p.counts.tolist()) == ([0, 1, 3], [1, 2, 1])


@given(WINDOWS, st.integers(1, 12))
def test_a_sketch_is_never_above_the_truth_and_never_more_than_its_error_below(windows, capacity):
    truth = Counter(chain.from_iterable(windows))
    p = profile(windows, capacity=capacity)
    kept = dict(zip(p.ids.tolist(), p.counts.tolist(), strict=True))
    slack = 1e-9 * (truth.total() + 1)
    assert len(kept) <= capacity
    assert kept.keys() <= truth.keys()
    for item, count in truth.items():
        assert -slack <= count - kept.get(item, 0.0) <= p.error + slack
    assert p.total == truth.total()
    assert p.error <= (truth.total() - sum(kept.values())) / (capacity + 1) + slack
    assert np.allclose(p.windows.sum(axis=0), p.counts)
    assert (p.windows >= 0).all()
    assert p.exact == (p.error == 0) == (sum(kept.values()) == pytest.approx(truth.total(), abs=slack))


@given(WINDOWS)
def test_a_sketch_that_holds_all_ids_is_exact(windows):
    distinct = len(set(chain.from_iterable(windows)))
    assert profile(windows, capacity=max(distinct, 1)).exact


def test_a_sketch_finds_the_heavy_ids_of_a_long_tail():
    rng = np.random.default_rng(0)
    windows = [rng.zipf(1.4, 20_000) % 100_000 for _ in range(5)]
    truth = Counter(np.concatenate(windows).tolist())
    p = profile(windows, capacity=500)
    heavy = {item for item, count in truth.items() if count > p.error}
    assert heavy <= set(p.ids.tolist())
    assert len(heavy) > 50


@given(WINDOWS, st.integers(1, 40))
def test_coverage_rises_from_nothing_to_all(windows, capacity):
    p = profile(windows, capacity=capacity)
    covered = [p.coverage(k) for k in range(len(p.ids) + 3)]
    assert covered[0] == 0
    assert covered == sorted(covered)
    assert covered[-1] == pytest.approx(p.counts.sum() / p.total if p.total else 0.0)
    gains = np.diff(covered)
    assert (gains[1:] <= gains[:-1] + 1e-12).all()


@given(WINDOWS, st.integers(0, 100))
def test_the_fewest_items_for_a_share(windows, percent):
    p = profile(windows)
    counts = sorted(Counter(chain.from_iterable(windows)).values(), reverse=True)
    fewest = next(k for k in range(len(counts) + 1) if 100 * sum(counts[:k]) >= percent * sum(counts))
    assert p.items_for(percent / 100) == fewest


def test_a_sketch_gives_all_it_has_when_a_share_is_out_of_reach():
    p = profile([[1, 1, 1, 2, 3]], capacity=1)
    assert (p.items_for(1.0), len(p.ids)) == (1, 1)
    assert profile([[1, 2, 3]], capacity=2).items_for(0.9) == 0


@given(st.lists(st.integers(0, 50), min_size=2, max_size=30).filter(sum))
def test_skew_is_half_the_relative_mean_difference(counts):
    n, mean = len(counts), sum(counts) / len(counts)
    gini = sum(abs(a - b) for a in counts for b in counts) / (2 * n * n * mean)
    assert make(counts).skew() == pytest.approx(gini, abs=1e-12)


@pytest.mark.parametrize(("counts", "skew"), [([], 0), ([5], 0), ([0, 0], 0), ([2, 2, 2, 2], 0), ([0, 0, 0, 8], 0.75)])
def test_skew_at_its_ends(counts, skew):
    assert make(counts).skew() == pytest.approx(skew, abs=1e-12)


@given(st.lists(st.lists(IDS, min_size=1, max_size=20), min_size=1, max_size=5))
def test_drift_is_the_distance_between_the_first_and_the_last_window(windows):
    first, last = Counter(windows[0]), Counter(windows[-1])
    distance = sum(abs(first[i] / first.total() - last[i] / last.total()) for i in first | last) / 2
    assert profile(windows).drift() == pytest.approx(distance, abs=1e-12)


@pytest.mark.parametrize(
    ("windows", "drift"),
    [([], 0), ([[1, 2]], 0), ([[1, 2], [2, 1]], 0), ([[1, 2], [3]], 1), ([[1], []], 0), ([[1, 2], [9], [2, 3]], 0.5)],
)
def test_drift_at_its_ends(windows, drift):
    assert profile(windows).drift() == drift


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=200), st.integers(2, 80))
def test_a_curve_rises_to_one(counts, points):
    curve = make(counts).curve(points)
    assert len(curve) <= points
    assert curve == sorted(curve)
    assert [work for _, work in curve] == sorted(work for _, work in curve)
    assert curve[-1] == (1.0, pytest.approx(1.0))
    assert all(work >= items - 1e-12 for items, work in curve)


def test_of_nothing_there_is_no_work():
    p = profile([])
    assert (p.coverage(3), p.items_for(0.5), p.curve(), p.skew(), p.drift(), p.total) == (0, 0, [], 0, 0, 0)
    assert p.ids.shape == p.counts.shape == (0,)


def test_profiles_compare_by_identity():
    p = profile([[1, 2]])
    assert p == p
    assert p != profile([[1, 2]])
    assert len({p, p}) == 1


@pytest.mark.parametrize(("ids", "kind"), [([0.5], "float64"), ([True], "bool"), (["a"], "<U1")])
def test_ids_are_whole_numbers(ids, kind, refuses):
    with refuses(kind):
        profile([[1, 2], ids])


def test_an_id_that_does_not_fit_is_not_wrapped(refuses):
    with refuses(2**63 + 5):
        profile([np.array([1, 2**63 + 5], np.uint64)])


def test_what_a_profile_is_asked_must_make_sense(refuses):
    p = profile([[1, 2]])
    with refuses(0):
        profile([[1]], capacity=0)
    with refuses(-1):
        p.coverage(-1)
    for share in (-0.1, 1.1, float("nan")):
        with refuses(share):
            p.items_for(share)
