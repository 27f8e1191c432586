"""A slab on a device gives back what was put, in order with the computation, and stays inside its memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitalfew.core import InputError, StorageError
from vitalfew.tiers.hbm import Hbm, HbmSlab, columns_of
from vitalfew.tiers.record import Record

NUMPY = {torch.float32: np.float32, torch.int32: np.int32, torch.bfloat16: np.uint16, torch.float16: np.uint16}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], scope="module")
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


def stored(column: torch.Tensor) -> np.ndarray:
    column = column.cpu()
    return (column.view(torch.int16) if column.dtype.itemsize == 2 else column.view(torch.int32)).numpy()


def slab(device: str, *, num_slots: int = 20, staging_rows: int = 4, buffers: int = 3) -> HbmSlab:
    return HbmSlab(columns_of(3, torch.float32, 1, 1), num_slots, device, staging_rows=staging_rows, buffers=buffers)


def random_records(slab: HbmSlab, rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, slab.row_bytes), np.uint8)


@given(
    dim=st.sampled_from([1, 3, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    states=st.tuples(st.integers(0, 2), st.integers(0, 1)),
    staging_rows=st.integers(1, 9),
    buffers=st.integers(1, 3),
    turns=st.lists(st.tuples(st.integers(0, 12), st.booleans(), st.booleans()), max_size=8),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_a_slab_is_the_same_columns_as_in_main_memory(
    device: str,
    dim: int,
    dtype: torch.dtype,
    states: tuple[int, int],
    staging_rows: int,
    buffers: int,
    turns: list[tuple[int, bool, bool]],
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    columns = columns_of(dim, dtype, *states)
    mine = HbmSlab(columns, 13, device, staging_rows=staging_rows, buffers=buffers)
    theirs = [np.zeros((13, width), NUMPY[kind]) for width, kind in columns]
    record = Record(theirs)
    assert mine.row_bytes == record.nbytes
    for num, put, in_pinned in turns:
        slots = rng.permutation(13)[:num].astype(np.int32 if put else np.int64)
        records = mine.pinned(num) if in_pinned else np.empty((num, record.nbytes), np.uint8)
        if put:
            records[:] = rng.integers(0, 256, records.shape, np.uint8)
            record.put(slots.astype(np.int32), records)
            mine.put(slots, records)
            records[:] = 255  # the caller's memory is the caller's again
        else:
            expected = np.zeros_like(records)
            records[:] = 0  # bytes between fields stay out of the comparison
            record.take(slots.astype(np.int32), expected)
            mine.take(slots, records)
            for at, width in fields(columns):
                np.testing.assert_array_equal(records[:, at : at + width], expected[:, at : at + width])
    for a, b in zip(mine.columns, theirs, strict=True):
        np.testing.assert_array_equal(stored(a), b.view(stored(a).dtype))


def fields(columns: list[tuple[int, torch.dtype]]) -> list[tuple[int, int]]:
    found, at = [], 0
    for width, dtype in columns:
        size = width * dtype.itemsize
        found.append((at, size))
        at += -(-size // 4) * 4
    return found


def test_records_reach_their_slots_when_waited_for(device: str) -> None:
    rows = slab(device)
    records = random_records(rows, 4)
    slots = np.array([5, 0, 19, 7])
    move = rows.put_async(slots, records.copy())
    assert not bool(rows.columns[0].any())
    move.wait()
    out = np.empty_like(records)
    rows.take(slots, out)
    np.testing.assert_array_equal(out, records)
    rows.columns[0].zero_()
    move.wait()  # a second wait moves nothing
    assert not bool(rows.columns[0].any())


def test_records_are_read_as_they_were_when_asked_for(device: str) -> None:
    rows = slab(device)
    big = torch.ones(2000, 2000, device=device)
    for _ in range(20):
        big = big @ big / 2000  # keeps a GPU busy, so that what is asked next stands in line
    rows.columns[0].fill_(1.0)
    out = rows.pinned(2)
    move = rows.take_async(np.array([3, 4]), out)
    rows.columns[0].fill_(2.0)
    move.wait()
    np.testing.assert_array_equal(out[:, :12].copy().view(np.float32), np.ones((2, 3), np.float32))


def test_moves_pass_each_other_and_reuse_their_staging(device: str) -> None:
    """Rows leave, others take their slots, in the order in which a store would ask for it, many times over."""
    rows, twin = slab(device, staging_rows=5, buffers=3), np.zeros((20, 9), np.int32)
    rng = np.random.default_rng(0)
    for turn in range(50):
        slots = rng.permutation(20)[:5]
        arriving = random_records(rows, 5, turn)
        coming = rows.put_async(slots, arriving)
        leaving = np.empty_like(arriving)
        going = rows.take_async(slots, leaving)
        coming.wait()
        going.wait()
        np.testing.assert_array_equal(leaving.view(np.int32), twin[slots])
        twin[slots] = arriving.view(np.int32)


def test_moves_are_bounded(device: str) -> None:
    rows = slab(device, staging_rows=2, buffers=2)
    with pytest.raises(InputError, match="3 rows do not fit a staging buffer of 2"):
        rows.put_async(np.arange(3), random_records(rows, 3))
    moves = [rows.put_async(np.array([i]), random_records(rows, 1)) for i in range(2)]
    with pytest.raises(AssertionError, match="wait for a move"):
        rows.take_async(np.array([2]), random_records(rows, 1))
    for move in moves:
        move.wait()
    with pytest.raises(AssertionError, match="outside"):
        rows.put(np.array([20]), random_records(rows, 1))


@given(size=st.integers(1, 100_000), dim=st.integers(1, 33), staging_rows=st.integers(1, 40), buffers=st.integers(1, 3))
@settings(deadline=None, derandomize=True, database=None)
def test_a_memory_is_never_exceeded(size: int, dim: int, staging_rows: int, buffers: int) -> None:
    columns = columns_of(dim, torch.bfloat16, 0, 1)
    row = -(-2 * dim // 4) * 4 + 12
    memory = Hbm(size, device="cpu")
    if size < buffers * staging_rows * (row + 8) + row:
        with pytest.raises(InputError, match=str(buffers * staging_rows * (row + 8) + row)):
            memory.open(columns, staging_rows=staging_rows, buffers=buffers)
        return
    rows = memory.open(columns, staging_rows=staging_rows, buffers=buffers)
    assert rows.nbytes <= size < rows.nbytes + (rows.num_slots + 1) * row
    assert rows.row_bytes == row
    tensors = [*rows.columns, *(t for buffer in rows._free for t in (buffer.slots, buffer.staged))]
    assert rows.nbytes == sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("device", ["meta", "gpu", ""])
def test_other_devices_are_refused(device: str) -> None:
    with pytest.raises(InputError, match=repr(device)) as caught:
        Hbm("1 GiB", device=device)
    assert caught.value.hint


def test_what_cannot_be_had_is_said() -> None:
    with pytest.raises(InputError, match="0"):
        Hbm(0, device="cpu")
    with pytest.raises(InputError, match="twelve"):
        Hbm("twelve", device="cpu")
    with pytest.raises(InputError, match="0 slots"):
        slab("cpu", num_slots=0)
    with pytest.raises(StorageError, match="no room") as caught:
        slab("cpu", num_slots=2**50)
    assert caught.value.hint


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_said() -> None:
    with pytest.raises(InputError, match="no GPU"):
        slab("cuda")


@pytest.mark.gpu
def test_more_than_the_device_has_is_refused() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with pytest.raises(StorageError, match="no room"):
        slab("cuda", num_slots=2**40)
