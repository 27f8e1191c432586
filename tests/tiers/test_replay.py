"""Counting without moving gives what a run over `Prefetch` moves, row by row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vitalfew.core import InputError
from vitalfew.embeddings import SGD, Prefetch, Table, TieredEmbeddings
from vitalfew.tiers import LFU, LRU, Dram, File, LookAhead, Policy, Static, simulate
from vitalfew.tiers.rehearsal import Rehearsal
from vitalfew.tiers.replay import Replayed, replay
from vitalfew.tiers.schedule import Schedule
from vitalfew.tiers.trace import Trace

POLICIES = [LRU(), LFU(), LookAhead(depth=4), LookAhead(), Static.of(range(40))]


def batches_of(seed: int, number: int = 60, most: int = 40, rows: int = 400) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.zipf(1.3, rng.integers(1, most)) % rows for _ in range(number)]


def run(tables: TieredEmbeddings, batches: list[np.ndarray]) -> Replayed:
    with Prefetch(tables, batches, ids=lambda ids: torch.from_numpy(ids)[:, None]) as ahead:
        for ids in ahead:
            tables(torch.from_numpy(ids)[:, None]).sum().backward()
    tables.commit()
    moves = tables.moves
    return Replayed(len(batches), moves.needed, moves.missed, moves.fresh, moves.left)


def foretold(tables: TieredEmbeddings, batches: list[np.ndarray], below: np.ndarray | None = None) -> Replayed:
    schedule = Schedule(
        400, tables.room.slots, tables.policy, ahead=tables.store.schedule.ahead, depth=tables.store.schedule.depth,
        entries=tables.room.entries,
    )  # fmt: skip
    sized = [(ids.astype(np.int64), ids.nbytes) for ids in batches]
    return replay(sized, schedule, queue_bytes=tables.room.queue_bytes, below=below)


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: f"{policy.name}{getattr(policy, 'depth', '')}")
def test_as_the_run(tmp_path: Path, policy: Policy, ahead: int) -> None:
    batches = batches_of(ahead)
    tiers = [Dram(80), File(tmp_path)]
    with TieredEmbeddings([Table("user", 400, 4)], SGD(lr=0.5), tiers=tiers, policy=policy, ahead=ahead) as tables:
        expected = foretold(tables, batches)
        assert run(tables, batches) == expected
        assert expected.missed > expected.fresh > 0  # some are read
        assert expected.left > 0


def test_as_a_run_that_goes_on(tmp_path: Path) -> None:
    """Rows that are in the store already are read, not begun."""
    tiers = [Dram(80), File(tmp_path)]
    with TieredEmbeddings([Table("user", 400, 4)], SGD(lr=0.5), tiers=tiers) as tables:
        run(tables, batches_of(0))
    with TieredEmbeddings([Table("user", 400, 4)], SGD(lr=0.5), tiers=tiers, resume=True) as tables:
        expected = foretold(tables, batches_of(1), below=tables.store.residency.where < -1)
        assert run(tables, batches_of(1)) == expected
    assert expected.fresh < foretold(tables, batches_of(1)).fresh


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: f"{policy.name}{getattr(policy, 'depth', '')}")
def test_as_the_simulation_where_nothing_is_limited(policy: Policy) -> None:
    batches = batches_of(2)
    offsets = np.cumsum([0, *map(len, batches)])
    expected = simulate(np.concatenate(batches), offsets, policy, 130, slots=130, ahead=2)
    depth = getattr(policy, "depth", 0)
    schedule = Schedule(400, 130, policy, ahead=2, depth=depth, entries=10_000)
    found = replay([(ids, 0) for ids in batches], schedule)
    assert (found.missed, found.fresh, found.needed) == (expected.misses, expected.first_uses, expected.unique)
    assert found.miss_ratio == expected.miss_ratio


def test_a_short_queue_sees_less() -> None:
    batches = batches_of(3, number=200)

    def misses(queue_bytes: int) -> int:
        schedule = Schedule(400, 100, LookAhead(), ahead=1, depth=200, entries=10_000)
        return replay([(ids, 100) for ids in batches], schedule, queue_bytes=queue_bytes).missed

    assert misses(10**9) < misses(300)
    assert misses(0) >= misses(300)


def test_a_trace_gives_what_it_was_made_from(tmp_path: Path) -> None:
    batches = [(ids.astype(np.int64), 7 * len(ids)) for ids in batches_of(4)]
    with Trace(batches, folder=tmp_path) as trace:
        assert not list(tmp_path.iterdir())
        for _ in range(2):
            for (ids, size), (again, same) in zip(batches, trace, strict=True):
                assert size == same
                assert len(ids) == len(again)
                assert list(dict.fromkeys(ids.tolist())) == list(dict.fromkeys(again.tolist()))
        distinct = [np.unique(ids) for ids, _ in batches]
        assert trace.uses == sum(map(len, distinct))
        assert trace.largest == max(map(len, distinct))
        np.testing.assert_array_equal(trace.counts(400), np.bincount(np.concatenate(distinct), minlength=400))
        flat, offsets = trace.flat()
        assert len(flat) == trace.uses == offsets[-1]
        first = replay(batches, Schedule(400, 130, LFU(), ahead=2, depth=0, entries=300), queue_bytes=2000)
        second = replay(trace, Schedule(400, 130, LFU(), ahead=2, depth=0, entries=300), queue_bytes=2000)
        assert first == second


def test_belady_is_no_worse_than_any(tmp_path: Path) -> None:
    batches = [(ids.astype(np.int64), 8) for ids in batches_of(5)]
    from vitalfew.tiers import Belady

    schedule = Schedule(400, 130, Belady(), ahead=2, depth=0, entries=300)
    plan = Rehearsal((ids for ids, _ in batches), 400, folder=tmp_path)
    schedule.forget(plan)
    best = replay(batches, schedule).missed
    plan.close()
    for policy in POLICIES:
        depth = getattr(policy, "depth", 0)
        assert best <= replay(batches, Schedule(400, 130, policy, ahead=2, depth=depth, entries=10_000)).missed


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="needs 3 rows at a time, and the memory holds 2"):
        replay([(np.arange(3), 0)], Schedule(9, 2, LRU(), ahead=0, depth=0, entries=8))
    with pytest.raises(InputError, match="does not fit the window"):
        replay([(np.arange(3), 0)], Schedule(9, 9, LRU(), ahead=0, depth=0, entries=2))


def test_nothing_to_replay() -> None:
    assert replay([], Schedule(9, 2, LRU(), ahead=0, depth=0, entries=8)) == Replayed()
    with Trace([]) as trace:
        assert (len(trace), trace.uses, trace.largest) == (0, 0, 0)
        assert len(trace.flat()[0]) == 0
