"""Rows on a device over slower tiers: the bits are those of all rows in main memory. "cpu" stands for a GPU."""

from __future__ import annotations

import dataclasses
import random
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.embeddings.twins import Case, same, same_seen, train
from vitalfew.core import InputError
from vitalfew.embeddings import (
    SGD,
    Adagrad,
    EmbeddingBags,
    LazyAdam,
    Optimizer,
    Prefetch,
    RowwiseAdagrad,
    Table,
    TieredEmbeddings,
    clip_grad_norm,
)
from vitalfew.embeddings._device import DeviceRows
from vitalfew.embeddings.device_rows import DeviceTieredRows
from vitalfew.embeddings.room import room_on
from vitalfew.tiers import LRU, Belady, Chaos, Dram, File, Hbm, LookAhead, Policy
from vitalfew.tiers.hbm import HbmSlab

Refuses = Callable[..., AbstractContextManager[None]]
QUICK = settings(max_examples=30)
KINDS = ("hbm", "hbm dram", "hbm file", "hbm ring file")
TABLES = [Table("a", 20, 3), Table("b", 10, 3, "mean")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], scope="module")
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


def memory(slots: int, num_rows: int, record: int, device: str) -> Hbm:
    """Return so much memory that it holds these many rows at a time."""
    for total in range((slots + 1) * record, 4 * (slots + 9) * (record + 8), 4):
        found = Hbm(total, device=device)
        try:
            if room_on(found, num_rows, record, 0, LRU()).slots >= min(slots, num_rows):
                return found
        except InputError:
            continue
    raise AssertionError(slots)


def record_bytes(dim: int, dtype: torch.dtype, rule: Optimizer) -> int:
    columns = DeviceRows.columns(dim, dtype, rule)
    return HbmSlab(columns, 1, "cpu", staging_rows=1).row_bytes


@dataclasses.dataclass
class DeviceCase(Case):
    """As `Case`, with the rows that are computed on in the memory of a device."""

    device: str = "cpu"

    @classmethod
    def drawn(cls, seed: int, **fixed: Any) -> DeviceCase:
        dice = random.Random(seed)
        case = super().drawn(seed, **{"kind": dice.choice(KINDS)} | fixed)
        assert isinstance(case, DeviceCase)
        if case.kind == "hbm" and isinstance(case.policy, Chaos):  # it would send rows to where there is nothing
            case.policy = LRU()
        return case

    def tiered(self, folder: Path, **more: Any) -> TieredEmbeddings:
        slots = self.num_rows if self.kind == "hbm" else self.slots
        row = record_bytes(self.tables[0].dim, self.dtype, self.optimizer)
        below = {"hbm": [], "dram": [Dram(1.0)], "file": [File(folder)]}[self.kind.split()[-1]]
        tiers = [memory(slots, self.num_rows, row, self.device), *map(Dram, self.rings), *below]
        return TieredEmbeddings(
            self.tables, self.optimizer, tiers=tiers, policy=self.policy, ahead=self.ahead, **self.settings(), **more
        )


def compare(seed: int, folder: Path, device: str, *, driven: bool, **fixed: Any) -> None:
    case = DeviceCase.drawn(seed, device=device, **fixed)
    plain = case.plain()
    want = train(case, plain, case.batches) + train(case, plain, case.batches)
    with case.tiered(folder) as tiered:
        assert isinstance(tiered.rows, DeviceTieredRows)
        loader = Prefetch(tiered, case.batches) if driven else case.batches
        found = train(case, tiered, loader) + train(case, tiered, loader)
        # A GPU sums the squares of a row, and the products for the gradient of a weight, in an order of its own.
        if device == "cpu":
            same_seen(found, want)
        if device == "cpu" or not isinstance(case.optimizer, RowwiseAdagrad):
            same(plain, tiered)
        elif case.dtype == torch.float32:
            close(plain, tiered)
        assert plain.counts == tiered.counts


def close(plain: EmbeddingBags, tiered: TieredEmbeddings) -> None:
    found = tiered.columns(0, plain.num_rows)
    for name, column in {"weight": plain.rows.weight, **plain.rows.state}.items():
        torch.testing.assert_close(column, found[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("driven", [False, True])
@QUICK
@given(seed=st.integers(0, 2**32))
def test_bits_are_those_of_all_in_memory(device: str, driven: bool, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        compare(seed, Path(folder), device, driven=driven)


@pytest.mark.slow
@pytest.mark.parametrize("driven", [False, True])
@settings(QUICK, max_examples=80)
@given(seed=st.integers(0, 2**32))
def test_bits_are_those_of_all_in_memory_in_many_cases(device: str, driven: bool, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        compare(seed, Path(folder), device, driven=driven)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", [SGD(0.1, weight_decay=0.01), RowwiseAdagrad(0.1), Adagrad(0.1), LazyAdam(0.1)])
def test_every_rule_and_storage(device: str, tmp_path: Path, kind: str, dtype: torch.dtype, rule: Optimizer) -> None:
    for update, policy in (("backward", LookAhead(4)), ("step", Belady())):
        case = {"kind": kind, "dtype": dtype, "optimizer": rule, "update": update, "policy": policy}
        compare(5, tmp_path / update, device, driven=True, every=1, **case)


@pytest.mark.parametrize("kind", ["hbm dram", "hbm file", "hbm ring file"])
def test_every_row_that_can_leave_does(device: str, tmp_path: Path, kind: str) -> None:
    for seed in range(3):
        for driven in (False, True):
            fixed = {"kind": kind, "policy": Chaos(seed)}
            compare(seed, tmp_path / f"{seed}{driven}", device, driven=driven, **fixed)


def test_rows_are_there_after_a_commit(device: str, tmp_path: Path) -> None:
    case = DeviceCase.drawn(11, kind="hbm ring file", every=1, device=device, optimizer=Adagrad(0.1))
    plain, tiered = case.plain(), case.tiered(tmp_path)
    train(case, plain, case.batches)
    train(case, tiered, Prefetch(tiered, case.batches))
    tiered.commit()
    tiered.close()
    with case.tiered(tmp_path, resume=True) as again:
        same(plain, again)


# -- what a user may do


def small(device: str, size: str | int = "4 KiB", **more: Any) -> TieredEmbeddings:
    more = {"generator": torch.Generator().manual_seed(0), "tiers": [Hbm(size, device=device), Dram(1.0)]} | more
    return TieredEmbeddings(TABLES, SGD(0.1), **more)


def test_ids_may_lie_on_the_device_and_bags_do(device: str) -> None:
    tables = small(device)
    ids = torch.tensor([1, 2, 3, 4], device=device)
    offsets = torch.tensor([0, 2, 3, 3, 4], device=device)
    weights = torch.ones(4, device=device, requires_grad=True)
    out = tables(ids, offsets, weights)
    assert out.device.type == device
    out.sum().backward()
    assert weights.grad is not None
    assert weights.grad.device.type == device
    with torch.no_grad():
        assert tables(ids, offsets).device.type == device


def test_all_bags_may_be_empty(device: str) -> None:
    tables = small(device)
    weights = torch.ones(0, requires_grad=True)
    out = tables(torch.zeros(0, dtype=torch.int64), torch.zeros(5, dtype=torch.int64), weights)
    assert out.tolist() == torch.zeros(2, 2, 3).tolist()
    out.sum().backward()
    assert weights.grad is not None
    assert tables.counts.rows_updated == 0


def test_the_model_moves_to_where_its_rows_are(device: str, refuses: Refuses) -> None:
    model = torch.nn.ModuleDict({"tables": small(device), "dense": torch.nn.Linear(3, 1)})
    model.to(device)
    with refuses("cannot become torch.float16"):
        model["tables"].half()
    with refuses("meta"):
        model["tables"].to("meta")


def test_clipping_by_the_joint_norm(device: str) -> None:
    plain = EmbeddingBags(TABLES, SGD(0.1), update="step", generator=torch.Generator().manual_seed(0))
    tables = small(device, update="step")
    norms = []
    for each in (plain, tables):
        for k in range(3):
            each(torch.tensor([[k, 1], [k, 2]])).square().sum().backward()
        norms.append(clip_grad_norm([], each, 0.1))
        each.step()
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)
    same(plain, tables)


def test_a_gradient_that_is_no_number_changes_no_row(device: str, refuses: Refuses) -> None:
    tables = small(device)
    tables(torch.tensor([[1, 2]])).sum().backward()
    before = tables.columns(0, 30)
    with refuses("NaN or infinite"):
        (tables(torch.tensor([[1, 3]])) * float("nan")).sum().backward()
        _ = tables.counts  # on a GPU one may hear of it this late
    after = tables.columns(0, 30)
    for name, column in before.items():
        assert torch.equal(column, after[name])
    assert tables.counts.rows_updated == 2
    tables(torch.tensor([[1, 3]])).sum().backward()
    assert tables.counts.rows_updated == 4


def test_memory_is_what_was_given(device: str) -> None:
    for size in ("2 KiB", "4 KiB", "1 MiB"):
        tables = TieredEmbeddings([Table("a", 10**5, 8)], Adagrad(0.1), tiers=[Hbm(size, device=device), Dram(1.0)])
        assert isinstance(tables.rows, DeviceTieredRows)
        slab = tables.rows.slab
        given = Hbm(size, device=device).nbytes
        assert given - slab.row_bytes < slab.nbytes <= given
        assert tables.room.slots == slab.num_slots - 1
        assert tables.room.nbytes > tables.store.lower.nbytes == 10**5 * slab.row_bytes


def test_too_little_memory_is_refused(device: str, tmp_path: Path, refuses: Refuses) -> None:
    with refuses("hold no row"):
        small(device, 64)
    with refuses("holds 29 of 30 rows"):
        small(device, tiers=[Hbm("4 KiB", device=device), Dram(29)])
    with refuses("of 30 rows"):
        small(device, tiers=[Hbm(400, device=device)])
    with refuses("cannot stand"):
        small(device, tiers=[Hbm("4 KiB", device=device), Hbm("4 KiB", device=device), File(tmp_path)])
    with refuses("cannot stand"):
        small(device, tiers=[Dram(9), Hbm("4 KiB", device=device)])
    tables = small(device, 200)
    with refuses("rows at a time"):
        tables(torch.tensor([[k, k] for k in range(10)]))
    with refuses("memory alone keeps nothing"):
        tables.commit()


def test_rows_are_filled_wherever_they_are(device: str) -> None:
    tables = small(device, 200)
    tables(torch.tensor([[1, 2]])).sum().backward()
    tables.rows.end_turn("it may not")
    tables.fill(0, {"weight": torch.arange(90.0).reshape(30, 3)})
    assert torch.equal(tables.columns(0, 30)["weight"], torch.arange(90.0).reshape(30, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("policy", [LookAhead(20), Belady(), Chaos(1)])
def test_on_a_gpu_that_is_busy_and_on_another_stream(policy: Policy) -> None:
    """Rows come and go beside a computation that is behind, which is on a stream other than that of the rows."""
    rng = np.random.default_rng(0)
    spec = [Table("a", 5000, 32)]
    batches = [{"ids": torch.from_numpy(rng.zipf(1.2, (200, 1)) % 5000)} for _ in range(60)]
    plain = EmbeddingBags(spec, Adagrad(0.1), generator=torch.Generator().manual_seed(0))
    tables = TieredEmbeddings(
        spec, Adagrad(0.1), tiers=[Hbm("256 KiB"), Dram(1.0)], policy=policy, generator=torch.Generator().manual_seed(0)
    )
    for batch in batches:
        plain(batch["ids"]).square().sum().backward()
    with torch.cuda.stream(torch.cuda.Stream()):
        for batch in Prefetch(tables, batches):
            torch.cuda._sleep(2_000_000)
            tables(batch["ids"]).square().sum().backward()
    same(plain, tables)
    assert plain.counts == tables.counts
