"""Splitting a batch changes when things happen, not what becomes of a row; and it is left where it does not pay."""

from __future__ import annotations

import dataclasses
import faulthandler
import itertools
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.embeddings.test_device_rows import DeviceCase, close
from tests.embeddings.twins import Batch, Case, same, same_seen
from tests.tiers.shelf import Shelf
from vitalfew.core import StorageError
from vitalfew.data import Encoded
from vitalfew.embeddings import (
    DLRM,
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
from vitalfew.embeddings.split import Part, SplitBatches
from vitalfew.embeddings.splitting import SplitChoice, SplitPlan, split_batch, split_pays, take_samples
from vitalfew.tiers import LFU, LRU, Belady, Chaos, Dram, File, LookAhead, Policy

Refuses = Callable[..., AbstractContextManager[None]]
DATA = Path(os.environ.get("VITALFEW_DATA", Path(__file__).parents[3] / "shared" / "data")) / "recsys"
QUICK = settings(max_examples=40)


@pytest.fixture(autouse=True)
def watched() -> Iterator[None]:
    """End a test that hangs, and let none leave a thread."""
    faulthandler.dump_traceback_later(300, exit=True)
    before = set(threading.enumerate())
    yield
    faulthandler.cancel_dump_traceback_later()
    assert set(threading.enumerate()) <= before


# -- what is decided: pure functions


@QUICK
@given(seed=st.integers(0, 2**32))
def test_popular_samples_are_those_with_all_rows_here(seed: int) -> None:
    dice = np.random.default_rng(seed)
    here, width = dice.random(30) < dice.random(), int(dice.integers(1, 4))
    for jagged in (False, True):
        sizes = dice.integers(0, 4, 20) if jagged else np.full(20, width)
        edges = np.concatenate([[0], np.cumsum(sizes)])
        rows = dice.integers(0, 30, edges[-1])
        popular, rest = split_batch(rows, edges if jagged else None, width, here.astype(np.uint8))
        want = [all(here[row] for row in rows[a:b]) for a, b in itertools.pairwise(edges)]
        assert popular.tolist() == [k for k in range(20) if want[k]]
        assert rest.tolist() == [k for k in range(20) if not want[k]]
        assert popular.dtype == rest.dtype == np.int64


SECONDS = st.floats(0, 10)


@given(compute=SECONDS, gather=SECONDS, fixed=SECONDS, popular=st.floats(0, 1))
def test_splitting_hides_at_most_what_there_is_to_hide(
    compute: float, gather: float, fixed: float, popular: float
) -> None:
    found = split_pays(compute=compute, gather=gather, popular=popular, fixed=fixed)
    assert found.base == compute + gather
    assert found.prefetch <= found.split + 1e-9, "reading ahead hides the same gathering without a second part"
    assert found.split >= found.base - min(gather, compute) - 1e-9
    if fixed >= gather or popular in (0, 1):
        assert not found.split < found.base - 1e-9
    free = split_pays(compute=compute, gather=gather, popular=popular)
    assert free.split <= found.split + 1e-9
    more = split_pays(compute=compute, gather=gather, popular=(1 + popular) / 2)
    assert popular in (0, 1) or more.split <= free.split + 1e-9


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"popular": 1.5}, "1.5"), ({"popular": float("nan")}, "nan"), ({"gather": -1.0}, "-1.0"),
     ({"compute": float("nan")}, "nan")],
)  # fmt: skip
def test_figures_that_cannot_be_are_refused(refuses: Refuses, wrong: dict[str, float], says: str) -> None:
    with refuses(says):
        split_pays(**{"compute": 1.0, "gather": 1.0, "popular": 0.5} | wrong)


def plan(choice: SplitChoice, *, whole: float, longer: float, popular: int = 5) -> SplitPlan:
    """Play one batch of ten samples that takes so much longer in parts."""
    split, on_trial = choice.next()
    found = SplitPlan(split, on_trial, np.arange(popular), np.arange(popular, 10), 4.0)
    found.step = whole + longer * found.comes_in_parts
    choice.saw(found)
    return found


def test_trials_decide_and_are_held_again() -> None:
    choice = SplitChoice("auto")
    splits = [plan(choice, whole=8.0, longer=-1.0 if k < 500 else 0.5).split for k in range(1000)]
    assert splits[:28] == 14 * [False, True]
    assert all(splits[28:328])
    assert not all(splits[328:352])
    assert not any(splits[680:900]), "parts take longer by then"
    assert choice.measured == {"whole": 8.0, "split": 8.5, "gather": 4.0, "popular": 0.5}
    again = SplitChoice("auto")
    again.load_state_dict(choice.state_dict())
    assert again.measured == choice.measured
    assert again.next() == choice.next()


@pytest.mark.parametrize("popular", [0, 10])
def test_batches_in_one_part_gain_nothing(popular: int) -> None:
    choice = SplitChoice("auto")
    for k in range(30):
        plan(choice, whole=8.0 - k % 2, longer=-9.0, popular=popular)
    assert choice.measured
    assert not choice.pays


# -- cutting batches


class Pair(NamedTuple):
    ids: torch.Tensor
    label: torch.Tensor


@dataclasses.dataclass
class Record:
    ids: torch.Tensor
    label: torch.Tensor
    day: int = 3


def test_batches_of_many_kinds_can_be_cut() -> None:
    ids, label, some = torch.arange(8).reshape(4, 2), torch.arange(4.0), np.array([1, 3])
    for batch in ({"ids": ids, "label": label}, Pair(ids, label), Record(ids, label), (ids, label), [ids, label]):
        found = take_samples(batch, some, 4)
        assert type(found) is type(batch)
        parts = [found["ids"], found["label"]] if isinstance(found, dict) else None
        parts = parts or ([found.ids, found.label] if isinstance(found, Record) else list(found))
        assert parts[0].tolist() == [[2, 3], [6, 7]]
        assert parts[1].tolist() == [1.0, 3.0]
    encoded = Encoded(np.zeros((4, 0), np.float32), np.arange(6), np.array([0, 1, 3, 3, 6]))
    assert take_samples(encoded, some, 4).offsets.tolist() == [0, 2, 5]
    assert take_samples({"a": None, "b": 7, "c": torch.tensor(2), "d": ids.numpy()}, some, 4)["d"].shape == (2, 2)


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"ids": torch.arange(6), "offsets": torch.tensor([0, 1, 3, 3, 6])}, "`ids` has 6 lines and the batch 4"),
        ([torch.zeros(4), torch.zeros(5)], "item 1 has 5 lines"),
        ({"ids": torch.zeros(4), "model": object()}, "`model` is a object"),
        (torch.zeros(5), "the batch has 5 lines"),
    ],
)
def test_what_cannot_be_cut_is_named(refuses: Refuses, batch: Any, says: str) -> None:
    with refuses(says):
        take_samples(batch, np.array([1]), 4)


# -- the same bits


def cut(batch: Batch, numbers: np.ndarray, features: int) -> Batch:
    """Take samples of a batch of `Case`, the slow way."""
    if batch["offsets"] is None:
        picked = [int(k) * features + f for k in numbers for f in range(features)]
        ids, offsets = batch["ids"][torch.from_numpy(numbers)], None
    else:
        edges = batch["offsets"].tolist()
        bags = [int(k) * features + f for k in numbers for f in range(features)]
        picked = [i for bag in bags for i in range(edges[bag], edges[bag + 1])]
        ids = batch["ids"][torch.tensor(picked, dtype=torch.int64)]
        offsets = torch.tensor(np.cumsum([0, *[edges[bag + 1] - edges[bag] for bag in bags]]))
    weights = None if batch["weights"] is None else [batch["weights"][i] for i in picked]
    return {"ids": ids, "offsets": offsets, "weights": weights, "rows": [batch["rows"][i] for i in picked]}


def slopes(k: int, samples: int, features: int, dim: int) -> torch.Tensor:
    return torch.randn((samples, features, dim), generator=torch.Generator().manual_seed(k))


def whole_parts(batches: Iterable[Batch], features: int) -> Iterator[Iterator[Part[Batch]]]:
    for batch in batches:
        n = len(batch["ids"]) if batch["offsets"] is None else (len(batch["offsets"]) - 1) // features
        yield iter([Part(batch, np.arange(n), 1.0, "whole")])


def train(case: Case, tables: EmbeddingBags, loader: Iterable[Iterable[Part[Batch]]]) -> list[torch.Tensor]:
    """Train with gradients that depend on sample and batch alone, two forwards each; return what a user sees."""
    seen, features = [], len(tables.features)
    for k, parts in enumerate(loader):
        outs, numbers = [], []
        for part in parts:
            weights = None if part.batch["weights"] is None else torch.tensor(part.batch["weights"])
            loss: torch.Tensor | float = 0.0
            for turn in range(1 + k % 2):
                out = tables(part.batch["ids"], part.batch["offsets"], weights)
                slope = slopes(2 * k + turn, 8, features, tables.dim)[torch.from_numpy(part.samples)]
                loss = loss + (out * slope.to(out)).sum()
            if k % 3 == 0:
                with torch.no_grad():
                    tables(part.batch["ids"], part.batch["offsets"])
            loss.backward()
            outs.append(out.detach().cpu())
            numbers.append(torch.from_numpy(part.samples))
        seen.append(torch.cat(outs)[torch.cat(numbers).argsort()])
        assert torch.cat(numbers).sort().values.tolist() == list(range(len(seen[-1])))
        if (k + 1) % case.every == 0 or k + 1 == len(case.batches):
            if k % 2:
                seen.append(torch.tensor(clip_grad_norm([], tables, 0.5)))
            tables.step()
        if isinstance(tables, TieredEmbeddings):
            with tables.store.lock:
                tables.store.check()
    return seen


def compare(case: Case, folder: Path, when: str, *, device: str = "cpu") -> SplitBatches[Batch]:
    case.update = "step"
    plain = case.plain()
    features = len(plain.features)
    want = [each for _ in range(2) for each in train(case, plain, whole_parts(case.batches, features))]
    with case.tiered(folder) as tiered:
        take = lambda batch, numbers: cut(batch, numbers, features)  # noqa: E731
        with SplitBatches(tiered, case.batches, take=take, when=when) as split:  # type: ignore[arg-type]
            found = [each for _ in range(2) for each in train(case, tiered, split)]
        if device == "cpu":
            same_seen(found, want)
        if device == "cpu" or not isinstance(case.optimizer, RowwiseAdagrad):
            same(plain, tiered)
        elif case.dtype == torch.float32:
            close(plain, tiered)
        assert plain.counts == tiered.counts
        assert tiered.store.residency.num_held == 0
    assert split.given == 2 * len(case.batches)
    return split


@pytest.mark.parametrize("when", ["always", "auto", "never"])
@QUICK
@given(seed=st.integers(0, 2**32))
def test_rows_become_what_they_would_unsplit(when: str, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        compare(Case.drawn(seed, update="step"), Path(folder), when)


@pytest.mark.slow
@settings(QUICK, max_examples=150)
@given(seed=st.integers(0, 2**32))
def test_rows_become_what_they_would_unsplit_in_many_cases(seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        compare(Case.drawn(seed, update="step"), Path(folder), "always")


@pytest.mark.parametrize("policy", [LRU(), LFU(2), LookAhead(3), Belady(), Chaos(1)], ids=lambda p: p.name)
@pytest.mark.parametrize("rule", [SGD(0.1, weight_decay=0.01), RowwiseAdagrad(0.1), Adagrad(0.1), LazyAdam(0.1)])
def test_every_rule_and_policy(tmp_path: Path, rule: Optimizer, policy: Policy) -> None:
    split = 0
    for seed in range(4):
        case = {"optimizer": rule, "policy": policy, "kind": "file", "every": 1, "update": "step", "ahead": seed % 2}
        split += compare(Case.drawn(seed + 40, **case), tmp_path / str(seed), "always").split
    assert split > 0, "some of them have come in parts"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], scope="module")
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


@settings(QUICK, max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_rows_on_a_device_become_what_they_would_unsplit(device: str, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        compare(DeviceCase.drawn(seed, update="step", device=device), Path(folder), "always", device=device)


# -- whole models


def click_batches(count: int, size: int, num_rows: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [
        {
            "dense": torch.randn((size - k % 3, 4), generator=draw),
            "ids": (torch.rand((size - k % 3, 3), generator=draw) ** 3 * num_rows).long(),
            "label": (torch.rand(size - k % 3, generator=draw) < 0.4).float(),
        }
        for k in range(count)
    ]


def model_of(tables: EmbeddingBags) -> DLRM:
    return DLRM(tables, dense_in=4, bottom=(16, 8), top=(16, 1), generator=torch.Generator().manual_seed(1))


def loss_of(model: DLRM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(model(batch["dense"], batch["ids"]), batch["label"])


def test_a_whole_model_agrees_within_rounding_in_each_step(tmp_path: Path) -> None:
    tables = [Table(name, 60, 8) for name in "abc"]
    batches = click_batches(20, 32, 60)
    seed = torch.Generator()
    plain = EmbeddingBags(tables, Adagrad(0.05), update="step", generator=seed.manual_seed(0))
    tiered = TieredEmbeddings(
        tables, Adagrad(0.05), tiers=[Dram(100), File(tmp_path)], ahead=0, update="step", generator=seed.manual_seed(0)
    )
    models = [model_of(plain), model_of(tiered)]
    steppers = [torch.optim.SGD([p for p in model.parameters()], 0.1) for model in models]  # noqa: C416
    with SplitBatches(tiered, batches, when="always", model=models[1]) as split:
        for batch, parts in zip(batches, split, strict=True):
            want = loss_of(models[0], batch)
            want.backward()
            found = 0.0
            for part in parts:
                loss = loss_of(models[1], part.batch) * part.share
                loss.backward()
                found += loss.item()
            assert found == pytest.approx(want.item(), rel=1e-6), "a mean of means, weighted"
            a, b = (torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) for model in models)
            assert float((a - b).norm()) <= 1e-6 * float(a.norm())
            for each, stepper in zip((plain, tiered), steppers, strict=True):
                each.step()
                stepper.step()
                stepper.zero_grad()
            for name in "abc":
                a, b = plain.rows_of(name), tiered.rows_of(name)
                assert float((a - b).norm()) <= 1e-6 * float(a.norm())
                plain.rows_of(name).copy_(b)  # each step by itself
            models[0].load_state_dict({k: v for k, v in models[1].state_dict().items() if "tables" not in k}, False)
            for name, column in tiered.columns(0, plain.num_rows).items():
                if name in plain.rows.state:
                    plain.rows.state[name].copy_(column)
    assert split.split > 10


# -- order, and once


def make(slots: int = 8, *, shelf: Shelf | None = None, **more: Any) -> TieredEmbeddings:
    more = {"generator": torch.Generator().manual_seed(0), "update": "step", "ahead": 0} | more
    return TieredEmbeddings([Table("a", 50, 2)], SGD(0.5), tiers=[Dram(slots), shelf or Shelf()], **more)


def batches(count: int, size: int = 3, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    dice = random.Random(seed)
    return [
        {"ids": torch.tensor([[int(dice.random() ** 3 * 50)] for _ in range(size)]), "k": torch.tensor(k)}
        for k in range(count)
    ]


def learn(tables: EmbeddingBags, batch: dict[str, torch.Tensor], numbers: np.ndarray) -> None:
    (tables(batch["ids"])[:, 0] * slopes(int(batch["k"]), 9, 1, 2)[torch.from_numpy(numbers), 0]).sum().backward()


def right(tables: TieredEmbeddings, trained: Iterable[dict[str, torch.Tensor]]) -> None:
    """Compare with all rows in memory after the same batches."""
    plain = EmbeddingBags([Table("a", 50, 2)], SGD(0.5), generator=torch.Generator().manual_seed(0), update="step")
    for batch in trained:
        learn(plain, batch, np.arange(len(batch["ids"])))
        plain.step()
    assert torch.equal(plain.rows_of("a"), tables.rows_of("a"))
    tables.store.check()
    assert tables.store.residency.num_held == 0


def loop(tables: TieredEmbeddings, split: Any, trained: list[int] | None = None) -> list[list[tuple[str, list[int]]]]:
    """Train; return kinds and samples of each batch's parts, and note in `trained` which batches are done."""
    found = []
    for parts in split:
        mine = []
        for part in parts:
            learn(tables, part.batch, part.samples)
            mine.append((part.kind, part.samples.tolist()))
            k = int(part.batch["k"])
        tables.step()
        found.append(mine)
        if trained is not None:
            trained.append(k)
    return found


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("policy", [LRU(), LookAhead(5), Belady(), Chaos(3)], ids=lambda p: p.name)
def test_every_sample_comes_once_the_popular_first(policy: Policy, ahead: int) -> None:
    tables, content = make(policy=policy, ahead=ahead), [*batches(23), *batches(1, 2, seed=1)]
    split, trained = SplitBatches(tables, content, when="always"), []
    assert len(split) == 24
    found = loop(tables, split, trained) + loop(tables, split, trained)
    assert trained == 2 * [int(batch["k"]) for batch in content]
    for parts, batch in zip(found, content + content, strict=True):
        assert sorted(k for _, numbers in parts for k in numbers) == list(range(len(batch["ids"])))
        assert all(numbers == sorted(numbers) for _, numbers in parts)
        assert [kind for kind, _ in parts] in (["popular", "rest"], ["popular"], ["rest"])
    assert split.split == sum(len(parts) == 2 for parts in found) > 0
    assert split.samples == sum(len(batch["ids"]) for batch in content + content)
    assert split.popular == sum(len(n) for parts in found for kind, n in parts if kind == "popular")
    right(tables, content + content)


def test_each_row_of_a_batch_gets_one_update() -> None:
    tables, content = make(), batches(30, 6)
    split = SplitBatches(tables, content, when="always")
    loop(tables, split)
    assert split.split > 10
    assert tables.counts.rows_updated == sum(len(batch["ids"].unique()) for batch in content)
    times = torch.zeros(50, dtype=torch.int64)
    for batch in content:
        times[batch["ids"].unique()] += 1
    assert tables.rows.columns(np.arange(50))["stats"][:, 0].tolist() == times.tolist()


def test_all_and_none_may_be_popular() -> None:
    content = [{"ids": torch.tensor([[i] for i in ids]), "k": torch.tensor(k)} for k, ids in enumerate(
        [(1, 2, 3), (3, 1), (4, 5, 6), (7, 4, 8, 4)])]  # fmt: skip
    tables = make(9)
    assert loop(tables, SplitBatches(tables, content, when="always")) == [
        [("rest", [0, 1, 2])], [("popular", [0, 1])], [("rest", [0, 1, 2])], [("popular", [1, 3]), ("rest", [0, 2])],
    ]  # fmt: skip
    right(tables, content)


def test_what_is_popular_follows_from_ids_alone() -> None:
    content, found = batches(30, 4), []
    for run in range(6):
        dice = random.Random(run)
        pause = lambda dice=dice, run=run: dice.random() * 2e-3 * (run > 0)  # noqa: E731
        shelf = Shelf(lambda what, pause=pause: bool(time.sleep(pause())))
        tables = make(9, shelf=shelf, policy=LookAhead(4))
        found.append((loop(tables, SplitBatches(tables, content, when="always")), repr(tables.moves)))
        right(tables, content)
    assert all(each == found[0] for each in found)


def test_the_popular_part_does_not_wait_for_the_rows_of_the_rest() -> None:
    computed = threading.Event()
    shelf = Shelf(lambda what: what == "read" and not computed.wait(30))
    tables = make(4, shelf=shelf, policy=LRU())
    content = [
        {"ids": torch.tensor([[i] for i in ids]), "k": torch.tensor(k)}
        for k, ids in enumerate([(1, 2), (3, 4), (5, 3), (1, 3)])
    ]
    computed.set()
    kinds: list[str] = []
    for parts in SplitBatches(tables, content, when="always"):
        for part in parts:
            learn(tables, part.batch, part.samples)
            kinds.append(part.kind)
            if len(kinds) == 4:  # the third batch is done, the row 1 of the last lies below
                computed.clear()
            if len(kinds) == 5:
                assert part.kind == "popular"
                assert not computed.is_set(), "row 1 has not been read, and row 3 has been computed with"
                computed.set()
        tables.step()
    assert kinds == ["rest", "rest", "popular", "rest", "popular", "rest"]
    right(tables, content)


def test_never_gives_whole_batches() -> None:
    tables, content = make(), batches(12)
    assert loop(tables, SplitBatches(tables, content, when="never")) == 12 * [[("whole", [0, 1, 2])]]
    right(tables, content)


def test_batches_without_samples_are_given() -> None:
    content = [batches(1, size, seed=size)[0] for size in (3, 0, 4, 0)]
    for batch in content:
        batch["ids"] = batch["ids"].reshape(-1, 1).long()
    tables = make()
    found = loop(tables, SplitBatches(tables, content, when="always"))
    assert [sum(len(numbers) for _, numbers in parts) for parts in found] == [3, 0, 4, 0]
    right(tables, content)


# -- errors in their place


class Breaks:
    def __init__(self, content: list[dict[str, torch.Tensor]], at: int) -> None:
        self.content, self.at = content, at

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        yield from self.content[: self.at]
        raise ZeroDivisionError(f"batch {self.at}")


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("at", [0, 1, 9])
def test_an_error_of_the_loader_comes_where_its_batch_would(at: int, ahead: int) -> None:
    content, tables, trained = batches(20), make(ahead=ahead), []
    with pytest.raises(ZeroDivisionError, match=f"batch {at}"):
        loop(tables, SplitBatches(tables, Breaks(content, at), when="always"), trained)
    assert trained == list(range(at))
    right(tables, content[:at])
    loop(tables, SplitBatches(tables, content[at:], when="always"))
    right(tables, content)


@pytest.mark.parametrize("what", ["read", "write"])
def test_an_error_of_the_disk_undoes_the_batch_it_comes_in(what: str) -> None:
    for wait in range(0, 8, 2):
        left = wait

        def fails(deed: str) -> bool:
            nonlocal left
            left -= deed == what
            return left < 0 and deed == what

        content, tables, trained = batches(30, 4), make(7, shelf=Shelf(fails)), []
        with pytest.raises(StorageError, match="the shelf broke"):
            loop(tables, SplitBatches(tables, content, when="always"), trained)
        left = 10**9
        assert trained
        right(tables, content[: len(trained)])
        loop(tables, SplitBatches(tables, content[len(trained) :], when="always"))
        right(tables, content)


def test_rows_beside_the_part_cannot_come_once_the_thread_has_failed(refuses: Refuses) -> None:
    broken = threading.Event()
    tables = make(4, shelf=Shelf(lambda what: broken.is_set()), policy=LRU())
    content = [{"ids": torch.tensor([[i] for i in ids])} for ids in [(1, 2), (3, 4), (5, 3), (1, 3)]]
    split = SplitBatches(tables, content, when="always")
    with refuses("the rows of batch 3 have not come"):
        for k, parts in enumerate(split):
            for part in parts:
                if k == 3:
                    while split._reader.run._failure is None:
                        time.sleep(1e-3)
                    broken.clear()
                    tables(torch.tensor([[9]]))
                tables(part.batch["ids"]).sum().backward()
            tables.step()
            if k == 2:
                broken.set()
    assert tables.store.residency.num_held == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, GeneratorExit])
@pytest.mark.parametrize("stage", ["popular", "rest", "between"])
def test_the_loop_may_be_left_and_begun_again(error: type[BaseException], stage: str) -> None:
    content, tables, trained = batches(20), make(), []
    split = SplitBatches(tables, content, when="always")
    with split, pytest.raises(error):  # noqa: PT012
        for k, parts in enumerate(split):
            for part in parts:
                learn(tables, part.batch, part.samples)
                if k >= 5 and part.kind == stage:
                    raise error
            tables.step()
            trained.append(content[k])
            if k >= 5 and stage == "between":
                raise error
    assert len(trained) >= 5
    right(tables, trained)
    loop(tables, split)
    right(tables, trained + content)


def test_breaking_out_of_both_loops_leaves_nothing_behind() -> None:
    content, tables = batches(20), make()
    split = SplitBatches(tables, content, when="always")
    for parts in split:
        part = next(parts)
        learn(tables, part.batch, part.samples)
        if part.kind == "popular":
            break
        tables.step()
    del parts
    done = split.given - 1
    right(tables, content[:done])
    out = tables(torch.tensor([[1], [2], [3], [4]]))  # of no part
    del out
    loop(tables, SplitBatches(tables, content[done:], when="always"))
    right(tables, content)


def test_samples_cannot_be_left_out(refuses: Refuses) -> None:
    content, tables = batches(20), make()
    with refuses("before all parts of this one"):
        for parts in SplitBatches(tables, content, when="always"):
            for part in parts:
                learn(tables, part.batch, part.samples)
                break
            tables.step()
    with refuses("before all parts of this one"):
        for _ in SplitBatches(make(), content, when="always"):
            pass


def test_a_step_between_the_parts_is_refused(refuses: Refuses) -> None:
    tables = make()
    with refuses("rows were updated between the parts"):
        for parts in SplitBatches(tables, batches(20), when="always"):
            for part in parts:
                learn(tables, part.batch, part.samples)
                tables.step()


def test_other_samples_than_the_parts_are_refused(refuses: Refuses) -> None:
    tables = make(20)
    with refuses("a part of 2 samples looks up 3 bags of 1 features"):
        for parts in SplitBatches(tables, batches(20), when="always"):
            for part in parts:
                if part.kind != "popular" or len(part.samples) != 2 or part.share == 1:
                    learn(tables, part.batch, part.samples)
                    continue
                tables(torch.tensor([[1], [2], [3]]))
            tables.step()


def test_gradients_that_wait_at_the_end_are_not_dropped_in_silence(refuses: Refuses) -> None:
    tables = make(40)
    with refuses("waited for a step when the loop ended"):
        for parts in SplitBatches(tables, batches(5), when="always"):
            for part in parts:
                learn(tables, part.batch, part.samples)


def test_closed_inside_its_loop_says_so(refuses: Refuses) -> None:
    tables = make()
    split = SplitBatches(tables, batches(20), when="always")
    with refuses("closed inside its own loop"):
        for parts in split:
            for part in parts:
                if part.kind == "popular" and part.share < 1:
                    split.close()
                else:
                    learn(tables, part.batch, part.samples)
            tables.step()
    assert split.close() == 0


def test_wrong_use_is_told_at_once(refuses: Refuses) -> None:
    with refuses("update='backward'"):
        SplitBatches(make(update="backward"), [])
    with refuses("EmbeddingBags has nothing to read ahead"):
        SplitBatches(EmbeddingBags([Table("a", 5, 2)], SGD(0.1), update="step"), [])  # type: ignore[arg-type]
    with refuses("'sometimes'"):
        SplitBatches(make(), [], when="sometimes")  # type: ignore[arg-type]
    layers = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.LayerNorm(2), nn.BatchNorm1d(2)))
    with refuses("`1.1` is a batch norm"):
        SplitBatches(make(), [], model=layers)
    SplitBatches(make(), [], model=layers[0])
    tables = make()
    with refuses("`offsets` has"):
        content = [{"offsets": torch.arange(4), "ids": batch["ids"].flatten()} for batch in batches(20)]
        for parts in SplitBatches(tables, content, when="always"):
            for part in parts:
                tables(part.batch["ids"], part.batch["offsets"]).sum().backward()
            tables.step()


def test_another_loop_over_the_tables_is_refused(refuses: Refuses) -> None:
    tables, content = make(), batches(4)
    for parts in SplitBatches(tables, content):
        for part in parts:
            learn(tables, part.batch, part.samples)
        tables.step()
        with refuses("another Prefetch reads ahead"):
            next(iter(Prefetch(tables, content)))


# -- what is told


def test_a_receipt_tells_what_was_split_and_what_was_declined() -> None:
    tables, content = make(), batches(200)
    split = SplitBatches(tables, content, when="auto")
    found = loop(tables, split)
    right(tables, content)
    receipt = split.receipt()
    lines = {line.what: line for line in receipt.lines}
    assert lines["batches split"].after == sum(len(parts) == 2 for parts in found)
    assert (lines["samples with all rows in memory"].before, lines["samples with all rows in memory"].after) == (
        split.samples, split.popular,
    )  # fmt: skip
    choice = split._choice
    assert choice.measured
    assert lines["step in the last trial"].how == "measured"
    assert bool(receipt.declined) is not choice.pays
    if receipt.declined:
        assert "in a trial a step took" in receipt.declined[0].reason
    again = SplitBatches(tables, content)
    again.load_state_dict(split.state_dict())
    assert again.state_dict() == split.state_dict()


@pytest.mark.data
def test_bits_on_a_real_log(tmp_path: Path) -> None:
    import gzip

    path = DATA / "frappe" / "validation.libfm.gz"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    with gzip.open(path, "rt") as file:
        lines = [line.split() for _, line in zip(range(12 * 128 + 50), file, strict=False)]
    ids = torch.tensor([[int(cell.partition(":")[0]) for cell in line[1:]] for line in lines])
    content = [{"ids": ids[k : k + 128], "k": torch.tensor(k)} for k in range(0, len(ids), 128)]
    found = []
    most = max(len(batch["ids"].unique()) for batch in content)
    for tiers in (None, [Dram(most + 50), File(tmp_path)]):
        tables: EmbeddingBags
        table = [Table("all", 5400, 16, features=tuple("abcdefghij"))]
        more = {"update": "step", "generator": torch.Generator().manual_seed(0)}
        if tiers is None:
            tables = EmbeddingBags(table, RowwiseAdagrad(0.1), **more)
            loader: Any = ([Part(batch, np.arange(len(batch["ids"])), 1.0, "whole")] for batch in content)
        else:
            tables = TieredEmbeddings(table, RowwiseAdagrad(0.1), tiers=tiers, ahead=0, **more)
            loader = split = SplitBatches(tables, content, when="always")
        for parts in loader:
            for part in parts:
                slope = slopes(int(part.batch["k"]), 128, 10, 16)[torch.from_numpy(part.samples)]
                (tables(part.batch["ids"]) * slope).sum().backward()
            tables.step()
        found.append(tables.columns(0, 5400))
    assert split.split > 5
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
