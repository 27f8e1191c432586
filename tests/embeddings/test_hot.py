"""Batches of hot rows: every sample once, the same bits as plain training in that order, never more than the budget."""

from __future__ import annotations

import gzip
import itertools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.embeddings.test_frappe import read_libfm
from tests.tiers.shelf import Shelf
from vitalfew.core import Budget, InputError, Pair, Rule, judge
from vitalfew.data import Encoder, infer_schema, open_log, write_log
from vitalfew.embeddings import EmbeddingBags, LazyAdam, Prefetch, RowwiseAdagrad, Table, TieredEmbeddings
from vitalfew.embeddings._kernels_choose import all_flagged
from vitalfew.embeddings.choosing import HotSet, estimate_hot_rows, hot_inputs, hot_rows
from vitalfew.embeddings.hot import HotRows
from vitalfew.embeddings.phases import next_rate
from vitalfew.embeddings.stale import SkipStale
from vitalfew.tiers import LRU, Dram, Hbm, Static

Refuses = Callable[..., AbstractContextManager[None]]
DATA = Path(os.environ.get("VITALFEW_DATA", Path(__file__).parents[3] / "shared" / "data")) / "recsys"

seeds = st.integers(0, 2**32 - 1)


def tables_of(rows: tuple[int, ...] = (40, 30), dim: int = 3, **more: Any) -> EmbeddingBags:
    more = {"generator": torch.Generator().manual_seed(0)} | more
    return EmbeddingBags([Table(f"t{k}", n, dim) for k, n in enumerate(rows)], RowwiseAdagrad(0.1), **more)


def tiered_of(rows: tuple[int, ...] = (40, 30), dim: int = 3, *, slots: int = 40, **more: Any) -> TieredEmbeddings:
    more = {"generator": torch.Generator().manual_seed(0), "tiers": [Dram(slots), Shelf()], "policy": Static()} | more
    tables = [Table(f"t{k}", n, dim) for k, n in enumerate(rows)]
    return TieredEmbeddings(tables, RowwiseAdagrad(0.1), **more)


def skewed(samples: int, rows: tuple[int, ...] = (40, 30), seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([(rng.random(samples) ** 4 * n).astype(np.int64) for n in rows], axis=1)


def jagged(samples: int, rows: tuple[int, ...] = (40, 30), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw bags of zero to three ids."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 4, samples * len(rows))
    most = np.repeat(np.tile(rows, samples), lengths)
    return (rng.random(lengths.sum()) ** 4 * most).astype(np.int64), np.concatenate(([0], np.cumsum(lengths)))


def step(tables: EmbeddingBags, ids: np.ndarray, k: int) -> None:
    torch.sin(tables(torch.from_numpy(ids)) + k).sum().backward()


# -- which rows


@st.composite
def logs(draw: st.DrawFn) -> tuple[np.ndarray, list[int], int]:
    tables = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    counts = draw(st.lists(st.integers(0, 6), min_size=sum(tables), max_size=sum(tables)))
    return np.array(counts, np.uint64), tables, draw(st.integers(1, sum(tables) + 3))


@given(logs(), st.integers(0, 60))
def test_hot_rows_are_the_most_looked_up_that_fit(log: tuple[np.ndarray, list[int], int], small: int) -> None:
    counts, tables, room = log
    hot = hot_rows(counts, tables, room, row_bytes=8, small=small)
    assert len(hot) <= room
    assert hot.nbytes == 8 * len(hot)
    assert hot.ids.dtype == np.int64
    assert (np.diff(hot.ids) > 0).all()
    if room >= sum(tables):
        assert len(hot) == sum(tables)
        return
    starts = np.cumsum([0, *tables])
    whole = [set(range(starts[k], starts[k + 1])) for k, n in enumerate(tables) if 8 * n <= small]
    always = set().union(*whole) if sum(map(len, whole)) <= room else set()
    ranked = sorted(
        (i for i in range(len(counts)) if i not in always and counts[i]), key=lambda i: (-int(counts[i]), i)
    )
    expected = always | set(ranked[: room - len(always)])
    assert set(hot.ids.tolist()) == expected
    taken = [int(counts[i]) for i in expected - always]
    assert hot.threshold == (min(taken) if taken else math.inf)
    total = int(counts.sum())
    assert hot.coverage == pytest.approx(sum(int(counts[i]) for i in expected) / total if total else 0.0)


@given(logs())
def test_more_budget_never_covers_less(log: tuple[np.ndarray, list[int], int]) -> None:
    counts, tables, _ = log
    covers = [hot_rows(counts, tables, n, row_bytes=8, small=0).coverage for n in range(1, sum(tables) + 1)]
    assert covers == sorted(covers)


def test_budgets_of_every_kind() -> None:
    counts = np.arange(100)[::-1]
    for budget, expected in (("800 B", 10), ("807 B", 10), (0.1, 10), (10, 10), (Budget.of("10%"), 10), ("1 KiB", 12)):
        hot = hot_rows(counts, [100], budget, row_bytes=80, small=0)
        assert hot.ids.tolist() == list(range(expected))
        assert hot.threshold == 99 - expected + 1
    assert hot.mask().dtype == np.uint8
    assert hot.mask().sum() == len(hot)


def test_wrong_hot_rows(refuses: Refuses) -> None:
    with refuses("79 bytes holds none"):
        hot_rows(np.ones(100), [100], "79 B", row_bytes=80)
    with refuses("0 items holds none"):
        hot_rows(np.ones(100), [100], 0, row_bytes=80)
    with refuses("(99,) for 100 rows"):
        hot_rows(np.ones(99), [60, 40], 5, row_bytes=80)
    with refuses("90%"):
        hot_rows(np.ones(100), [100], Budget.cover(0.9), row_bytes=80)
    with refuses("0 bytes"):
        hot_rows(np.ones(100), [100], 5, row_bytes=0)
    for wrong in (-1.0, math.nan, math.inf):
        with refuses("negative, NaN or infinite"):
            hot_rows(np.array([1.0, wrong, 3.0]), [3], 2, row_bytes=8)


def test_rows_beyond_32_bits() -> None:
    """Hot rows are numbered by 64-bit integers: neither floats, which end at 16.7 million, nor 32 bits."""
    far = 2**31 + 5
    hot = HotSet(np.array([far, far + 2]), 1.0, 0.5, 16, num_rows=far + 3)  # the mask's zero pages are never written
    assert hot_inputs(np.array([far, far + 2, far + 2, far + 1]), None, 2, hot).tolist() == [True, False]


def test_slots_beyond_the_integers_of_a_float() -> None:
    n = 2**24 + 3
    counts = np.zeros(n, np.uint32)
    counts[-2:] = 5
    assert hot_rows(counts, [n], 2, row_bytes=8, small=0).ids.tolist() == [n - 2, n - 1]


# -- the estimate


@pytest.mark.parametrize("exponent", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("sorted_", [False, True])
def test_the_estimate_contains_the_exact_number(exponent: float, sorted_: bool) -> None:
    """Over 120 draws at confidence 0.99 an end is missed 1.2 times on average; seven have odds of one in 4,000."""
    rng = np.random.default_rng(3)
    counts = (1000 * (1 + np.arange(400_000)) ** -exponent * rng.random(400_000)).astype(np.int64)
    if not sorted_:
        rng.shuffle(counts)
    for threshold in np.unique(np.quantile(counts, [0.5, 0.99, 0.9999, 1.0])):
        exact = np.count_nonzero(counts >= threshold)
        found = [estimate_hot_rows(counts, threshold, chunk_rows=200, confidence=0.99, seed=k) for k in range(120)]
        assert sum(exact > each.high for each in found) < 7
        assert sum(exact < each.low for each in found) < 7
        assert all(0 <= each.low <= each.mean <= each.high <= len(counts) for each in found)


def test_the_estimate_by_hand() -> None:
    """The interval is mean +- t sd / sqrt(35), with the quantile 3.348 of 34 degrees of freedom."""
    counts = np.random.default_rng(0).integers(0, 100, 1_000_000)
    exactly = 0
    for seed in range(6):
        found = estimate_hot_rows(counts, 90, seed=seed)
        drawn = np.random.default_rng(seed).integers(0, len(counts), (35, 1024))
        c = (counts[drawn] >= 90).sum(axis=1)
        half = 1_000_000 / 1024 * 3.348 * c.std(ddof=1) / math.sqrt(35)
        assert found.mean == pytest.approx(1_000_000 / 1024 * c.mean())
        assert half * 0.999 < found.high - found.mean < 1.3 * half  # the binomial one may be a little wider
        exactly += found.high - found.mean == pytest.approx(half, rel=1e-3)
    assert exactly >= 2
    few = estimate_hot_rows(counts[:35_000], 90)
    assert few.low == few.mean == few.high == np.count_nonzero(counts[:35_000] >= 90)
    assert estimate_hot_rows(np.zeros(10**6), 1).high == pytest.approx(10**6 * -math.log(0.001) / 35_840, rel=0.01)


def test_wrong_estimates(refuses: Refuses) -> None:
    with refuses("1 chunks"):
        estimate_hot_rows(np.ones(10), 1, chunks=1)
    with refuses("1.0"):
        estimate_hot_rows(np.ones(10), 1, confidence=1.0)
    with refuses("(0,)"):
        estimate_hot_rows([], 1)


# -- which samples


@given(seeds)
def test_a_sample_is_hot_when_all_its_rows_are(seed: int) -> None:
    rng = np.random.default_rng(seed)
    flags = rng.integers(0, 2, 20).astype(np.uint8)
    lengths = rng.integers(0, 4, rng.integers(0, 9))
    edges = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    rows = rng.integers(0, 20, edges[-1])
    expected = [bool(flags[rows[a:b]].all()) for a, b in itertools.pairwise(edges)]
    hot = HotSet(np.flatnonzero(flags), 1.0, 0.0, 0, 20)
    assert hot_inputs(rows, edges, 0, hot).tolist() == expected == all_flagged(rows, edges, 0, flags).tolist()
    square = rng.integers(0, 20, (5, 3))
    assert hot_inputs(square.reshape(-1), None, 3, hot).tolist() == flags[square].all(axis=1).tolist()


def test_rows_that_are_none(refuses: Refuses) -> None:
    hot = HotSet(np.array([0]), 1.0, 0.0, 8, 4)
    for wrong in (-1, 4):
        with refuses(wrong):
            hot_inputs(np.array([0, wrong]), None, 1, hot)


# -- the rate


def test_the_rate() -> None:
    assert next_rate(50, []) == next_rate(50, [1.0]) == next_rate(50, [1.0, 1.0]) == 50
    assert next_rate(50, [1.0, 1.1]) == 25
    assert next_rate(1, [1.0, 1.1]) == 1
    assert next_rate(50, [5, 4, 3, 2]) == 50
    assert next_rate(50, [5, 4, 3, 2, 1]) == 100
    assert next_rate(20, [9, 8, 7, 6, 5, 4, 3, 2]) == 20  # seven falls
    assert next_rate(20, [9, 8, 7, 6, 5, 4, 3, 2, 1]) == 40
    assert next_rate(30, [1, 2, 1.5, 1.4, 1.3, 1.2]) == 60


@given(st.integers(1, 100), st.lists(st.floats(-10, 10)))
def test_the_rate_stays_in_its_limits(rate: int, losses: list[float]) -> None:
    found = next_rate(rate, losses)
    assert 1 <= found <= 100
    assert found in (rate, max(rate // 2, 1), min(2 * rate, 100))


def test_wrong_rates(refuses: Refuses) -> None:
    for rate in (0, 101):
        with refuses(rate):
            next_rate(rate, [])
    with refuses("nan"):
        next_rate(50, [0.5, math.nan])


# -- the order


@given(
    seeds, st.integers(1, 70), st.integers(1, 9), st.integers(1, 70), st.integers(1, 100),
    st.lists(st.floats(0, 1), max_size=12), st.booleans(),
)  # fmt: skip
@settings(max_examples=150)
def test_every_sample_once(
    seed: int, samples: int, batch_size: int, budget: int, rate: int, losses: list[float], bags: bool
) -> None:
    ids, offsets = jagged(samples, seed=seed) if bags else (skewed(samples, seed=seed), None)
    tables = tables_of()
    hot = HotRows(tables, ids, offsets, batch_size=batch_size, budget=budget, rate=rate, seed=seed)
    assert hot.hot.nbytes <= budget * hot.row_bytes
    mask = hot.hot.mask().astype(bool)
    seen, total = [], {"hot": 0, "cold": 0}
    for phase in hot.epoch(3):
        for numbers in phase:
            assert numbers.dtype == np.int64
            assert len(numbers)
            seen.extend(numbers.tolist())
            for n in numbers:
                found = ids[n] if offsets is None else ids[offsets[2 * n] : offsets[2 * n + 2]]
                starts = (
                    np.array([0, 40]) if offsets is None else np.repeat([0, 40], np.diff(offsets)[2 * n : 2 * n + 2])
                )
                assert mask[found + starts].all() == (phase.kind == "hot")
        total[phase.kind] += len(phase)
        if losses:
            hot.report(losses.pop())
    assert sorted(seen) == list(range(samples))
    assert sum(total.values()) == len(hot)
    assert len(seen) <= len(hot) * batch_size < len(seen) + 2 * batch_size  # one partial batch of each kind


def test_phases_follow_the_rate() -> None:
    ids = np.repeat(np.arange(2), [60, 40]).reshape(-1, 1)
    hot = HotRows(tables_of((2,)), ids, batch_size=2, hot=HotSet(np.array([1]), 1.0, 0.4, 16, 2), rate=25)
    assert [(p.kind, len(p)) for p in hot.epoch(0)] == [("cold", 8), ("hot", 5)] * 3 + [("cold", 6), ("hot", 5)]
    hot = HotRows(tables_of((2,)), ids, batch_size=2, hot=hot.hot, rate=100)
    assert [(p.kind, len(p)) for p in hot.epoch(0)] == [("cold", 30), ("hot", 20)]
    phases = []
    for phase in hot.epoch(0):
        phases.append((phase.kind, len(phase)))
        hot.report(len(phases))  # rises each time
    assert phases == [("cold", 30), ("hot", 20)]
    assert hot.rate == 50
    assert [(p.kind, len(p)) for p in hot.epoch(1)] == [("cold", 15), ("hot", 10)] * 2


def test_seed_and_epoch_give_the_order() -> None:
    ids = skewed(50)

    def order(seed: int, epoch: int) -> list[list[int]]:
        return [b.tolist() for b in HotRows(tables_of(), ids, batch_size=4, budget=9, seed=seed).order(epoch)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 1)
    hot = HotRows(tables_of(), ids, batch_size=4, budget=9)
    assert [b.tolist() for phase in hot.epoch(0) for b in phase] == order(0, 0)


def test_a_full_budget_is_plain_shuffled_training() -> None:
    ids = skewed(50)
    hot = HotRows(tables_of(), ids, batch_size=8, budget="1 GiB", rate=100)
    (phase,) = hot.epoch(0)
    assert phase.kind == "hot"
    assert hot.share == 1
    order = np.random.default_rng([0, 0, 1]).permutation(50)
    assert np.array_equal(np.concatenate(phase.batches), order)
    assert [len(numbers) for numbers in phase] == [8] * 6 + [2]


def test_an_empty_bag_is_hot() -> None:
    offsets = np.array([0, 1, 1, 1, 1, 2, 2])  # the second sample looks up nothing
    hot = HotRows(tables_of(), np.array([3, 39]), offsets, batch_size=1, hot=HotSet(np.array([3]), 1.0, 0.5, 16, 70))
    kinds = {int(numbers[0]): phase.kind for phase in hot.epoch(0) for numbers in phase}
    assert kinds == {0: "hot", 1: "hot", 2: "cold"}


# -- the same bits


def right(one: EmbeddingBags, other: EmbeddingBags) -> None:
    assert one.num_rows == other.num_rows
    for name, column in one.columns(0, one.num_rows).items():
        if name != "stats":
            assert torch.equal(column, other.columns(0, other.num_rows)[name]), name


@given(seeds, st.integers(12, 40), st.integers(1, 12), st.sampled_from([35, 100]))
@settings(max_examples=6)
def test_the_bits_are_those_of_plain_training_in_that_order(seed: int, slots: int, budget: int, rate: int) -> None:
    ids = skewed(40, seed=seed)
    plain, kept = tables_of(), tables_of()
    with tiered_of(slots=slots) as tiered:
        hots = [HotRows(t, ids, batch_size=6, budget=budget, rate=rate) for t in (kept, tiered)]
        for epoch in range(2):
            for k, numbers in enumerate(hots[0].order(epoch)):
                step(plain, ids[numbers], k)
            k = 0
            for phase in hots[0].epoch(epoch):
                for numbers in phase:
                    step(kept, ids[numbers], k)
                    k += 1
            k = 0
            for phase in hots[1].epoch(epoch):
                with Prefetch(tiered, [{"ids": torch.from_numpy(ids[numbers])} for numbers in phase]) as batches:
                    for batch in batches:
                        step(tiered, batch["ids"].numpy(), k)
                        k += 1
        right(plain, kept)
        right(plain, tiered)
        tiered.store.check()


def test_hot_phases_move_nothing_once_the_rows_are_there() -> None:
    ids = skewed(400, (2000, 2000))
    with tiered_of((2000, 2000), slots=300) as tables:
        hot = HotRows(tables, ids, batch_size=32, budget=200, rate=20)
        for epoch in range(3):
            for phase in hot.epoch(epoch):
                before = tables.moves.missed, tables.moves.left
                for numbers in phase:
                    step(tables, ids[numbers], 0)
                if phase.kind == "hot" and epoch:
                    assert (tables.moves.missed, tables.moves.left) == before
        hot_bytes = next(line for line in hot.receipt().lines if line.what.startswith("row bytes moved"))
        assert hot_bytes.after * 10 < hot_bytes.before
    with tiered_of((2000, 2000), slots=300, policy=LRU()) as tables:  # they have to come again after cold phases
        hot = HotRows(tables, ids, batch_size=32, budget=200, rate=20)
        before = 0
        for epoch in range(3):
            for phase in hot.epoch(epoch):
                before = tables.moves.missed
                for numbers in phase:
                    step(tables, ids[numbers], 0)
        assert tables.moves.missed > before


def test_with_stale_rows_that_are_left_alone() -> None:
    """Where nothing may become stale the two together are hot rows alone; otherwise each does its part."""
    ids = skewed(600)
    frozen = []
    for warm_up in (math.inf, 5):
        tables, plain = tables_of(), tables_of()
        hot = HotRows(tables, ids, batch_size=16, budget=20)
        with SkipStale(tables, every=5, warm_up=warm_up, min_visits=1, max_change=0.5, watch=1.0):
            for k, numbers in enumerate(hot.order(0)):
                step(plain, ids[numbers], k)
            trained = iter(range(len(hot)))
            for phase in hot.epoch(0):
                for numbers in phase:
                    step(tables, ids[numbers], next(trained))
        frozen.append(tables.counts.rows_frozen)
        assert torch.equal(plain.rows.weight, tables.rows.weight) == (warm_up == math.inf)
    assert frozen[0] == 0 < frozen[1]


def test_on_a_device() -> None:
    ids, plain = skewed(60), tables_of()
    with tiered_of(tiers=[Hbm(20_000, "cpu"), Dram(70)]) as tables:
        hot = HotRows(tables, ids, batch_size=6, budget=9)
        for phase in hot.epoch(0):
            for k, numbers in enumerate(phase):
                step(tables, ids[numbers], k)
        for phase in HotRows(plain, ids, batch_size=6, budget=9).epoch(0):
            for k, numbers in enumerate(phase):
                step(plain, ids[numbers], k)
        for table in plain.tables:
            torch.testing.assert_close(plain.rows_of(table.name), tables.rows_of(table.name))


def test_the_store_keeps_what_it_is_told() -> None:
    """Rows that are there already change their standing, and `undo` gives it back."""
    with tiered_of((60,), slots=20, policy=Static.of([1, 2])) as tables:

        def look(*ids: int) -> None:
            step(tables, np.array([[i] for i in ids]), 0)

        look(*range(10))
        residency = tables.store.residency
        with HotRows(tables, np.array([[7], [8], [7], [8], [9]]), batch_size=2, budget=2):
            for start in range(20, 60, 10):
                look(*range(start, start + 10))
            assert (residency.where[[7, 8]] >= 0).all()
            assert (residency.where[[1, 2]] < 0).all()
            tables.store.check()
        look(1, 2)
        for start in range(20, 60, 10):
            look(*range(start, start + 10))
        assert (residency.where[[1, 2]] >= 0).all()
        assert (residency.where[[7, 8]] < 0).all()


# -- go on after a stop


@given(seeds, st.integers(0, 12), st.integers(0, 5), st.booleans())
@settings(max_examples=60)
def test_a_resumed_epoch_is_the_whole_one(seed: int, stop: int, inside: int, twice: bool) -> None:
    ids = skewed(90, seed=seed)
    losses = np.random.default_rng(seed).random(200).tolist()

    def make() -> HotRows:
        return HotRows(tables_of(), ids, batch_size=4, budget=9, rate=30)

    def run(hot: HotRows, epoch: int, stop: int | None, said: Iterator[float]) -> tuple[list[list[int]], dict | None]:
        """Train until a batch of a phase, or to the end; return the batches trained and the state there."""
        trained: list[list[int]] = []
        for k, phase in enumerate(hot.epoch(epoch)):
            if k == stop:
                done = min(inside, len(phase))
                return trained + [b.tolist() for b in phase.batches[:done]], hot.state_dict(done)
            trained += [b.tolist() for b in phase]
            if k % 2 == 0:
                hot.report(next(said))
        return trained, None

    # An epoch without a stop reports after whole phases only, as the stopped one does before it stops.
    first = make()
    run(first, 0, None, iter(losses))
    before = first.state_dict()
    part, state = run(first, 1, stop, iter(losses[50:]))
    second = make()
    if state is None:
        second.load_state_dict(before)
        assert run(second, 1, None, iter(losses[50:]))[0] == part
        return
    second.load_state_dict(state)
    assert (second.rate, second.losses) == (first.rate, first.losses)
    if twice:  # a stop before the first batch
        again = make()
        again.load_state_dict(second.state_dict())
        second = again
    rest = [b.tolist() for phase in second.epoch(1) for b in phase]
    everything = sorted(n for batch in part + rest for n in batch)
    assert everything == list(range(90))
    # What is left of the stopped phase comes first, in its order.
    third = make()
    third.load_state_dict(before)
    said = iter(losses[50:])
    whole: list[list[int]] = []
    for k, phase in enumerate(third.epoch(1)):
        whole += [b.tolist() for b in phase]
        if k % 2 == 0 and k < stop:
            third.report(next(said))
    assert part + rest == whole


def test_a_state_of_something_else(refuses: Refuses) -> None:
    hot = HotRows(tables_of(), skewed(50), batch_size=4, budget=9)
    state = hot.state_dict()
    assert state["place"] is None
    with refuses("batch_size 4, not 5"):
        HotRows(tables_of(), skewed(50), batch_size=5, budget=9).load_state_dict(state)
    with refuses("samples 50, not 51"):
        HotRows(tables_of(), skewed(51), batch_size=4, budget=9).load_state_dict(state)
    next(iter(hot.epoch(0)))
    with refuses("99 batches"):
        hot.state_dict(99)
    other = HotRows(tables_of(), skewed(50), batch_size=4, budget=20)
    other.load_state_dict(state)  # with the hot rows of that time
    assert np.array_equal(other.hot.ids, hot.hot.ids)
    assert other.share == hot.share


# -- change


def test_drift_and_refresh(refuses: Refuses) -> None:
    ids = skewed(500)
    hot = HotRows(tables_of(), ids, batch_size=16, budget=12)
    assert hot.drift(ids) == pytest.approx(0)
    other = np.array([40, 30]) - 1 - ids
    assert hot.drift(other) > 0.3
    same = skewed(400, seed=1)
    before = hot.hot
    assert not hot.refresh(same)
    assert hot.hot is before
    assert sorted(np.concatenate(hot.order(0)).tolist()) == list(range(400))
    assert hot.refresh(other)
    assert hot.drift(other) == pytest.approx(0)
    assert len(hot.hot) <= 12
    epoch = hot.epoch(0)
    next(epoch)
    with refuses("epoch 0 is not finished"):
        hot.refresh(ids)
    hot.undo()
    assert hot.refresh(ids, max_drift=0.0)
    with pytest.raises(InputError, match="another epoch has begun"):
        next(epoch)


def test_a_sample_of_the_log() -> None:
    ids, offsets = jagged(5000)
    whole = HotRows(tables_of(), ids, offsets, batch_size=64, budget=12)
    part = HotRows(tables_of(), ids, offsets, batch_size=64, budget=12, sample=0.2)
    assert len(np.intersect1d(whole.hot.ids, part.hot.ids)) >= 10
    assert part.hot.coverage == pytest.approx(whole.hot.coverage, abs=0.05)
    given_ = HotRows(tables_of(), ids, offsets, batch_size=64, hot=part.hot)
    assert given_.hot is part.hot
    assert given_.share == part.share


def test_an_encoded_log(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [f"{i % 3 % 2},u{int(9 * rng.random() ** 3)},i{int(40 * rng.random() ** 3)}" for i in range(500)]
    (tmp_path / "log.csv").write_text("\n".join(["click,user,item", *rows]))
    log = open_log(tmp_path / "log.csv")
    encoder = Encoder.fit(log, infer_schema(log, label="click"))
    train, _ = write_log(tmp_path / "encoded", log, encoder)
    tables = EmbeddingBags([Table(name, n, 4) for name, n in encoder.num_rows.items()], RowwiseAdagrad(0.1))
    ids = train.block(0, len(train)).ids
    hots = [HotRows(tables, each, batch_size=32, budget=10) for each in (train, ids, torch.from_numpy(ids))]
    for other in hots[1:]:
        assert np.array_equal(hots[0].hot.ids, other.hot.ids)
        assert [b.tolist() for b in hots[0].order(0)] == [b.tolist() for b in other.order(0)]
    for numbers in hots[0].order(0):
        assert np.array_equal(train.rows(numbers).ids, ids[numbers])
    with pytest.raises(InputError, match="the log has the features user, item, the tables t0, t1"):
        HotRows(tables_of(), train, batch_size=4)


def test_wrong_input(refuses: Refuses) -> None:
    ids = skewed(70_000)
    ids[69_999, 1] = 30
    with refuses("id 30 of feature `t1` in sample 69999"):
        HotRows(tables_of(), ids, batch_size=4)
    for wrong, message in (
        (np.array([[0, -1]]), "id -1 of feature `t1` in sample 0"),
        (np.zeros((2, 2)), "float64"),
        (torch.zeros(2, 2), "float32"),
        (np.zeros((2, 3), np.int64), "(2, 3)"),
        (np.zeros((0, 2), np.int64), "no samples"),
    ):
        with refuses(message):
            HotRows(tables_of(), wrong, batch_size=4)
    with refuses("3 bags"):
        HotRows(tables_of(), np.zeros(3, np.int64), np.array([0, 1, 2, 3]), batch_size=4)
    with refuses("offsets must rise"):
        HotRows(tables_of(), np.zeros(3, np.int64), np.array([0, 1, 5]), batch_size=4)
    fine = skewed(9)
    for settings_, message in (
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": 4, "sample": 0.0}, "0.0"),
        ({"batch_size": 4, "rate": 0}, "0"),
        ({"batch_size": 4, "budget": "8 B"}, "8 bytes"),
        ({"batch_size": 4, "hot": HotSet(np.array([0]), 1.0, 1.0, 8, 5)}, "5 rows"),
    ):
        with refuses(message):
            HotRows(tables_of(), fine, **settings_)
    with refuses("Linear"):
        HotRows(torch.nn.Linear(2, 2), fine, batch_size=4)
    with refuses("-1"):
        HotRows(tables_of(), fine, batch_size=4).epoch(-1)
    with tiered_of(slots=10) as tables, refuses("10"):
        HotRows(tables, fine, batch_size=4, budget=11)


def test_bytes_of_a_row_include_its_state() -> None:
    tables = EmbeddingBags([Table("a", 10, 4)], LazyAdam(0.1))
    hot = HotRows(tables, np.arange(10).reshape(-1, 1), batch_size=2, budget="96 B")
    assert hot.row_bytes == 48
    assert len(hot.hot) == 2


def test_the_receipt() -> None:
    ids = skewed(100)
    with HotRows(tables_of(), ids, batch_size=8, budget=9, rate=50) as hot:
        for phase in hot.epoch(0):
            assert len(phase)
    receipt = hot.receipt()
    lines = {line.what: line for line in receipt.lines}
    assert receipt.verdict == "undecided"
    assert lines["samples whose rows are all hot"].after == hot.share
    assert lines["phases"].after == 4
    assert lines["switches between kinds"].after == 3
    assert lines["rows and state to keep"].after == hot.hot.nbytes <= 9 * hot.row_bytes
    assert {line.how for line in receipt.lines} == {"counted"}
    pairs = [Pair(s, "base", 10 + s / 10, 2.0, base_quality=0.7, few_quality=0.7) for s in range(3)]
    judged = hot.receipt(judge(Rule("equal work", tolerance=0.001), pairs))
    assert judged.verdict == "saved"
    assert len(judged.pairs) == 3


# -- real logs


def adjacency(path: Path) -> np.ndarray:
    """Return the pairs of user and item; some users have none."""
    with gzip.open(path, "rt") as file:
        lines = [list(map(int, line.split())) for line in file]
    return np.array([(user, item) for user, *items in lines for item in items])


@pytest.mark.data
@pytest.mark.parametrize(("name", "expected"), [("frappe", (0.08, 0.18, 0.33)), ("amazon-book", (0.08, 0.18, 0.33))])
def test_shares_of_real_logs(name: str, expected: tuple[float, ...]) -> None:
    if not DATA.is_dir():
        pytest.skip(f"no logs at {DATA}: set VITALFEW_DATA")
    if name == "frappe":
        files = [DATA / name / f"{part}.libfm.gz" for part in ("validation", "test")]
        ids = np.concatenate([read_libfm(file)[1] for file in files])
        sizes = (5382,) * 1
        tables = EmbeddingBags([Table("all", 5382, 2, features=tuple(map(str, range(10))))], RowwiseAdagrad(0.1))
        distinct = len(np.unique(ids))
    else:
        ids = adjacency(DATA / name / "test.txt.gz")
        sizes = (52_643, 91_599)
        tables = tables_of(sizes, dim=2)
        distinct = sum(len(np.unique(column)) for column in ids.T)
    for share, stated in zip((0.05, 0.1, 0.2), expected, strict=True):
        budget = int(share * distinct)
        hot = HotRows(
            tables, ids, batch_size=512,
            hot=hot_rows(
                np.bincount((ids + tables.layout.base).reshape(-1), minlength=tables.num_rows), sizes, budget,
                row_bytes=12, small=0,
            ),
        )  # fmt: skip
        assert len(hot.hot) == budget
        print(f"{name}, {share:.0%}: {hot.share:.3f} of the samples are hot, {hot.hot.coverage:.3f} of the lookups")
        assert hot.share == pytest.approx(stated, abs=0.006)
