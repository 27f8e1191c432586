"""Simulated counts against the plain caches, against exhaustive search, and against a store that really moves rows."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiers.naive import brute_bound, greedy_bound, naive_counts
from tests.tiers.shelf import Shelf
from vitalfew.core import InputError
from vitalfew.embeddings import SGD, Prefetch, Table, TieredEmbeddings
from vitalfew.tiers import LFU, LRU, Belady, Chaos, Dram, LookAhead, Policy, Static
from vitalfew.tiers.simulation import lower_bound, simulate

QUICK = settings(deadline=None, max_examples=80, derandomize=True, database=None)
Batches = list[list[int]]


def traces(most_rows: int = 20, most_batches: int = 20, largest: int = 6) -> st.SearchStrategy[Batches]:
    def draw(seed: int) -> Batches:
        dice = random.Random(seed)
        rows, batches = dice.randint(1, most_rows), dice.randint(0, most_batches)
        return [dice.sample(range(rows), dice.randint(0, min(largest, rows))) for _ in range(batches)]

    return st.integers(0, 2**32).map(draw)


def flat(batches: Batches, dice: random.Random | None = None) -> tuple[list[int], list[int]]:
    """Put batches one after the other; with `dice`, some ids stand there twice."""
    ids: list[int] = []
    offsets = [0]
    for batch in batches:
        ids += batch + ([dice.choice(batch) for _ in range(dice.randint(0, 3))] if dice and batch else [])
        offsets.append(len(ids))
    return ids, offsets


KINDS = [("lru", None), ("lfu", None), ("lfu", 1), ("lfu", 3), ("static", None)] + [
    (name, decay) for name in ("lookahead", "belady") for decay in (None, 1, 2)
]


@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
@pytest.mark.parametrize(("name", "decay"), KINDS)
@settings(QUICK, max_examples=25)
@given(batches=traces(), capacity=st.integers(0, 20), seed=st.integers(0, 2**32))
def test_counts_are_those_of_the_plain_cache(
    name: str, decay: int | None, ahead: int, batches: Batches, capacity: int, seed: int
):
    dice = random.Random(seed)
    # A window holds at least what is loaded next, so a shallower look ahead than that is not to be had.
    depth = dice.randint(ahead + 1, ahead + 5) if name == "lookahead" else None
    hot = dice.sample(range(20), 5) if name == "static" else None
    every = decay or 10**9
    policy: Policy = {
        "lru": LRU(), "lfu": LFU(every), "static": Static(),
        "lookahead": LookAhead(depth or 1, every), "belady": Belady(every),
    }[name]  # fmt: skip
    if hot is not None:
        hot = [h for h in hot if any(h in batch for batch in batches)]
        most = max((max(batch, default=0) for batch in batches), default=0)
        policy = Static.of([h for h in hot if h <= most])
    want = naive_counts(batches, capacity, name, ahead=ahead, depth=depth, hot=hot, decay_every=decay)
    ids, offsets = flat(batches, dice)
    found = simulate(ids, offsets, policy, capacity, ahead=ahead)
    assert found.per_batch.tolist() == want.misses_by_batch
    assert (found.misses, found.evicted, found.drained) == (want.misses, want.evicted, want.drained)
    assert found.first_uses == len({row for batch in batches for row in batch})
    assert (found.accesses, found.unique) == (len(ids), sum(map(len, batches)))


@QUICK
@given(batches=traces(6, 6, 3), capacity=st.integers(0, 6))
def test_the_lower_bound_is_the_optimum_of_all_retained_sets(batches: Batches, capacity: int):
    assert lower_bound(*flat(batches), capacity) == brute_bound(batches, capacity) == greedy_bound(batches, capacity)


@QUICK
@given(batches=traces(), capacity=st.integers(0, 20), seed=st.integers(0, 99))
def test_no_policy_moves_less_than_the_lower_bound(batches: Batches, capacity: int, seed: int):
    least = lower_bound(*flat(batches), capacity)
    assert least == greedy_bound(batches, capacity)
    hot = [0] if any(batches) else []
    for policy in (LRU(), LFU(3), Static.of(hot), LookAhead(2), LookAhead(9), Chaos(seed)):
        assert simulate(*flat(batches), policy, capacity).misses >= least, policy


@QUICK
@given(batches=traces(), ahead=st.integers(0, 3))
def test_more_room_never_moves_more(batches: Batches, ahead: int):
    for policy in (LRU(), Belady()):
        misses = [simulate(*flat(batches), policy, room, ahead=ahead).misses for room in range(22)]
        assert misses == sorted(misses, reverse=True), policy
        assert misses[-1] == len({row for batch in batches for row in batch})


@QUICK
@given(batches=traces())
def test_ids_far_apart_and_deep_windows_change_nothing(batches: Batches):
    ids, offsets = flat(batches)
    spread = [row * 10**9 + 7 for row in ids]
    for policy in (LRU(), LFU(2), LookAhead(10**6), Belady()):
        near, far = simulate(ids, offsets, policy, 5), simulate(spread, offsets, policy, 5)
        assert near.per_batch.tolist() == far.per_batch.tolist()
    assert simulate(ids, offsets, LookAhead(10**6), 5).misses == lower_bound(ids, offsets, 5)


@pytest.mark.parametrize(
    ("ids", "offsets", "capacity", "says"),
    [
        ([1], [0, 2], 1, "offsets must rise"),
        ([1], [1], 1, "offsets must rise"),
        ([1, 2], [0, 2, 1, 2], 1, "offsets must rise"),
        ([1], [], 1, "offsets must rise"),
        ([1], [0, 1], -1, "capacity must not be negative, got -1"),
        ([-3], [0, 1], 1, "an id is negative: -3"),
    ],
)
def test_wrong_traces_are_refused(ids: list[int], offsets: list[int], capacity: int, says: str):
    with pytest.raises(InputError, match=says):
        simulate(ids, offsets, LRU(), capacity)


def test_too_few_slots_are_refused_with_the_number_needed():
    with pytest.raises(InputError, match="batch 1 needs 3 rows at a time, and the memory holds 2"):
        simulate([1, 2, 3, 4], [0, 1, 4], LRU(), 9, slots=2)
    assert simulate([1, 2, 3, 4], [0, 1, 4], LRU(), 9, slots=3).misses == 4


def test_an_empty_trace_moves_nothing():
    none = simulate([], [0], Belady(), 4)
    assert (none.misses, none.miss_ratio, none.per_batch.tolist()) == (0, 0.0, [])


@pytest.mark.parametrize(
    "policy", [LRU(), LFU(3), Static.of([0, 2]), LookAhead(2, 2), LookAhead(9), Belady(), Chaos(2)]
)
@settings(QUICK, max_examples=8)
@given(seed=st.integers(0, 2**32), ahead=st.integers(0, 3), more=st.integers(0, 12))
def test_a_run_moves_what_the_simulation_says(policy: Policy, seed: int, ahead: int, more: int):
    dice = random.Random(seed)
    batches = [[dice.randrange(20) for _ in range(dice.randint(1, 6))] for _ in range(dice.randint(1, 15))]
    slots = max(len(set(batch)) for batch in batches) + more
    tables = TieredEmbeddings(
        [Table("a", 40, 2)], SGD(0.1), tiers=[Dram(slots), Shelf()], policy=policy, ahead=ahead
    )  # fmt: skip
    loader = [{"ids": torch.tensor(batch)[:, None]} for batch in batches]
    for batch in Prefetch(tables, loader):
        tables(batch["ids"]).sum().backward()
    ids, offsets = flat(batches)
    found = simulate(ids, offsets, policy, slots, ahead=ahead, slots=slots)
    moves = tables.moves
    assert (moves.needed, moves.missed, moves.fresh, moves.left) == (
        found.unique, found.misses, found.first_uses, found.evicted,
    )  # fmt: skip
    assert moves.clean == 0
    tables.store.check()
