from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitalfew.core.errors import InputError
from vitalfew.data import Direct, Hashed, Vocabulary, VocabularyBuilder

key_lists = st.lists(st.tuples(st.integers(0, 30) | st.integers(0, 2**64 - 1), st.booleans()), max_size=200)


def arrays(pairs):
    return np.array([key for key, _ in pairs], np.uint64), np.array([valid for _, valid in pairs], np.bool_)


def build(pairs, min_count=1):
    builder = VocabularyBuilder()
    builder.add(*arrays(pairs))
    return builder.finish(min_count)


@given(key_lists, st.integers(1, 4))
def test_counts_are_those_of_numpy(pairs, min_count):
    keys, valid = arrays(pairs)
    distinct, counts = np.unique(keys[valid], return_counts=True)
    kept = counts >= min_count
    vocabulary = build(pairs, min_count)
    assert sorted(vocabulary.keys.tolist()) == distinct[kept].tolist()
    assert (vocabulary.counts[vocabulary.rows(distinct, np.ones(len(distinct), np.bool_))][kept] == counts[kept]).all()
    assert int(vocabulary.counts.sum()) == len(pairs)
    assert (np.diff(vocabulary.counts[1:].astype(np.int64)) <= 0).all()
    rows = vocabulary.rows(keys, valid)
    assert (np.bincount(rows, minlength=vocabulary.num_rows) == vocabulary.counts).all()


@given(key_lists, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(pairs, random):
    shuffled = random.sample(pairs, len(pairs))
    one, other = build(pairs), build(shuffled)
    assert (one.keys == other.keys).all()
    assert (one.counts == other.counts).all()


def test_a_table_grows_and_forgets_nothing():
    keys = np.random.default_rng(0).integers(0, 2**64, 300_000, np.uint64)
    builder = VocabularyBuilder()
    for part in np.array_split(keys, 7):
        builder.add(part, np.ones(len(part), np.bool_))
    vocabulary = builder.finish()
    assert vocabulary.num_rows == np.unique(keys).size + 1
    rows = vocabulary.rows(keys, np.ones(len(keys), np.bool_))
    assert (vocabulary.keys[rows - 1] == keys).all()


def test_arrays_round_trip():
    vocabulary = build([(5, True), (5, True), (6, False)])
    again = Vocabulary.from_arrays(vocabulary.arrays())
    assert again.rows(*arrays([(5, True), (6, True)])).tolist() == [1, 0]
    with pytest.raises(InputError, match="not those of a vocabulary"):
        Vocabulary.from_arrays({"keys": vocabulary.keys, "counts": vocabulary.keys})
    with pytest.raises(InputError, match="min_count must be 1 or more, got 0"):
        build([], min_count=0)


@given(st.lists(st.integers(0, 2**64 - 1)), st.integers(2, 2**33), st.integers(0, 2**32))
def test_hashed_rows_are_in_range(keys, num_rows, seed):
    pairs = [(key, True) for key in keys] + [(1, False)]
    rows = Hashed(num_rows, seed).rows(*arrays(pairs))
    assert rows[-1] == 0
    assert ((rows[:-1] >= 1) & (rows[:-1] < num_rows)).all()
    assert (Hashed(num_rows, seed).rows(*arrays(pairs)) == rows).all()


def test_hashed_rows_are_spread_evenly_and_follow_the_seed():
    keys, valid = np.arange(100_000, dtype=np.uint64), np.ones(100_000, np.bool_)
    rows = Hashed(101, 1).rows(keys, valid)
    counts = np.bincount(rows, minlength=101)[1:]
    assert 850 < counts.min() <= counts.max() < 1150
    assert (rows != Hashed(101, 2).rows(keys, valid)).mean() > 0.9
    with pytest.raises(InputError, match="2 rows or more, got 1"):
        Hashed(1)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, -1], "`user` holds the id -1, which is no row number; drop --direct"),
        ([2**40], r"`user` holds the id 1099511627776; used as a row number it needs a table of 1.1e12 rows; drop"),
        ([2**63 - 1], "table of 9.2e18 rows"),
        ([5], "holds the id 5, but its table has 5 rows"),
    ],
)
def test_ids_that_are_no_rows(ids, message):
    with pytest.raises(InputError, match=message):
        Direct(5).rows(np.array(ids), np.ones(len(ids), np.bool_), column="user")


def test_direct_ids():
    assert Direct(5).rows(np.array([4, 0]), np.ones(2, np.bool_)).tolist() == [4, 0]
    assert Direct.needed(np.array([], np.int64), np.array([], np.bool_)) == 0
    with pytest.raises(InputError, match="`user` has a missing value"):
        Direct(5).rows(np.array([0]), np.array([False]), column="user")
