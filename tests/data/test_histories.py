"""Histories equal a plain list per user, whatever the rows are cut into."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitalfew.core.errors import InputError
from vitalfew.data import Batches, Column, Encoded, Encoder, Histories, Schema, write_log

N, LENGTH = 400, 3


def columns(n=N):
    rng = np.random.default_rng(4)
    return {
        "click": rng.integers(0, 2, n),
        "user": [f"u{i}" if i else None for i in rng.integers(0, 12, n)],
        "item": [f"i{i}" for i in rng.integers(0, 30, n)],
        "price": rng.normal(size=n),
        "at": np.sort(rng.integers(1, 100, n)),
    }


KINDS = {"click": "label", "user": "categorical", "item": "categorical", "price": "numeric", "at": "time"}


def schema(**kinds):
    return Schema(tuple(Column(name, kind) for name, kind in (KINDS | kinds).items()))


@pytest.fixture
def encoder(parquet):
    return Encoder.fit(parquet(columns()), schema())


@pytest.fixture
def rows(parquet, encoder):
    return encoder.encode(next(parquet(columns()).batches()))


def by_lists(rows, user=0):
    """Ids and dense inputs with a list of each user's clicks, in plain Python."""
    seen, ids, dense = {}, [], []
    for i in range(len(rows)):
        who = int(rows.ids[i, user])
        mine = [click for click in seen.get(who, [])[-LENGTH:] if who and click[2] < rows.time[i]]
        empty = [(np.zeros(rows.ids.shape[1], np.int64), np.zeros(rows.dense.shape[1]))] * (LENGTH - len(mine))
        items = [*empty, *mine, (rows.ids[i], rows.dense[i])]
        ids.append(np.concatenate([item[0] for item in items]))
        dense.append(np.concatenate([item[1] for item in items]))
        if rows.label[i] == 1:
            seen.setdefault(who, []).append((rows.ids[i], rows.dense[i], rows.time[i]))
    return np.array(ids), np.array(dense, np.float32)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, N), max_size=4))
def test_histories_are_the_latest_clicks_of_the_user(encoder, rows, cuts):
    histories = Histories(encoder, "user", LENGTH)
    edges = [0, *sorted(cuts), N]
    wide = Encoded.concat([histories.widen(rows.take(np.arange(a, b))) for a, b in pairwise(edges)])
    ids, dense = by_lists(rows)
    assert np.array_equal(wide.ids, ids)
    assert np.array_equal(wide.dense, dense)
    assert np.array_equal(wide.label, rows.label)
    assert (rows.ids[:, 0] == 0).any(), "some users are unknown"


def test_without_times_the_order_of_the_rows_counts(encoder, rows):
    wide = Histories(encoder, "user", LENGTH).widen(replace(rows, time=None))
    later = Histories(encoder, "user", LENGTH).widen(replace(rows, time=np.arange(N)))
    assert np.array_equal(wide.ids, later.ids)
    assert not np.array_equal(wide.ids, Histories(encoder, "user", LENGTH).widen(rows).ids), "some come at once"


def test_rows_without_labels_leave_histories_as_they_are(encoder, rows):
    histories = Histories(encoder, "user", LENGTH)
    histories.widen(rows.take(np.arange(300)))
    asked = Encoded(rows.dense[300:], rows.ids[300:])
    one, other = histories.widen(asked), histories.widen(asked)
    assert np.array_equal(one.ids, other.ids)
    assert one.label is None


def test_a_log_with_histories_on_disk(parquet, encoder, rows, tmp_path):
    cutoff = int(rows.time[300])
    train, test = write_log(
        tmp_path / "encoded", parquet(columns()), encoder, cutoff=cutoff, histories=Histories(encoder, "user", LENGTH)
    )
    ids, dense = by_lists(rows)
    assert (train.items, train.features, train.num_dense) == (LENGTH + 1, ("user", "item"), 1)
    assert np.array_equal(train.block(0, len(train)).ids, ids[: len(train)])
    assert np.array_equal(test.block(5, 9).dense, dense[len(train) :][5:9])
    some = np.array([7, 3, 3])
    assert np.array_equal(train.rows(some).ids, ids[some])
    assert np.array_equal(train.rows(some).dense, dense[some])
    seen = np.concatenate([batch.ids for batch in Batches(train, 64, block_rows=80).epoch(0)])
    assert np.array_equal(np.sort(seen, 0), np.sort(ids[: len(train)], 0))


def test_they_are_saved_with_the_encoder(encoder, rows, tmp_path):
    histories = Histories(encoder, "user", LENGTH)
    histories.widen(rows)
    histories.save(tmp_path)
    asked = Encoded(rows.dense, rows.ids)
    again = Histories.load(tmp_path, encoder, "user", LENGTH)
    assert np.array_equal(again.widen(asked).ids, histories.widen(asked).ids)
    assert again.nbytes == histories.nbytes
    path = tmp_path / "histories.npz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="cannot be read"):
        Histories.load(tmp_path, encoder, "user", LENGTH)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        Histories.load(tmp_path, encoder, "user", LENGTH)


def test_bad_input_is_refused(parquet, encoder, rows):
    with pytest.raises(InputError, match="got 0"):
        Histories(encoder, "user", 0)
    with pytest.raises(InputError, match="no feature `price`"):
        Histories(encoder, "price", 2)
    histories = Histories(encoder, "user", 2)
    histories.widen(rows.take(np.arange(200, 250)))
    with pytest.raises(InputError, match=f"{rows.time[0]} comes after {rows.time[249]}"):
        histories.widen(rows.take(np.arange(2)))
    with pytest.raises(InputError, match="not in the order of time"):
        Histories(encoder, "user", 2).widen(rows.take(np.array([300, 5])))
    numbers = columns() | {"item": np.arange(N) % 30}
    direct = Encoder.fit(parquet(numbers, "direct.parquet"), schema(), direct=("item",))
    with pytest.raises(InputError, match="`item` holds row numbers"):
        Histories(direct, "user", 2)
    listed = columns() | {"tags": pa.array([["a"]] * N)}
    tagged = Schema((*schema().columns, Column("tags", "list")))
    with pytest.raises(InputError, match="`tags` holds lists"):
        Histories(Encoder.fit(parquet(listed, "lists.parquet"), tagged), "user", 2)
