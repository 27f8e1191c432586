from __future__ import annotations

import datetime as dt

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitalfew.core.errors import InputError
from vitalfew.data import Column, Direct, Encoded, Encoder, Hashed, Schema, infer_schema, is_test, open_log

N = 600


def log_columns(seed=0, n=N):
    rng = np.random.default_rng(seed)
    return {
        "click": rng.integers(0, 2, n),
        "user": pa.array([None if v == 3 else int(v) for v in rng.integers(0, 40, n)], pa.int64()),
        "site": pa.array([None if v == 2 else f"s{v}" for v in rng.integers(0, 9, n)]),
        "price": pa.array([None if v > 4 else float(v) for v in rng.normal(0, 3, n)]),
        "tags": pa.array([None if k == 4 else [f"t{i}" for i in rng.integers(0, 9, k)] for k in rng.integers(0, 5, n)]),
        "day": np.arange(n) // 10,
    }


def schema_of(*, lists=True, time="day", crosses=(("user", "site"),)):
    columns = [Column("click", "label"), Column("user", "categorical"), Column("site", "categorical")]
    columns += [Column("price", "numeric"), Column("tags", "list" if lists else "ignored")]
    return Schema((*columns, Column("day", "time" if time else "ignored")), crosses)


def encode_all(encoder, log, **options):
    return Encoded.concat([encoder.encode(batch, **options) for batch in encoder.batches(log, batch_rows=97)])


def test_vocabulary_counts_equal_an_independent_count(parquet):
    columns = log_columns()
    log = parquet(columns)
    encoder = Encoder.fit(log, schema_of(lists=False))
    rows = encode_all(encoder, log)
    assert rows.ids.shape == (N, 3)
    assert rows.ids.flags.c_contiguous
    for j, name in enumerate(encoder.tables):
        assert (np.bincount(rows.ids[:, j], minlength=encoder.num_rows[name]) == encoder.counts[name]).all()
    users, sites = columns["user"].to_pylist(), columns["site"].to_pylist()
    assert encoder.num_rows == {
        "user": len(set(users) - {None}) + 1,
        "site": len(set(sites) - {None}) + 1,
        "user x site": len({pair for pair in zip(users, sites, strict=True) if None not in pair}) + 1,
    }
    # Equal values, equal rows, and the reverse; row 0 where a part is missing.
    for j, values in enumerate([users, sites, list(zip(users, sites, strict=True))]):
        assert len(set(zip(values, rows.ids[:, j].tolist(), strict=True))) == len(set(values))
    assert [i == 0 for i in rows.ids[:, 2]] == [None in pair for pair in zip(users, sites, strict=True)]


def test_numeric_columns_are_compressed_and_standardised(parquet):
    columns = log_columns()
    log = parquet(columns)
    dense = encode_all(Encoder.fit(log, schema_of()), log).dense[:, 0]
    values = columns["price"].to_numpy(zero_copy_only=False)
    present = ~np.isnan(values)
    expected = np.sign(values[present]) * np.log1p(np.abs(values[present]))
    expected = (expected - expected.mean()) / expected.std()
    np.testing.assert_allclose(dense[present], expected, rtol=1e-5, atol=1e-6)
    assert (dense[~present] == 0).all()
    assert Encoder.fit(log, schema_of()).num_missing == {"price": int((~present).sum())}


def test_bags_hold_what_the_lists_held(parquet):
    columns = log_columns()
    log = parquet(columns)
    encoder = Encoder.fit(log, schema_of())
    rows = encode_all(encoder, log)
    flat = encode_all(Encoder.fit(log, schema_of(lists=False)), log)
    assert rows.num_features == 4
    bags = np.split(rows.ids, rows.offsets[1:-1])
    assert len(bags) == N * 4
    row_of = {}
    for i, tags in enumerate(columns["tags"].to_pylist()):
        user, site, tag_rows, crossed = bags[4 * i : 4 * i + 4]
        assert [*user, *site, *crossed] == flat.ids[i].tolist()
        assert len(tag_rows) == len(tags or [])
        for tag, row in zip(tags or [], tag_rows.tolist(), strict=True):
            assert row_of.setdefault(tag, row) == row
    assert sorted(row_of.values()) == list(range(1, encoder.num_rows["tags"]))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(st.lists(st.lists(st.integers(0, 5) | st.none()) | st.none(), min_size=1, max_size=20), st.data())
def test_take_and_concat_of_bags(lists, data):
    n = len(lists)
    columns = {"click": [i % 2 for i in range(n)], "tags": pa.array(lists, pa.list_(pa.int64())), "u": ["a"] * n}
    schema = Schema((Column("click", "label"), Column("tags", "list"), Column("u", "categorical")))
    encoder = Encoder(
        schema,
        {"u": Hashed(5), "tags": Hashed(50)},
        kinds={},
        read={},
        mean=np.zeros(0),
        deviation=np.ones(0),
        num_missing={},
        label_counts=(1, 1),
        negative=0,
    )
    batch = pa.RecordBatch.from_pydict(columns)
    rows = encoder.encode(batch)
    order = data.draw(st.lists(st.integers(0, n - 1), min_size=1))
    expected = encoder.encode(batch.take(pa.array(order)))
    cut = data.draw(st.integers(0, n))
    halves = [part for part in (batch.slice(0, cut), batch.slice(cut)) if part.num_rows]
    again = Encoded.concat([encoder.encode(part) for part in halves])
    for one, other in ((rows.take(np.array(order)), expected), (again, rows)):
        assert (one.ids == other.ids).all()
        assert (one.offsets == other.offsets).all()
        assert (one.label == other.label).all()


def test_only_rows_up_to_the_cutoff_are_learned(parquet):
    columns = log_columns()
    log, early = parquet(columns), parquet({k: v[:300] for k, v in columns.items()}, name="early.parquet")
    until, alone = Encoder.fit(log, schema_of(), until=29), Encoder.fit(early, schema_of())
    assert until.label_counts == alone.label_counts
    assert until.num_missing == alone.num_missing
    for name, counts in alone.counts.items():
        assert (until.counts[name] == counts).all()
    one, other = encode_all(until, log), encode_all(alone, log)
    assert (one.ids == other.ids).all()
    np.testing.assert_allclose(one.dense, other.dense, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match=r"no row of .* has a time up to -1"):
        Encoder.fit(log, schema_of(), until=-1)
    with pytest.raises(InputError, match="until needs a time"):
        Encoder.fit(log, schema_of(time=None), until=1)
    with pytest.raises(InputError, match="test_share splits without one"):
        Encoder.fit(log, schema_of(), until=1, test_share=0.2)


@pytest.mark.parametrize("time", [None, "day"])
def test_rows_held_back_at_random_are_not_learned(parquet, time):
    columns = log_columns()
    kept = ~is_test(np.arange(N), 0.3, seed=5)
    encoder = Encoder.fit(parquet(columns), schema_of(time=time), test_share=0.3, seed=5)
    assert sum(encoder.label_counts) == kept.sum()
    assert encoder.counts["user"].sum() == kept.sum()


def test_file_order_does_not_matter(parquet):
    columns = log_columns()
    order = np.random.default_rng(1).permutation(N)
    shuffled = {name: pa.array(values).take(pa.array(order)) for name, values in columns.items()}
    one = Encoder.fit(parquet(columns), schema_of())
    other = Encoder.fit(parquet(shuffled, name="shuffled.parquet"), schema_of())
    for name, table in one.tables.items():
        assert (table.keys == other.tables[name].keys).all()


def test_hashed_and_direct_features(parquet):
    columns = log_columns() | {"user": np.arange(N) % 40}
    log = parquet(columns)
    encoder = Encoder.fit(log, schema_of(lists=False), hash_rows={"user x site": 17}, direct=["user"], until=0, seed=9)
    rows = encode_all(encoder, log)
    assert encoder.num_rows["user"] == 40  # of the whole log, not only of the rows it learns from
    assert (rows.ids[:, 0] == columns["user"]).all()
    assert rows.ids[:, 2].max() < 17
    assert list(encoder.counts) == ["site"]
    everything = Encoder.fit(log, schema_of(), hash_rows=64, direct=["user"])
    assert [type(table) for table in everything.tables.values()] == [Direct, Hashed, Hashed, Hashed]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hash_rows": {"usr": 5}}, "`usr` is missing from the features.*did you mean `user`"),
        ({"hash_rows": {"user": 5}, "direct": ["user"]}, "`user` is to be hashed and direct"),
        ({"direct": ["user x site"]}, "`user x site` is a cross"),
        ({"direct": ["user"]}, "`user` has a missing value"),
        ({"hash_rows": 1}, "2 rows or more"),
    ],
)
def test_wrong_settings(parquet, options, message):
    with pytest.raises(InputError, match=message):
        Encoder.fit(parquet(log_columns()), schema_of(), **options)


def test_a_direct_text_column_is_refused(parquet):
    with pytest.raises(InputError, match="`site` is string, so its values are no row numbers"):
        Encoder.fit(parquet(log_columns()), schema_of(), direct=["site"])


def test_save_and_load(parquet, tmp_path):
    log = parquet(log_columns())
    encoder = Encoder.fit(log, schema_of(), hash_rows={"site": 5}, seed=3)
    encoder.save(tmp_path / "model")
    again = Encoder.load(tmp_path / "model")
    one, other = encode_all(encoder, log), encode_all(again, log)
    for name in ("ids", "dense", "offsets", "label", "time"):
        assert (getattr(one, name) == getattr(other, name)).all()
    assert again.schema == encoder.schema
    assert again.label_counts == encoder.label_counts
    arrays = tmp_path / "model" / "encoder.npz"
    Encoder.fit(log, schema_of(), min_count=20).save(tmp_path / "other")
    (tmp_path / "other" / "encoder.npz").replace(arrays)
    with pytest.raises(InputError, match=r"does not belong to the encoder\.json"):
        Encoder.load(tmp_path / "model")
    arrays.write_bytes(arrays.read_bytes()[:-50])
    with pytest.raises(InputError, match="is damaged"):
        Encoder.load(tmp_path / "model")
    arrays.unlink()
    with pytest.raises(InputError, match="no such file"):
        Encoder.load(tmp_path / "model")


def test_a_prediction_needs_neither_label_nor_time(parquet):
    columns = log_columns()
    encoder = Encoder.fit(parquet(columns), schema_of())
    bare = parquet({name: columns[name] for name in ("price", "tags", "site", "user")}, name="bare.parquet")
    batch = next(encoder.batches(bare, labels=False))
    rows = encoder.encode(batch, labels=False)
    assert rows.label is None
    assert rows.time is None
    assert (rows.ids == encode_all(encoder, parquet(columns)).ids).all()
    with pytest.raises(InputError, match="`click` is missing from"):
        encoder.batches(bare)
    with pytest.raises(InputError, match="`site` is missing from the rows"):
        encoder.encode(batch.drop_columns(["site"]), labels=False)


def test_text_and_numbers_are_not_mixed_up(parquet, write):
    columns = log_columns()
    encoder = Encoder.fit(parquet(columns), schema_of(lists=False))
    as_text = pa.RecordBatch.from_pydict(columns | {"user": columns["user"].cast(pa.string())})
    with pytest.raises(InputError, match="`user` is string, but the encoder learned it as integer"):
        encoder.encode(as_text)
    dictionary = pa.RecordBatch.from_pydict(columns | {"user": columns["user"].cast(pa.int32()).dictionary_encode()})
    assert (encoder.encode(dictionary).ids == encoder.encode(pa.RecordBatch.from_pydict(columns)).ids).all()
    # All values of a short text file may look like numbers although the column is text.
    long = open_log(write("click,code\n0,a1\n1,12\n0,a1\n1,12\n"))
    encoder = Encoder.fit(long, infer_schema(long, label="click"))
    short = open_log(write("code\n12\n", "short.csv"))
    assert encoder.encode(next(encoder.batches(short, labels=False)), labels=False).ids[0, 0] != 0


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ([True, False], [1, 0]),
        ([-1, 1], [0, 1]),
        ([0.0, 1.0], [0, 1]),
        (["true", "False"], [1, 0]),
        (["1", "-1"], [1, 0]),
    ],
)
def test_labels(parquet, label, expected):
    log = parquet({"click": label * 5, "user": ["a", "b"] * 5})
    schema = Schema((Column("click", "label"), Column("user", "categorical")))
    encoder = Encoder.fit(log, schema)
    assert encoder.encode(next(encoder.batches(log))).label.tolist() == expected * 5
    assert encoder.label_counts == (5, 5)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("click", [0, 1, 2], "the label `click` holds 2 in row 3"),
        ("click", [0, 1, -1], "the label `click` holds -1 and 0"),
        ("click", [0, 1, None], "the label `click` is missing in row 3"),
        ("click", [0.0, 1.0, float("nan")], "the label `click` is missing in row 3"),
        ("click", ["yes", "no", "no"], "the label `click` holds 'yes' in row 1"),
        ("price", [0.0, 1.0, float("inf")], "`price` is infinite in row 3"),
        ("day", [1, 2, None], "the time `day` is missing in row 3"),
        ("user", [0.5, 1.0, 2.0], r"`user` holds 0\.5, which is no whole number"),
    ],
)
def test_values_that_cannot_be_used(parquet, column, values, message):
    columns = {"click": [0, 1, 1], "user": [1, 2, 3], "site": ["a", "b", "c"], "price": [0.0, 1, 2], "day": [1, 2, 3]}
    with pytest.raises(InputError, match=message):
        Encoder.fit(parquet(columns | {column: values}), schema_of(lists=False))


def test_a_test_row_with_another_label_is_refused(parquet):
    log = parquet({"click": [0, 1, 0, -1], "user": ["a"] * 4, "day": [1, 1, 1, 2]})
    schema = Schema((Column("click", "label"), Column("user", "categorical"), Column("day", "time")))
    encoder = Encoder.fit(log, schema, until=1)
    with pytest.raises(InputError, match="holds -1 in row 104; the encoder learned the labels 0 and 1"):
        encoder.encode(next(log.batches()), first_row=100)


def test_times_of_a_text_file_may_gain_a_fraction(write):
    rows = "".join(f"{i % 2},u{i % 7},2024-01-01 00:00:{i % 60:02}\n" for i in range(60_000))
    log = open_log(write("click,user,when\n" + rows + "1,u1,2024-01-01 00:00:59.500\n"))
    encoder = Encoder.fit(log, infer_schema(log, label="click", time="when"))
    time = np.concatenate([encoder.encode(batch).time for batch in encoder.batches(log)])
    start = int(dt.datetime(2024, 1, 1, tzinfo=dt.UTC).timestamp() * 1e6)
    assert time[-1] - start == 59_500_000
    assert time[1] - start == 1_000_000
