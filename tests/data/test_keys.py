from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitalfew.core.errors import InputError
from vitalfew.data.keys import cross, keys, kind_of

int64s = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(int64s | st.none()), st.integers(0, 2**32))
def test_numbers_differ_exactly_when_their_keys_do(values, seed):
    found, valid = keys(pa.array(values, pa.int64()), seed=seed)
    assert valid.tolist() == [value is not None for value in values]
    present = [value for value in values if value is not None]
    assert np.unique(found[valid]).size == len(set(present))


@given(st.lists(st.text(max_size=80) | st.none()), st.integers(0, 2**32))
def test_text_keys_do_not_depend_on_the_arrow_type(values, seed):
    array = pa.array(values, pa.string())
    found, valid = keys(array, seed=seed)
    assert valid.tolist() == [bool(value) for value in values]
    assert np.unique(found[valid]).size == len({value for value in values if value})
    padded = pa.concat_arrays([pa.array(["zzz"]), array, pa.array(["y", None])])
    others = [
        array.cast(pa.large_string()),
        array.cast(pa.binary()),
        array.cast(pa.string_view()),
        array.dictionary_encode(),
        padded.slice(1, len(array)),
        padded.dictionary_encode().slice(1, len(array)),
        pa.chunked_array([array[: len(values) // 2], array[len(values) // 2 :]], pa.string()),
    ]
    for other in others:
        other_keys, other_valid = keys(other, seed=seed)
        assert (other_valid == valid).all()
        assert (other_keys[valid] == found[valid]).all()


@pytest.mark.parametrize(
    ("text", "key"),
    # Published test values of XXH64 with seed 0; the longest takes the path of 32 bytes at a time.
    [
        ("a", 0xD24EC4F1A98C6E5B),
        ("abc", 0x44BC2CF5AD770999),
        ("Nobody inspects the spammish repetition", 0xFBCEA83C8A378BF1),
    ],
)
def test_text_keys_are_xxh64(text, key):
    assert int(keys(pa.array([text]))[0][0]) == key


@pytest.mark.parametrize("kind", [pa.int8(), pa.int32(), pa.uint16(), pa.uint64(), pa.float64(), pa.decimal128(9, 0)])
def test_whole_numbers_agree_whatever_their_width(kind):
    expected, _ = keys(pa.array([0, 7, None, 100], pa.int64()))
    found, valid = keys(pa.array([0, 7, None, 100], kind))
    assert valid.tolist() == [True, True, False, True]
    assert (found[valid] == expected[valid]).all()


def test_truth_values_and_dates():
    assert (keys(pa.array([True, False]))[0] == keys(pa.array([1, 0]))[0]).all()
    day = pa.array([1], pa.date32())
    assert (keys(day)[0] == keys(day.cast(pa.timestamp("ns")))[0]).all()


def test_fractions_lists_and_nulls():
    with pytest.raises(InputError, match=r"`x` holds 0\.5, which is no whole number"):
        keys(pa.array([1.0, None, 0.5]), column="x")
    with pytest.raises(InputError, match="`x` is list<item: int64>, which cannot be categorical"):
        keys(pa.array([[1]]), column="x")
    assert not keys(pa.nulls(3))[1].any()
    assert not keys(pa.array([float("nan")]))[1].any()
    assert not keys(pa.array([None, None], pa.dictionary(pa.int8(), pa.string())))[1].any()
    assert keys(pa.array([], pa.string()))[0].size == 0
    assert kind_of(pa.struct([("a", pa.int8())])) == ""


def test_bits_are_spread_evenly():
    for array in (pa.array(range(100_000)), pa.array([f"user{i}" for i in range(100_000)])):
        found, _ = keys(array)
        bits = np.unpackbits(found.view(np.uint8).reshape(-1, 8), axis=1).mean(axis=0)
        assert np.abs(bits - 0.5).max() < 0.01
        # The low bits choose the slot of a table: 1024 bins of about 98 each.
        assert np.bincount((found & np.uint64(1023)).astype(np.int64)).max() < 160


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1))
def test_crosses_differ_exactly_when_a_part_does(pairs):
    left, right = (keys(pa.array(part))[0] for part in zip(*pairs, strict=True))
    assert np.unique(cross([left, right])).size == len(set(pairs))
    swapped = cross([right, left]) == cross([left, right])
    assert swapped.tolist() == [a == b for a, b in pairs]


def test_keys_are_the_same_in_every_process():
    program = (
        "import pyarrow as pa; from vitalfew.data.keys import keys;"
        "print(*keys(pa.array(['ann', 'bob']), seed=3)[0], *keys(pa.array([1, 2]), seed=3)[0])"
    )
    run = [
        subprocess.run([sys.executable, "-c", program], env={"PYTHONHASHSEED": s}, capture_output=True, check=True)
        for s in ("1", "2")
    ]
    assert run[0].stdout == run[1].stdout
    here = [*keys(pa.array(["ann", "bob"]), seed=3)[0], *keys(pa.array([1, 2]), seed=3)[0]]
    assert run[0].stdout.decode().split() == [str(key) for key in here]
