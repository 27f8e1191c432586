"""The window against lists, and what holds of slots and turns for any batches whatever."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitalfew.core import InputError
from vitalfew.tiers import LFU, LRU, Belady, Chaos, LookAhead, Policy, Static, policy_named
from vitalfew.tiers.residency import FREE, HELD, LEAVING, LOADING, Residency
from vitalfew.tiers.schedule import Schedule
from vitalfew.tiers.window import NEVER, Window, distinct

QUICK = settings(deadline=None, max_examples=100, derandomize=True, database=None)
POLICIES = [LRU(), LFU(decay_every=2), LookAhead(depth=4, decay_every=3), Static.of([0, 5]), Chaos(3)]


def first_seen(ids: list[int]) -> list[int]:
    return list(dict.fromkeys(ids))


@QUICK
@given(seed=st.integers(0, 2**32), entries=st.integers(1, 40), far=st.booleans())
def test_a_window_is_a_list_of_batches_that_knows_next_uses(seed: int, entries: int, far: bool):
    dice, window = random.Random(seed), Window(entries)
    # Far apart or near together: with collisions in the index or without.
    rows = dice.sample(range(2**31 - 2), 12) if far else list(range(12))
    inside: list[list[int]] = []
    for _ in range(200):
        if dice.random() < 0.55:
            ids = [dice.choice(rows) for _ in range(dice.randint(0, 9))]
            used = sum(map(len, inside))
            before = window.entered
            assert window.enter(np.array(ids, np.int64)) == (len(ids) <= entries - used)
            if window.entered > before:
                inside.append(first_seen(ids))
        elif inside:
            for at, batch in enumerate(inside):
                assert window.rows(window.left + at).tolist() == batch
            gone, number = inside.pop(0), window.left
            after = [[number + 1 + k for k, batch in enumerate(inside) if row in batch] for row in gone]
            assert window.leave().tolist() == [uses[0] if uses else NEVER for uses in after]
        assert window.entered - window.left == len(inside)
        assert (window._keys >= 0).sum() == len(set().union(*inside)), "the index holds the rows inside, each once"


def test_repeats_need_no_room_in_a_window_that_is_short_of_it():
    schedule = Schedule(10, 4, LRU(), ahead=0, depth=3, entries=3)
    assert schedule.enter(np.array([4, 4, 4, 4, 7]))
    assert schedule.window.rows(0).tolist() == distinct(np.array([4, 4, 4, 4, 7])).tolist() == [4, 7]
    assert not schedule.enter(np.array([4, 5, 4]))
    assert schedule.enter(np.array([4, 4]))
    assert schedule.window.leave().tolist() == [1, NEVER]
    with pytest.raises(InputError, match="room for rows, got 0"):
        Window(0)


@QUICK
@given(
    seed=st.integers(0, 2**32), policy=st.sampled_from(POLICIES), ahead=st.integers(0, 3),
    capacity=st.none() | st.integers(0, 8), slack=st.integers(0, 20),
)  # fmt: skip
def test_laws_of_slots_and_turns(seed: int, policy: Policy, ahead: int, capacity: int | None, slack: int):
    dice, num_rows = random.Random(seed), 15
    slots = 5 + slack
    schedule = Schedule(num_rows, slots, policy, ahead=ahead, depth=4, entries=60, capacity=capacity)
    residency = schedule.residency
    turns: list[set[int]] = []
    resident: set[int] = set()

    def leave(gone: np.ndarray) -> None:
        rows = set(residency.row[gone].tolist())
        assert len(rows) == len(gone), "nobody leaves twice"
        assert rows <= resident
        assert not rows & set().union(*turns[schedule.finished : schedule.loaded]), "who is needed stays"
        assert (residency.bucket[gone] == LEAVING).all()
        residency.vacate(gone, np.zeros(len(gone), np.int32))
        resident.difference_update(rows)

    for _ in range(60):
        while schedule.wants() and schedule.enter(ids := np.array([dice.randrange(num_rows) for _ in range(5)])):
            turns.append(set(ids.tolist()))
        assert schedule.window.entered <= schedule.finished + 1 + max(4, ahead + 1)
        while (found := schedule.load(leave)) is not None:
            mine = turns[schedule.loaded - 1]
            assert set(found.ids.tolist()) == mine - resident, "all that is missing is fetched, and nothing else"
            assert (residency.bucket[found.into] == LOADING).all()
            resident.update(mine)
            residency.arrived(found.into)
            assert (residency.row[found.slots] == schedule.window.rows(schedule.loaded - 1)).all()
        assert schedule.finished < schedule.loaded <= schedule.finished + 1 + ahead
        needed = set().union(*turns[schedule.finished : schedule.loaded])
        assert set(residency.row[residency.bucket == HELD].tolist()) == needed
        assert residency.num_held == len(needed)
        leave(schedule.finish())
        assert set(np.flatnonzero(residency.where >= 0).tolist()) == resident
        assert residency.retained == (residency.bucket >= 0).sum() <= (slots if capacity is None else capacity)
        assert residency.num_free == (residency.bucket == FREE).sum()
    while schedule.finished < schedule.loaded:
        leave(schedule.finish())
    leave(schedule.forget())
    assert residency.num_held == 0


def test_look_ahead_evicts_the_farthest_next_use_and_lru_the_oldest():
    left: dict[str, list[int]] = {}
    for policy in (LRU(), LookAhead(depth=3)):
        schedule = Schedule(10, 9, policy, ahead=0, depth=3, entries=30, capacity=2)
        gone: list[int] = []

        def leave(slots: np.ndarray, schedule: Schedule = schedule, gone: list[int] = gone) -> None:
            gone += schedule.residency.row[slots].tolist()
            schedule.residency.vacate(slots, np.zeros(len(slots), np.int32))

        trace = [[1, 2, 3], [4], [1], [3]]
        for batch in trace[:4]:
            schedule.enter(np.array(batch))
        for _ in trace:
            found = schedule.load(leave)
            schedule.residency.arrived(found.into)
            leave(schedule.finish())
        left[policy.name] = gone
    assert left == {"lru": [1, 2, 3, 4], "lookahead": [2, 4]}


def test_rows_held_beside_a_batch_leave_with_the_turn_they_were_held_for():
    schedule = Schedule(10, 8, LRU(), ahead=1, depth=3, entries=30, capacity=0)
    residency = schedule.residency

    def leave(slots: np.ndarray) -> None:
        residency.vacate(slots, np.zeros(len(slots), np.int32))

    for batch in ([1], [2], [3]):
        schedule.enter(np.array(batch))
    for _ in range(2):
        residency.arrived(schedule.load(leave).into)
    residency.arrived(schedule.hold(np.array([7, 2]), leave, 1).into)  # the turn of batch 0 is still to be ended
    leave(schedule.finish())
    assert sorted(residency.row[residency.bucket == HELD]) == [2, 7]
    leave(schedule.finish())
    assert residency.num_free == 8
    schedule.load(leave)
    with pytest.raises(InputError, match="8 rows are needed beside those of batches in flight, and the memory holds 8"):
        schedule.hold(np.array([0, 1, 2, 4, 5, 6, 7, 8]), leave)


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"decay_every": 0}])
def test_policies_refuse_what_cannot_be(wrong: dict[str, int]):
    with pytest.raises(InputError, match="must be at least 1, got 0"):
        LookAhead(**wrong)


def test_policies_by_name():
    assert [policy_named(name).name for name in ("static", "lru", "lfu", "lookahead", "belady")] == [
        "static", "lru", "lfu", "lookahead", "belady",
    ]  # fmt: skip
    assert isinstance(policy_named("belady"), Belady)
    with pytest.raises(InputError, match="there is no policy 'fifo'"):
        policy_named("fifo")


def test_a_residency_refuses_what_cannot_be():
    with pytest.raises(InputError, match="tables of 2147483648 rows"):
        Residency(2**31, 4, LRU())
    for hot in ([10], [-1]):
        with pytest.raises(InputError, match="a hot row lies outside"):
            Residency(10, 4, Static.of(hot))
