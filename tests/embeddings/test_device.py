"""Rows that move between a device's slab and main memory at random train as the tables on the CPU do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitalfew.embeddings import SGD, Adagrad, EmbeddingBags, LazyAdam, RowwiseAdagrad, Table
from vitalfew.embeddings._device import DeviceRows
from vitalfew.embeddings.optim import Optimizer
from vitalfew.tiers.hbm import Hbm
from vitalfew.tiers.record import Record

TABLES = [Table("a", 9, 6, "mean"), Table("b", 5, 6)]
ROWS, DIM, SLOTS = 14, 6, 20


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], scope="module")
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy() if tensor.dtype == torch.float32 else tensor.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(
    rule=st.sampled_from([SGD(0.1, weight_decay=0.01), RowwiseAdagrad(0.1), Adagrad(0.1), LazyAdam(0.01)]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=25)
def test_placement_changes_no_bit(device: str, dtype: torch.dtype, rule: Optimizer, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables = EmbeddingBags(TABLES, rule, dtype=dtype, generator=torch.Generator().manual_seed(seed), seed=7)
    columns = DeviceRows.columns(DIM, dtype, rule)
    slab = Hbm("8 KiB", device=device).open(columns, staging_rows=8)
    rows = DeviceRows(slab, rule)
    below = [bits(t).copy() for t in (tables.rows.weight, *tables.rows.wide, *tables.rows.narrow)]
    record = Record([*below, np.zeros((ROWS, 2), np.uint32)])
    records = np.zeros((ROWS, record.nbytes), np.uint8)
    record.take(np.arange(ROWS, dtype=np.int32), records)
    slot_of = np.full(ROWS, -1)
    # On a GPU the squares of a row are summed in another order than on a CPU.
    exact = device == "cpu" or not isinstance(rule, RowwiseAdagrad)
    for step in (1, 2, 3):
        sizes = rng.integers(0, 4, 6 * len(TABLES))
        edges = np.concatenate([[0], np.cumsum(sizes)])
        table = np.repeat(np.arange(12) % 2, sizes)
        ids = rng.integers(0, np.array([9, 5])[table])
        names = ids + np.array([0, 9])[table]
        weights = rng.standard_normal(len(ids)).astype(np.float32)

        leave = np.flatnonzero((slot_of >= 0) & (rng.random(ROWS) < 0.5))
        part = np.empty((len(leave), record.nbytes), np.uint8)
        slab.take(slot_of[leave], part)
        records[leave], slot_of[leave] = part, -1
        come = np.setdiff1d(names, np.flatnonzero(slot_of >= 0))
        slot_of[come] = rng.permutation(np.setdiff1d(np.arange(SLOTS), slot_of))[: len(come)]
        slab.put(slot_of[come], records[come])

        scales = torch.from_numpy(weights).requires_grad_()
        out = tables(torch.from_numpy(ids), torch.from_numpy(edges), scales)
        slots, bag_of = slot_of[names], np.repeat(np.arange(12), sizes).astype(np.int32)
        size = np.where(np.arange(12) % 2, 1, sizes)[bag_of].astype(np.float32)
        mine = rows.pool(slots, edges, weights / size)
        grad = torch.from_numpy(rng.standard_normal((12, DIM)).astype(np.float32))
        to_scales = rows.scale_gradients(slots, bag_of, size, grad.to(device))
        out.backward(grad.reshape(out.shape))
        if exact:
            np.testing.assert_array_equal(mine.cpu().numpy(), out.detach().reshape(12, DIM).numpy())
        torch.testing.assert_close(to_scales.cpu(), scales.grad, rtol=1e-5, atol=1e-5)
        touched = rows.update(rule, slots, bag_of, weights / size, grad.to(device), step=step, seed=7, names=names)
        assert int(touched) == len(np.unique(names))
    here = np.flatnonzero(slot_of >= 0)
    part = np.empty((len(here), record.nbytes), np.uint8)
    slab.take(slot_of[here], part)
    records[here] = part
    record.put(np.arange(ROWS, dtype=np.int32), records)
    for mine, theirs in zip(below, (tables.rows.weight, *tables.rows.wide, *tables.rows.narrow), strict=True):
        if exact:
            np.testing.assert_array_equal(mine, bits(theirs))
        elif mine.dtype == np.float32:
            np.testing.assert_allclose(mine, bits(theirs), rtol=1e-5, atol=1e-6)


def test_norm_and_gather(device: str) -> None:
    rule = SGD(0.1)
    slab = Hbm("8 KiB", device=device).open(DeviceRows.columns(DIM, torch.float32, rule), staging_rows=8)
    rows = DeviceRows(slab, rule)
    rows.weight.copy_(torch.arange(slab.num_slots)[:, None].expand(-1, DIM))
    slots = np.array([3, 1, 3])
    assert rows.gather(slots)[:, 0].tolist() == [3.0, 1.0, 3.0]
    grad = torch.ones(3, DIM, device=device)
    none = np.empty(0, np.int32), np.empty(0, np.float32)
    assert float(rows.squared_norm(slots, *none, grad, 0.5)) == pytest.approx(DIM * (1 + 0.25))
