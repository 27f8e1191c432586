"""The exact LRU curve equals a plain LRU cache of every capacity."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiers.naive import naive_counts
from vitalfew.core import InputError
from vitalfew.data.synthetic import zipf_trace
from vitalfew.tiers.curves import MissCurve, lru_curve

BATCHES = st.lists(st.lists(st.integers(0, 12), max_size=9), max_size=15)


def flat(batches: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array([row for batch in batches for row in batch], np.int64)
    return ids, np.concatenate([[0], np.cumsum([len(batch) for batch in batches])]).astype(np.int64)


def plain(batches: list[list[int]], capacity: int) -> int:
    return naive_counts([list(dict.fromkeys(batch)) for batch in batches], capacity, "lru").misses


@settings(deadline=None, max_examples=500)
@given(BATCHES, st.sampled_from([1, 1_000_003, 2**37 - 1]))
def test_equals_a_plain_cache_of_every_capacity(batches: list[list[int]], factor: int) -> None:
    ids, offsets = flat(batches)
    curve = lru_curve(ids * factor, offsets)
    assert curve.distinct == len(set(ids.tolist()))
    assert curve.misses.tolist() == [plain(batches, capacity) for capacity in curve.capacities.tolist()]
    assert curve.misses_at(curve.distinct + 5) == plain(batches, curve.distinct + 5)


def test_equals_a_plain_cache_where_arrays_grow_and_the_time_line_fills_up() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 120, 400)
    ids = np.concatenate([zipf_trace(500, 12_000, 0.7), zipf_trace(9_000, int(sizes.sum()) - 12_000, 0.7)])
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    curve = lru_curve(ids * 2**27, offsets)
    assert curve.distinct > 4096
    batches = [list(dict.fromkeys(ids[a:b].tolist())) for a, b in itertools.pairwise(offsets)]
    for capacity in (0, 1, 63, 64, 65, 500, 2000, curve.distinct - 1, curve.distinct):
        assert curve.misses_at(capacity) == naive_counts(batches, capacity, "lru").misses


def test_one_id() -> None:
    curve = lru_curve([2**40] * 1000, range(0, 1001, 10))
    assert curve.misses.tolist() == [100, 1]
    assert (curve.uses, curve.distinct) == (100, 1)


@pytest.mark.parametrize("shift", [0, 27, 32, 40, 50])
def test_ids_that_share_their_low_bits_stay_apart(shift: int) -> None:
    ids = np.arange(5000) << shift
    assert lru_curve(np.tile(ids, 2), [0, 5000, 10_000]).misses[[0, 4999, 5000]].tolist() == [10_000, 5001, 5000]


@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]])
def test_nothing(offsets: list[int]) -> None:
    curve = lru_curve([], offsets)
    assert curve.misses.tolist() == [0]
    assert curve.misses_at(10) == 0


def test_other_integers_are_welcome() -> None:
    ids, offsets = np.array([1, 2, 1], np.uint8), np.array([0, 2, 3], np.int32)
    assert lru_curve(ids, offsets).misses.tolist() == lru_curve([1, 2, 1], [0, 2, 3]).misses.tolist() == [3, 3, 2]


@pytest.mark.parametrize(
    ("ids", "offsets", "value"),
    [
        ([1, -2], [0, 2], "-2"),
        ([1.5], [0, 1], "float64"),
        ([[1], [2]], [0, 2], "(2, 1)"),
        ([1, 2], [0, 1], "[0 1]"),
        ([1, 2], [1, 2], "[1 2]"),
        ([1, 2], [0, 2, 1, 2], "[0 2 1 2]"),
        ([1, 2], [], "[]"),
    ],
)
def test_bad_input_is_refused(ids: object, offsets: object, value: str) -> None:
    with pytest.raises(InputError) as caught:
        lru_curve(ids, offsets)
    assert value in caught.value.message
    assert caught.value.hint


def test_a_negative_capacity_is_refused() -> None:
    with pytest.raises(InputError, match="-1") as caught:
        MissCurve(np.array([3, 1])).misses_at(-1)
    assert caught.value.hint
