from __future__ import annotations

import datetime as dt

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitalfew.core.errors import InputError
from vitalfew.data import is_test, open_log, time_cutoff
from vitalfew.data._values import times
from vitalfew.data.split import _TimeSample


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_the_later_slice_is_the_share(parquet, share):
    values = np.random.default_rng(0).permutation(1000)
    cutoff, exact = time_cutoff(parquet({"t": values}), "t", share)
    assert exact
    assert (values > cutoff).sum() == round(share * 1000)


def test_rows_of_one_time_stay_together_and_no_slice_is_empty(parquet):
    assert time_cutoff(parquet({"t": [1] + [2] * 99}), "t", 0.2) == (1, True)
    assert time_cutoff(parquet({"t": [1] * 99 + [2]}), "t", 0.2) == (1, True)
    with pytest.raises(InputError, match="the time `t` is 7 in every row"):
        time_cutoff(parquet({"t": [7, 7]}), "t")
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="test_share must lie between 0 and 1"):
            time_cutoff(parquet({"t": [1, 2]}), "t", share)


def test_times_of_a_text_file(write):
    log = open_log(write("t,x\n" + "".join(f"2024-01-{day:02}T10:00:00Z,1\n" for day in range(1, 11))))
    cutoff, _ = time_cutoff(log, "t", 0.1)
    assert cutoff == int(dt.datetime(2024, 1, 9, 10, tzinfo=dt.UTC).timestamp() * 1e6)


def test_every_kind_of_time_keeps_its_order():
    aware = [dt.datetime(2024, 5, 31, 12, 0, second, tzinfo=dt.UTC) for second in (1, 3, 2)]
    micro = [int(stamp.timestamp() * 1e6) for stamp in aware]
    stamps = [stamp.replace(tzinfo=None) for stamp in aware]
    for array in (
        pa.array(stamps),
        pa.array(stamps, pa.timestamp("ns")),
        pa.array(stamps, pa.timestamp("s", "Europe/Zurich")),
        pa.array([str(stamp) for stamp in stamps]),
        pa.array([f"{stamp}Z" for stamp in stamps]),
        pa.array([value / 1e6 for value in micro]),
        pa.array([str(stamp) for stamp in stamps]).dictionary_encode(),
        pa.array(micro),
    ):
        assert times(array, "t").tolist() == micro
    assert times(pa.array([1], pa.date32()), "t").tolist() == [86_400_000_000]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (pa.array([1, None]), "the time `t` is missing in row 12"),
        (pa.array([1.0, float("nan")]), "the time `t` is missing in row 12"),
        (pa.array([1.0, float("inf")]), "the time `t` holds inf in row 12"),
        (pa.array(["2024-01-01", "noon"]), "holds text that is no ISO time.*noon"),
        (pa.array([2**64 - 1], pa.uint64()), "holds a number above 2.63"),
        (pa.array([[1]]), "the time `t` is list"),
    ],
)
def test_wrong_times(array, message):
    with pytest.raises(InputError, match=message):
        times(array, "t", first_row=10)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40))
def test_a_long_log_is_sampled_evenly(sizes):
    sample = _TimeSample(100, 20)
    stream = np.arange(sum(sizes))
    for chunk in np.split(stream, np.cumsum(sizes)[:-1]):
        sample.add(chunk)
    assert sample.exact == (len(stream) <= 100)
    values = sample.values()
    assert len(values) == (len(stream) if sample.exact else 20)
    assert np.isin(values, stream).all()
    assert np.unique(values).size == len(values)


def test_the_sample_is_uniform():
    sample = _TimeSample(10_000, 10_000)
    for start in range(0, 200_000, 5_000):
        sample.add(np.arange(start, start + 5_000))
    quantiles = np.quantile(sample.values(), [0.2, 0.5, 0.8]) / 200_000
    assert np.abs(quantiles - [0.2, 0.5, 0.8]).max() < 0.02


def test_random_slices_depend_on_seed_and_row_only():
    rows = np.arange(100_000)
    held_back = is_test(rows, 0.2, seed=3)
    assert abs(held_back.mean() - 0.2) < 0.01
    assert (is_test(rows[500:600], 0.2, seed=3) == held_back[500:600]).all()
    assert (is_test(rows, 0.2, seed=4) != held_back).mean() > 0.2
    assert not (held_back & ~is_test(rows, 0.3, seed=3)).any()
    with pytest.raises(InputError, match="seed must be 0 or more, got -1"):
        is_test(rows, 0.2, seed=-1)
