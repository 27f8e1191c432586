from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest

from vitalfew.core.errors import InputError
from vitalfew.data import Batches, Column, Encoded, EncodedLog, Encoder, Hashed, Schema, is_test, write_log

N = 1000


def columns(n=N):
    rng = np.random.default_rng(0)
    return {
        "click": np.arange(n) % 3 % 2,
        "user": [f"u{i}" for i in range(n)],
        "tags": pa.array(
            [[int(v) for v in rng.integers(0, 9, k)] for k in rng.integers(0, 4, n)], pa.list_(pa.int64())
        ),
        "price": rng.normal(size=n),
        "row": np.arange(n),
    }


def schema(*, lists, numeric=True, time=True):
    return Schema(
        (
            Column("click", "label"),
            Column("user", "categorical"),
            Column("tags", "list" if lists else "ignored"),
            Column("price", "numeric" if numeric else "ignored"),
            Column("row", "time" if time else "ignored"),
        )
    )


@pytest.fixture(params=[False, True], ids=["flat", "jagged"])
def logs(request, parquet, tmp_path):
    reader = parquet(columns())
    encoder = Encoder.fit(reader, schema(lists=request.param))
    return (*write_log(tmp_path / "encoded", reader, encoder, cutoff=799), encoder, reader)


def same(one: Encoded, other: Encoded) -> bool:
    names = ("ids", "offsets", "dense", "label", "time")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


def test_the_log_holds_the_encoded_rows(logs):
    train, test, encoder, reader = logs
    rows = encoder.encode(next(reader.batches()))
    assert (len(train), len(test)) == (800, 200)
    assert same(train.block(0, 800), rows.take(np.arange(800)))
    assert same(test.block(50, 60), rows.take(np.arange(850, 860)))
    assert len(train.block(5, 5)) == 0
    assert train.block(0, 10).ids.dtype == np.int64
    assert train.features == tuple(encoder.tables)
    assert train.table_rows == tuple(encoder.num_rows.values())
    assert train.label_counts == (int((rows.label[:800] == 0).sum()), int(rows.label[:800].sum()))
    assert (train.folder / "ids.i32").stat().st_size == 4 * train.num_ids
    with pytest.raises(InputError, match="rows 5 to 801 are not within 0 to 800"):
        train.block(5, 801)


def test_a_random_split(parquet, tmp_path):
    reader = parquet(columns())
    encoder = Encoder.fit(reader, schema(lists=False, numeric=False, time=False), test_share=0.25, seed=4)
    train, test = write_log(tmp_path / "encoded", reader, encoder, test_share=0.25, seed=4)
    held_back = is_test(np.arange(N), 0.25, 4)
    assert (len(train), len(test)) == ((~held_back).sum(), held_back.sum())
    assert train.block(0, 9).dense.shape == (9, 0)
    assert train.block(0, 9).time is None
    # Each user occurs once, so those of the test slice are unseen.
    assert (train.block(0, len(train)).ids > 0).all()
    assert (test.block(0, len(test)).ids == 0).all()


def test_large_tables_have_wide_ids(parquet, tmp_path):
    reader = parquet(columns())
    encoder = Encoder.fit(reader, schema(lists=False), hash_rows=2**40)
    train, _ = write_log(tmp_path / "encoded", reader, encoder, cutoff=799)
    assert (train.folder / "ids.i64").exists()
    assert (train.block(0, 800).ids == encoder.encode(next(reader.batches())).ids[:800]).all()
    assert isinstance(encoder.tables["user"], Hashed)


@pytest.mark.parametrize(
    ("click", "cutoff", "message"),
    [
        ([0, 1] * 500, 999, "the test slice is empty"),
        ([0, 1] * 500, -1, "the train slice is empty"),
        (
            [1] * 500 + [0, 1] * 250,
            499,
            "all 500 rows of the train slice have the label 1 in `click`; AUC is undefined",
        ),
        ([0, 1] * 250 + [0] * 500, 499, "all 500 rows of the test slice have the label 0"),
    ],
)
def test_slices_that_cannot_be_used_leave_nothing_behind(parquet, tmp_path, click, cutoff, message):
    reader = parquet(columns() | {"click": click})
    encoder = Encoder.fit(reader, schema(lists=False))
    with pytest.raises(InputError, match=message):
        write_log(tmp_path / "encoded", reader, encoder, cutoff=cutoff)
    assert [path.name for path in tmp_path.iterdir()] == ["log.parquet"]


def test_a_cutoff_needs_a_time_and_a_folder_is_not_written_over(logs, parquet, tmp_path):
    *_, reader = logs
    encoder = Encoder.fit(reader, schema(lists=False, time=False))
    with pytest.raises(InputError, match="a cutoff needs a time"):
        write_log(tmp_path / "other", reader, encoder, cutoff=5)
    with pytest.raises(InputError, match="encoded exists already"):
        write_log(tmp_path / "encoded", reader, encoder)


def test_damaged_logs(logs, tmp_path):
    train, *_ = logs
    for name in ("ids.i32", "label.f32", "dense.f32", "time.i64"):
        path = train.folder / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-4])
        with pytest.raises(InputError, match=rf"{name}` has {len(whole) - 4} bytes, expected {len(whole)}"):
            EncodedLog.open(train.folder)
        with pytest.raises(InputError, match="ends in the middle"):
            train.block(0, 800)
        path.unlink()
        with pytest.raises(InputError, match=rf"{name}` has 0 bytes"):
            EncodedLog.open(train.folder)
        path.write_bytes(whole)
    with pytest.raises(InputError, match="no such file"):
        EncodedLog.open(tmp_path)


def stream(batches, epoch, start=0):
    return [batch.time.tolist() for batch in batches.epoch(epoch, start)]


@pytest.mark.parametrize(
    ("batch_size", "block_rows", "blocks"), [(64, 50, 3), (7, 64, 16), (300, 10, 2), (5000, 33, 4)]
)
def test_every_row_once_and_resume_equals_the_tail(logs, batch_size, block_rows, blocks):
    train, *_ = logs
    batches = Batches(train, batch_size, seed=1, block_rows=block_rows, blocks_in_memory=blocks)
    whole = stream(batches, 0)
    assert len(whole) == len(batches)
    assert sorted(itertools.chain(*whole)) == list(range(800))
    assert {len(batch) for batch in whole[:-1]} <= {batch_size}
    assert stream(batches, 0) == whole
    assert stream(batches, 1) != whole
    other = Batches(train, batch_size, seed=2, block_rows=block_rows, blocks_in_memory=blocks)
    assert stream(other, 0) != whole
    for start in {0, 1, len(batches) // 2, len(batches)} & set(range(len(batches) + 1)):
        assert stream(batches, 0, start) == whole[start:]


def test_batches_carry_whole_rows(logs):
    train, _, encoder, _ = logs
    rows = train.block(0, 800)
    for shuffle in (True, False):
        for batch in Batches(train, 64, block_rows=50, blocks_in_memory=2, shuffle=shuffle).epoch(3):
            assert same(batch, rows.take(batch.time))
            assert batch.num_features == len(encoder.tables)


def test_file_order(logs):
    train, *_ = logs
    batches = Batches(train, 64, shuffle=False)
    assert list(itertools.chain(*stream(batches, 0))) == list(range(800))
    assert stream(batches, 0, 5) == stream(batches, 0)[5:]


def test_a_resumed_epoch_does_not_read_what_it_skips(logs, monkeypatch):
    train, *_ = logs
    read = []
    block = EncodedLog.block
    monkeypatch.setattr(EncodedLog, "block", lambda log, a, b: read.append(b - a) or block(log, a, b))
    list(Batches(train, 10, block_rows=50, blocks_in_memory=2).epoch(0, start=75))
    assert sum(read) == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"batch_size": 1, "block_rows": 0}, "block_rows must be 1 or more"),
        ({"batch_size": 1, "blocks_in_memory": -1}, "blocks_in_memory must be 1 or more"),
        ({"batch_size": 1, "seed": -1}, "seed must be 0 or more"),
    ],
)
def test_wrong_batches(logs, options, message):
    with pytest.raises(InputError, match=message):
        Batches(logs[0], **options)
    for epoch, start in ((-1, 0), (0, 14), (0, -1)):
        with pytest.raises(InputError, match=f"no batch {start} in epoch {epoch}; an epoch has 13 batches"):
            Batches(logs[0], 64).epoch(epoch, start)


def test_rows_of_any_numbers(logs):
    train, *_ = logs
    whole = train.block(0, len(train))
    rng = np.random.default_rng(0)
    for numbers in (rng.permutation(len(train)), rng.integers(0, len(train), 50), np.empty(0, np.int64), [799, 0, 799]):
        found = train.rows(numbers)
        assert same(found, whole.take(np.asarray(numbers)))
        assert (found.ids.dtype, found.dense.dtype, found.label.dtype) == (np.int64, np.float32, np.float32)
        assert (found.ids.flags.writeable and found.ids.base is None) or not found.ids.size
    near = np.arange(60, 100)
    for dtype in (np.int8, np.uint8, np.uint64):  # the places of bags need more bits than the numbers
        assert same(train.rows(near.astype(dtype)), whole.take(near))
    for wrong in ([800], [-1], [0.5], [[1]], True):
        with pytest.raises(InputError, match=r"800|-1|float64|shape"):
            train.rows(wrong)
