"""Stale rows: off means bit-identical, nothing in warm-up, frozen means untouched, drift revives, no clock decides."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.embeddings.twins import Case, same, same_seen, train
from tests.tiers.shelf import Shelf
from vitalfew.data.encoded import Encoded
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
from vitalfew.embeddings.samples import join_batches, take_samples
from vitalfew.embeddings.stale import SkipStale
from vitalfew.embeddings.staleness import (
    RowHistory,
    logit_shift,
    next_threshold,
    on_probation,
    skippable_inputs,
    stale_rows,
)
from vitalfew.tiers import Belady, Dram, Hbm, LookAhead

Refuses = Callable[..., AbstractContextManager[None]]
RULES = [SGD, RowwiseAdagrad, Adagrad, LazyAdam]
EAGER: dict[str, Any] = {"every": 4, "warm_up": 6, "min_visits": 2, "windows": 2, "watch": 1.0}


def make(num_rows: int = 40, rule: Optimizer | None = None, *, tiered: int = 0, **more: Any) -> Any:
    settings = {"generator": torch.Generator().manual_seed(0)} | more
    tables, optimizer = [Table("user", num_rows, 3), Table("item", num_rows, 3)], rule or SGD(0.1)
    if not tiered:
        return EmbeddingBags(tables, optimizer, **settings)
    settings = {"policy": LookAhead(3), "ahead": 1} | settings
    return TieredEmbeddings(tables, optimizer, tiers=[Dram(tiered), Shelf()], **settings)


def goal(row: torch.Tensor) -> torch.Tensor:
    """What each row goes to."""
    return torch.sin(row.float() * 7)[..., None] + 2


def step(tables: EmbeddingBags, ids: torch.Tensor) -> None:
    """Pull rows to their goals, so that they move fast at first and settle."""
    (0.5 * (tables(ids) - goal(ids)) ** 2).sum().backward()


def skewed(count: int, size: int = 8, num_rows: int = 40, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    dice = random.Random(seed)
    return [
        {
            "ids": torch.tensor([[int(dice.random() ** 3 * num_rows) for _ in range(2)] for _ in range(size)]),
            "number": torch.arange(k * size, (k + 1) * size),
        }
        for k in range(count)
    ]


def weights(tables: EmbeddingBags) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in tables.columns(0, tables.num_rows).items() if name != "stats"}


def equal(a: EmbeddingBags, b: EmbeddingBags) -> None:
    for name, column in weights(a).items():
        assert torch.equal(column, weights(b)[name]), name


# -- I4: off means off


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("off", [{"max_change": 0.0}, {"warm_up": math.inf}])
def test_without_staleness_training_is_bit_identical(seed: int, off: dict[str, float], tmp_path: Path):
    case = Case.drawn(seed, optimizer=RULES[seed % 4](0.1))
    settings = {"every": 1, "min_visits": 1, "windows": 1, "warm_up": 0, "watch": 1.0} | off
    plain, memory, tiered = case.plain(), case.plain(), case.tiered(tmp_path)
    seen = train(case, plain, case.batches)
    with SkipStale(memory, **settings) as stale:
        same_seen(seen, train(case, memory, case.batches))
        assert stale.window == memory.counts.steps
    equal(plain, memory)
    with SkipStale(tiered, **settings), Prefetch(tiered, case.batches) as batches:
        same_seen(seen, train(case, tiered, batches))
    same(plain, tiered)
    assert memory.counts.rows_frozen == tiered.counts.rows_frozen == 0
    tiered.close()


@pytest.mark.parametrize("tiered", [0, 20])
def test_without_staleness_inputs_come_as_they_are(tiered: int):
    loader, tables, plain = skewed(20), make(tiered=tiered), make()
    for batch in loader:
        step(plain, batch["ids"])
    with SkipStale(tables, mode="inputs", **EAGER | {"max_change": 0.0}) as stale:
        passed = stale.inputs(loader)
        for k, batch in enumerate(Prefetch(tables, passed) if tiered else passed):
            assert batch is loader[k]
            step(tables, batch["ids"])
    equal(plain, tables)
    assert stale.samples_seen == 160
    assert not stale.samples_skipped


# -- what is stale


def test_nothing_is_stale_in_warm_up():
    tables = make()
    with SkipStale(tables, **EAGER | {"warm_up": 40, "max_change": 1e9}) as stale:
        for _ in range(39):
            step(tables, torch.tensor([[1, 1]]))
        assert stale.num_stale == 0
    assert tables.counts.rows_frozen == 0


@given(st.integers(0, 2**31), st.floats(0, 2), st.integers(1, 5), st.integers(0, 50), st.integers(1, 4))
def test_laws_of_stale_rows(seed: int, limit: float, least: int, warm: int, windows: int):
    dice = np.random.default_rng(seed)
    h = RowHistory.of(30)
    h.change[:], h.peak[:] = dice.random((2, 30)) * 2
    h.recent[:], h.visits[:], h.quiet[:] = dice.integers(0, 9, 30), dice.integers(0, 60, 30), dice.integers(0, 4, 30)
    rule = {"max_change": limit, "min_visits": least, "warm_up": warm, "windows": windows}
    found = stale_rows(h, **rule)
    assert (found <= ((h.change < limit) & (h.peak >= limit) & (h.recent >= least) & (h.visits >= warm))).all()
    assert (found <= (h.quiet + 1 >= windows)).all()
    for harder in ({"windows": windows + 1}, {"warm_up": warm + 9}, {"min_visits": least + 2}, {"warm_up": math.inf}):
        assert (stale_rows(h, **rule | harder) <= found).all()
    assert not stale_rows(h, **rule | {"max_change": 0.0}).any()


def test_rows_that_have_not_begun_to_learn_are_not_stale():
    tables = make(10, SGD(1e-4))
    with SkipStale(tables, **EAGER) as stale:
        for _ in range(200):
            step(tables, torch.tensor([[1, 1], [2, 3]]))
        change = stale.watched.history.change
        assert change.max() < 0.1  # what a naive rule calls stale
        assert stale.num_stale == stale.most_stale == 0
        receipt = stale.receipt()
    assert receipt.verdict == "no saving"
    assert "declined" in receipt.why
    assert "relative change of 4 watched rows" in receipt.notes[0]


def test_rows_become_stale_when_they_have_settled():
    tables = make(10)
    with SkipStale(tables, **EAGER) as stale:
        for _ in range(40):
            step(tables, torch.tensor([[1, 1], [2, 3]]))
        assert stale.num_stale == 4
        assert stale.receipt().verdict == "undecided"
    assert stale.watched.ids.tolist() == [1, 2, 11, 13]


def test_rows_that_settled_before_they_were_watched_are_stale():
    tables = make(10, SGD(0.6))
    with SkipStale(tables, **EAGER | {"every": 10}) as stale:
        for _ in range(40):
            step(tables, torch.tensor([[1, 1], [2, 3]]))
        assert stale.watched.history.change.max() < 0.01
        assert stale.num_stale == 4


@pytest.mark.parametrize("revisit", [1, 2, 5])
@pytest.mark.parametrize("tiered", [0, 20])
def test_a_row_that_drifts_is_revived(revisit: int, tiered: int):
    tables = make(10, tiered=tiered)
    ids = torch.tensor([[1, 1], [2, 3]])
    with SkipStale(tables, **EAGER, revisit=revisit) as stale:
        for _ in range(60):
            step(tables, ids)
        assert stale.num_stale == 4
        before, window = tables.rows_of("item")[3].clone(), stale.window
        while not stale.revived:
            target = goal(ids)
            target[1, 1] += 3  # where item 3 goes from now on
            (0.5 * (tables(ids) - target) ** 2).sum().backward()
            assert stale.window - window <= revisit
        assert stale.revived == 1
        assert 13 not in stale.watched.ids[stale.watched.stale]
        assert (tables.rows_of("item")[3] > before + 0.2).all()


@given(st.lists(st.integers(0, 2**40), unique=True), st.integers(1, 12), st.integers(0, 99), st.integers(0, 9))
def test_each_row_has_its_turn_once(rows: list[int], revisit: int, window: int, seed: int):
    turns = [on_probation(np.array(rows, np.int64), window + k, revisit, seed) for k in range(revisit)]
    assert (np.sum(turns, axis=0) == 1).all()


def test_rows_that_are_new_among_the_most_visited_are_watched():
    tables = make()
    with SkipStale(tables, **EAGER | {"watch": 4, "max_change": 0.0}, revisit=2) as stale:
        for k in range(16):
            step(tables, torch.tensor([[1, 1], [2, 3]]) + (0 if k < 4 else 5))
    assert stale.watched.ids.tolist() == [6, 7, 46, 48]


# -- what frozen means


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("update", ["backward", "step"])
@pytest.mark.parametrize("tiered", [0, 30])
def test_a_frozen_row_is_not_touched(rule: type[Optimizer], update: Any, dtype: torch.dtype, tiered: int):
    settings = {"update": update, "dtype": dtype, "rule": rule(0.1, weight_decay=0.01)}
    tables, plain = make(8, tiered=tiered, **settings), make(8, **settings)
    frozen = np.array([1, 8, 9, 15])
    others = np.setdiff1d(np.arange(16), frozen)
    first = weights(tables)
    for k, batch in enumerate(skewed(6, num_rows=8)):
        tables.rows.frozen = np.isin(np.arange(16), frozen).astype(np.uint8)
        rows = (batch["ids"] + torch.tensor([0, 8])).unique().numpy()
        counts = tables.counts.rows_updated, tables.counts.rows_frozen
        step(tables, batch["ids"])
        step(plain, batch["ids"])
        if update == "step":
            if k % 2:  # the clipping does not see them either
                before = weights(plain)["weight"]
                norm = clip_grad_norm([], tables, 1e9)
                assert 0 < norm < clip_grad_norm([], plain, 1e9)
                assert torch.equal(before, weights(plain)["weight"])
            tables.step()
            plain.step()
        done = tables.counts.rows_updated - counts[0], tables.counts.rows_frozen - counts[1]
        assert done == (len(np.setdiff1d(rows, frozen)), len(np.intersect1d(rows, frozen)))
    for name, column in weights(tables).items():
        assert torch.equal(column[frozen], first[name][frozen]), name
        assert torch.equal(column[others], weights(plain)[name][others]), name  # rows do not mix in these steps
    assert tables.counts.steps == plain.counts.steps


def test_the_norm_is_that_of_the_rows_in_training():
    norms = []
    for tiered in (0, 9):
        tables = make(8, tiered=tiered, update="step")
        tables.rows.frozen = np.ones(16, np.uint8)
        tables.rows.frozen[[3, 10]] = 0
        out = tables(torch.tensor([[3, 2], [3, 5], [1, 2]]))
        (out * torch.arange(18.0).reshape(3, 2, 3)).sum().backward()
        norms.append(tables.rows.grad_norm())
    user, item = torch.arange(3.0) * 2 + 6, torch.arange(3.0) * 2 + 3 + 15
    assert norms[0] == norms[1] == pytest.approx(float(torch.cat([user, item]).norm()))


def test_frozen_rows_are_not_written_back():
    tables = make(8, tiered=3)
    for _ in range(2):  # all rows have been written once
        for k in range(8):
            step(tables, torch.tensor([[k, k]]))
    tables.rows.frozen = np.ones(16, np.uint8)
    step(tables, torch.tensor([[0, 0]]))
    step(tables, torch.tensor([[1, 1]]))
    moves, written = tables.moves, tables.store.lower.traffic.bytes_written
    left, clean = moves.left, moves.clean
    for k in range(2, 8):
        step(tables, torch.tensor([[k, k]]))
    assert moves.left - left == moves.clean - clean > 0
    assert tables.store.lower.traffic.bytes_written == written


def test_undo_trains_all_rows_again():
    tables = make(10)
    stale = SkipStale(tables, **EAGER)
    for _ in range(40):
        step(tables, torch.tensor([[1, 1], [2, 3]]))
    assert tables.rows.frozen.any()
    stale.undo()
    assert not len(tables.rows.frozen)
    assert not len(tables.rows.visits)
    assert tables.rows.on_update is None
    frozen = tables.counts.rows_frozen
    step(tables, torch.tensor([[1, 1], [2, 3]]))
    assert tables.counts.rows_frozen == frozen
    assert stale.num_stale == 4  # the receipt still tells
    SkipStale(tables).undo()


def test_the_receipt_counts():
    tables = make(8, tiered=3, seed=1)
    with SkipStale(tables, **EAGER) as stale:
        for k in range(200):
            step(tables, torch.tensor([[k % 4, k % 4]]))
        lines = {line.what: line for line in stale.receipt().lines}
    updates = lines["updates of rows"]
    assert updates.before == 400
    assert updates.after == tables.counts.rows_updated < 400
    assert updates.before - updates.after == tables.counts.rows_frozen
    back = lines["row bytes written back"]
    assert back.before == tables.moves.left * tables.store.record.nbytes
    assert back.before - back.after == tables.moves.clean * tables.store.record.nbytes > 0
    assert lines["memory for snapshots, history and visits"].after > 0


# -- inputs


@given(st.integers(0, 2**31), st.integers(1, 4), st.sampled_from([0.3, 0.5, 0.8, 1.0]), st.booleans())
def test_skippable_inputs(seed: int, width: int, share: float, jagged: bool):
    dice = np.random.default_rng(seed)
    sizes = dice.integers(0, 4, 10 * width) if jagged else np.ones(10 * width, int)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    rows, stale = dice.integers(0, 12, offsets[-1]), dice.random(12) < 0.6
    found = skippable_inputs(rows, offsets if jagged else None, width, stale, share)
    for s, skip in enumerate(found):
        mine = stale[rows[offsets[s * width] : offsets[(s + 1) * width]]]
        assert skip == (len(mine) > 0 and mine.sum() >= share * len(mine))


@dataclass
class _Batch:
    ids: torch.Tensor
    offsets: torch.Tensor | None
    label: torch.Tensor


KINDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dict": lambda b: b,
    "dataclass": lambda b: _Batch(b["ids"], b["offsets"], b["label"]),
    "encoded": lambda b: Encoded(
        np.zeros((len(b["label"]), 0), np.float32), b["ids"].numpy(),
        None if b["offsets"] is None else b["offsets"].numpy(), b["label"].numpy(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("jagged", [False, True])
def test_samples_are_taken_and_joined(kind: str, jagged: bool):
    dice = random.Random(0)
    parts, expected = [], []
    for _ in range(3):
        bags = [[[dice.randrange(9) for _ in range(dice.randint(0, 3) if jagged else 1)] for _ in "ab"] for _ in "xyz"]
        flat = [bag for sample in bags for bag in sample]
        ids = torch.tensor([i for bag in flat for i in bag], dtype=torch.int64)
        label = torch.tensor([dice.random() for _ in bags])
        offsets = torch.tensor([0, *np.cumsum([len(bag) for bag in flat])]) if jagged else None
        batch = KINDS[kind]({"ids": ids if jagged else ids.reshape(3, 2), "offsets": offsets, "label": label})
        parts.append(take_samples(batch, np.array([2, 0]), 3))
        expected += [(bags[2], float(label[2])), (bags[0], float(label[0]))]
    joined = join_batches(parts)
    get = joined.get if isinstance(joined, dict) else lambda name: getattr(joined, name)
    assert type(joined) is type(batch)
    ids, label = torch.as_tensor(get("ids")).reshape(-1).tolist(), torch.as_tensor(get("label")).tolist()
    edges = range(13) if get("offsets") is None else get("offsets").tolist()
    found = [ids[a:b] for a, b in itertools.pairwise(edges)]
    assert [(found[2 * s : 2 * s + 2], value) for s, value in enumerate(label)] == expected


def test_weights_go_with_their_ids(refuses: Refuses):
    batch = {"ids": torch.tensor([7, 8, 9]), "offsets": torch.tensor([0, 0, 1, 3]), "weights": torch.arange(1, 4)}
    some = take_samples(batch, np.array([2, 1]), 3)  # as many ids as samples: a line per sample would be another cut
    assert some["ids"].tolist() == [8, 9, 7]
    assert some["weights"].tolist() == [2, 3, 1]
    joined = join_batches([some, batch])
    assert joined["weights"].tolist() == [2, 3, 1, 1, 2, 3]
    with refuses("`weights` beside bags of 3 ids"):
        take_samples(batch | {"weights": torch.ones(2)}, np.array([0]), 3)


def settled(tables: EmbeddingBags, ids: Iterable[int], **more: Any) -> SkipStale:
    """Return a handle that has found these users and items stale."""
    stale = SkipStale(tables, mode="inputs", **EAGER | {"share": 1.0, "revisit": 50} | more)
    stale._sieve.publish(-stale._sieve.lead, np.array([40 * table + i for table in (0, 1) for i in ids]))
    return stale


def test_batches_are_filled_up_with_what_follows():
    tables, loader = make(), skewed(12)
    stale = settled(tables, range(4))
    kept = [
        int(n) for b in loader for n, ids in zip(b["number"], b["ids"], strict=True) if not (ids < 4).all()
    ]  # fmt: skip
    assert 0 < len(kept) < 90
    for _ in range(2):
        found = list(stale.inputs(loader))
        assert [len(b["number"]) for b in found] == [8] * (len(kept) // 8) + [len(kept) % 8] * (len(kept) % 8 > 0)
        assert torch.cat([b["number"] for b in found]).tolist() == kept
    assert (stale.samples_seen, stale.samples_skipped) == (192, 2 * (96 - len(kept)))
    stale.undo()


def test_tuples_and_other_batches():
    tables = make()
    pairs = [(b["ids"], b["number"]) for b in skewed(6)]
    with settled(tables, range(4)) as stale:
        found = list(stale.inputs(pairs, ids=lambda b: b[0]))
        assert isinstance(found[0], tuple)
        assert all(len(ids) == len(number) for ids, number in found)
        total = sum(len(number) for _, number in found)
        lists = [list(zip(*b, strict=True)) for b in pairs]
        mine = list(
            stale.inputs(
                lists, ids=lambda b: torch.stack([x for x, _ in b]), take=lambda b, at: [b[i] for i in at],
                join=lambda parts: [x for part in parts for x in part],
            )
        )  # fmt: skip
        assert sum(map(len, mine)) == total < 48


def paced(batches: Iterable[Any], pause: float) -> Iterator[Any]:
    dice = random.Random(1)
    for batch in batches:
        time.sleep(pause * dice.random())
        yield batch


def run_inputs(tables: Any, loader: list[Any], reading: float, training: float, epochs: int = 2) -> tuple[Any, ...]:
    numbers = []
    with SkipStale(tables, mode="inputs", **EAGER, revisit=3, share=0.5) as stale:
        source = stale.inputs(_Slow(loader, reading))
        for _ in range(epochs):
            for batch in Prefetch(tables, source) if isinstance(tables, TieredEmbeddings) else source:
                time.sleep(training * random.random())
                step(tables, batch["ids"])
                numbers.append(batch["number"].tolist())
        return numbers, weights(tables), stale.samples_skipped, stale.samples_seen, stale.revived


@dataclass
class _Slow:
    content: list[Any]
    pause: float

    def __iter__(self) -> Iterator[Any]:
        return paced(self.content, self.pause)


def test_no_clock_decides_what_is_skipped():
    loader = skewed(60)
    results = [
        run_inputs(make(tiered=60), loader, *pauses) for pauses in ((0, 0), (0.003, 0), (0, 0.003), (0.001, 0.001))
    ]
    for other in results[1:]:
        assert other[0] == results[0][0]
        assert all(torch.equal(column, other[1][name]) for name, column in results[0][1].items())
        assert other[2:] == results[0][2:]
    assert 0 < results[0][2] < results[0][3] == 960


def test_skipping_with_all_rows_in_memory():
    numbers, _, skipped, seen, _ = run_inputs(make(), skewed(60), 0, 0)
    assert sum(map(len, numbers)) == seen - skipped < 900
    assert len({n for batch in numbers for n in batch}) <= 480


def test_what_is_found_holds_after_the_lead():
    tables, loader = make(tiered=60), skewed(40)
    stale = SkipStale(tables, mode="inputs", **EAGER | {"every": 10**6, "share": 1.0})
    lead = tables.store.schedule.depth + 1 + 2
    seen = []
    for k, batch in enumerate(Prefetch(tables, stale.inputs(loader))):
        step(tables, batch["ids"])
        if k == 4:
            stale._sieve.publish(stale._given(), np.arange(0, 80))
        seen.append(batch["number"].tolist())
    assert len(seen) == 5 + lead  # all that follows is skipped
    stale.undo()


# -- calibration


def test_samples_that_wait_count_as_memory():
    tables = make()
    with settled(tables, range(20), lead=2) as stale:
        flags = stale.flag_bytes
        loader = iter(stale.inputs([{"ids": torch.tensor([[1, 2], [30, 30], [31, 31], [32, 32]])}] * 9))
        next(loader), next(loader)
        sieve = stale._sieve
        waiting = {id(b): b for each in (sieve._passed, *sieve._marks.values()) for b in each.waiting}
        assert len(waiting) > 1
        assert stale.flag_bytes == flags + sum(b["ids"].nbytes for b in waiting.values())


def test_the_shift_mends_the_click_ratio():
    dice = np.random.default_rng(0)
    n = 4000
    hot = dice.random(n) < 0.6  # inputs of stale rows click less
    label = (dice.random(n) < np.where(hot, 0.1, 0.4)).astype(np.float32)
    ids = np.where(hot, 1, 20)[:, None].repeat(2, 1)
    loader = [{"ids": torch.from_numpy(ids[k : k + 50]), "label": torch.from_numpy(label[k : k + 50])} for k in
              range(0, n, 50)]  # fmt: skip
    tables = make()
    stale = settled(tables, [1])
    kept = torch.cat([batch["label"] for batch in stale.inputs(loader)])
    bias = torch.logit(kept.mean())  # what a model without features learns from them
    before = float(torch.sigmoid(bias)) / float(label.mean())
    assert stale.correct(bias) == stale.logit_shift < 0
    after = float(torch.sigmoid(bias)) / float(label.mean())
    assert abs(after - 1) < 0.01 < 0.5 < abs(before - 1)
    assert stale.priors == pytest.approx((label.mean(), float(kept.mean())))
    line = next(line for line in stale.receipt().lines if line.what == "share of label 1")
    assert (line.before, line.after) == pytest.approx(stale.priors)
    stale.undo()


def test_no_skipping_no_shift():
    assert logit_shift((10, 3), (10, 3)) == 0
    with SkipStale(make(), mode="inputs") as stale:
        assert (stale.logit_shift, stale.priors) == (0.0, None)


# -- the threshold


@given(st.integers(0, 2**31), st.integers(0, 30), st.floats(0.05, 0.95))
def test_the_threshold_saves_no_more_than_the_target(seed: int, n: int, target: float):
    dice = np.random.default_rng(seed)
    change, visits = dice.random(n).astype(np.float32), dice.integers(1, 99, n)
    threshold, ceiling = next_threshold(0.1, math.inf, 1.0, 1.0, change, visits, target=target)
    assert ceiling == math.inf
    assert visits[change < threshold].sum() <= target * visits.sum() or not n
    lower, cap = next_threshold(threshold, ceiling, 1.1, 1.0, change, visits, target=target)
    assert lower == cap == threshold / 2
    assert next_threshold(lower, cap, 1.0, 1.0, change, visits, target=target)[0] <= cap


def test_the_threshold_is_found_under_a_validation():
    tables = make(10)
    with SkipStale(tables, **EAGER, max_change="auto", validate=lambda: 1.5 if stale.window == 13 else 1.0) as stale:
        thresholds = []
        for k in range(120):
            step(tables, torch.tensor([[1, 1], [2, 3], [k % 10, k % 10]]))
            if stale.updates % 4 == 0:
                thresholds.append(stale.threshold)
        assert thresholds[0] == 0
        assert max(thresholds) > 0
        assert thresholds[12] == thresholds[11] / 2
        assert max(thresholds[12:]) == thresholds[12]


# -- coming back


@pytest.mark.parametrize("mode", ["rows", "inputs"])
@pytest.mark.parametrize("tiered", [0, 60])
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not(mode: Any, tiered: int):
    loader, settings = skewed(60), {"mode": mode, **EAGER, "revisit": 3, "share": 0.5}

    def loop(tables: Any, stale: SkipStale, source: list[Any]) -> Iterator[Any]:
        inputs = stale.inputs(source) if mode == "inputs" else source
        for batch in Prefetch(tables, inputs) if tiered else inputs:
            step(tables, batch["ids"])
            yield batch["number"].tolist()

    whole = make(tiered=tiered)
    with SkipStale(whole, **settings) as stale:
        order = list(loop(whole, stale, loader))
        end = stale.state_dict()
    assert len(order) < 60 or mode == "rows"
    for cut in (1, 9, 23, len(order) - 2):
        first, second = make(tiered=tiered), make(tiered=tiered)
        with SkipStale(first, **settings) as stale:
            running = loop(first, stale, loader)
            found = list(itertools.islice(running, cut))
            state = stale.state_dict()
            read = stale.batches_read if mode == "inputs" else cut
            columns, steps = weights(first), first.counts.steps
            running.close()
        with SkipStale(second, **settings) as stale:
            second.fill(0, columns)
            second.rows.counts.steps = steps
            stale.load_state_dict(state)
            found += loop(second, stale, loader[read:])
            again = stale.state_dict()
        assert found == order
        equal(whole, second)
        for name, value in end["watch"].items():
            assert torch.equal(value, again["watch"][name]), name
        assert {k: v for k, v in end.items() if k not in ("watch", "sieve")} == {
            k: v for k, v in again.items() if k not in ("watch", "sieve")
        }
        assert end["sieve"]["passed"]["samples"] == again["sieve"]["passed"]["samples"]


# -- what is refused


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"mode": "columns"}, "columns"), ({"max_change": -1.0}, "-1.0"), ({"max_change": math.nan}, "nan"),
        ({"max_change": "best"}, "best"), ({"max_change": "auto"}, "validate"), ({"validate": lambda: 0.0}, "auto"),
        ({"every": 0}, "every"), ({"revisit": 0}, "revisit"), ({"lead": -1}, "lead"), ({"windows": 0}, "windows"),
        ({"min_visits": 0}, "min_visits"), ({"warm_up": -1}, "warm_up"), ({"share": 0.0}, "share"),
        ({"share": 1.5}, "1.5"), ({"target": 1.0}, "target"), ({"tolerance": -0.1}, "-0.1"), ({"watch": 1e-9}, "1e-09"),
    ],
)  # fmt: skip
def test_bad_settings(refuses: Refuses, settings: dict[str, Any], value: str):
    tables = make()
    with refuses(value):
        SkipStale(tables, **settings)
    SkipStale(tables).undo()


def test_bad_use(refuses: Refuses):
    tables = make()
    with refuses("Linear"):
        SkipStale(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with SkipStale(tables, mode="rows") as stale:
        with refuses("which rows"):
            SkipStale(tables)
        with refuses("mode 'rows'"):
            stale.inputs([])
        with refuses("mode 'rows'"):
            _ = stale.samples_seen
        state = stale.state_dict()
        with refuses("every"):
            SkipStale(make(), every=7).load_state_dict(state)
        with refuses("watch"):
            SkipStale(make(), watch=0.5).load_state_dict(state)
        with refuses("20 x 3"):
            SkipStale(make(10), watch=8).load_state_dict(state)
    with SkipStale(make(tiered=30), mode="inputs") as stale:
        state = stale.state_dict()
    with refuses("lead"):
        SkipStale(make(tiered=30), mode="inputs", lead=50).load_state_dict(state)
    with SkipStale(make(tiered=30, policy=Belady()), mode="inputs") as stale, refuses("Belady"):
        stale.inputs([])
    tiered = make(tiered=30)
    with SkipStale(tiered, mode="inputs", lead=1) as stale, refuses("lead is 1"):
        list(Prefetch(tiered, stale.inputs(skewed(3))))


def test_bad_batches(refuses: Refuses):
    tables = make()
    with settled(tables, range(40)) as stale:
        with refuses("lies outside"):
            list(stale.inputs([{"ids": torch.tensor([[1, 99]])}]))
        with refuses("(samples, 2)"):
            list(stale.inputs([{"ids": torch.tensor([[1, 2, 3]])}]))
        with refuses("has no `ids`"):
            list(stale.inputs([(1, 2)]))
        with refuses("2 samples came with 3 labels"):
            list(stale.inputs([{"ids": torch.tensor([[1, 2], [3, 4]]), "label": torch.zeros(3)}]))
    with settled(tables, range(4)) as stale, refuses("`image`"):
        list(stale.inputs([{"ids": torch.tensor([[1, 2], [3, 30]]), "image": torch.zeros(3)}]))


def test_a_validation_that_is_not_finite(refuses: Refuses):
    tables = make()
    with SkipStale(tables, **EAGER, max_change="auto", validate=lambda: math.nan), refuses("nan"):
        for _ in range(20):
            step(tables, torch.tensor([[1, 1]]))


def test_an_error_of_the_loop_unfreezes_the_rows(refuses: Refuses):
    tables = make(10)
    with refuses("99"), SkipStale(tables, **EAGER):
        for _ in range(40):
            step(tables, torch.tensor([[1, 1], [2, 3]]))
        assert tables.rows.frozen.any()
        step(tables, torch.tensor([[99, 0]]))
    assert not len(tables.rows.frozen)


def test_a_gradient_that_is_no_number_is_no_visit_on_a_device(refuses: Refuses):
    tables = TieredEmbeddings(
        make(10).tables, SGD(0.1), tiers=[Hbm(1 << 16, device="cpu"), Dram("1 MiB")],
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    with SkipStale(tables, **EAGER) as stale:
        step(tables, torch.tensor([[1, 1]]))
        before = stale.watched.visits.copy()
        with refuses("NaN"):
            (tables(torch.tensor([[1, 2]])) * math.nan).sum().backward()
        assert np.array_equal(stale.watched.visits, before)
        assert stale.updates == 1
    tables.close()


@pytest.mark.parametrize("rule", RULES)
def test_rows_on_a_device(rule: type[Optimizer]):
    settings = {"every": 4, "warm_up": 6, "min_visits": 2, "watch": 1.0, "revisit": 3}
    plain = make(10, rule(0.1))
    tables = TieredEmbeddings(
        plain.tables, rule(0.1), tiers=[Hbm(1 << 16, device="cpu"), Dram("1 MiB")],
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    for each in (plain, tables):
        with SkipStale(each, **settings):
            for batch in skewed(60, num_rows=10):
                step(each, batch["ids"])
    equal(plain, tables)
    assert plain.counts.rows_frozen == tables.counts.rows_frozen > 0
    tables.close()
