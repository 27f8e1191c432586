"""A store of rows against a dictionary: whatever moves, fails or starts again, no update is lost and none is stale."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tiers.shelf import Shelf
from vitalfew.core import InputError, StorageError
from vitalfew.tiers import LFU, LRU, Chaos, Dram, File, LookAhead, Opened, Policy, RowStore, Static, store
from vitalfew.tiers.dram import Nowhere
from vitalfew.tiers.record import Record
from vitalfew.tiers.residency import FREE, HELD, LEAVING, LOADING
from vitalfew.tiers.schedule import Schedule

POLICIES = [LRU(), LFU(decay_every=2), LookAhead(depth=3, decay_every=3), Static.of([1, 3]), Chaos(1)]
QUICK = settings(deadline=None, max_examples=60, derandomize=True, database=None)


class Bench:
    """A slab of rows of 8 bytes, its store, and the values its rows ought to have."""

    def __init__(self, num_rows: int, num_slots: int, policy: Policy, opened: Opened, ahead: int = 1) -> None:
        self.num_rows = num_rows
        self.slab = np.zeros((num_slots, 2), np.float32)
        self.record = Record([self.slab])
        schedule = Schedule(num_rows, num_slots, policy, ahead=ahead, depth=3, entries=64)
        self.store = RowStore(schedule, self.record, opened.tier, self.begin, opened.places)
        self.rows = np.stack([np.arange(num_rows), np.zeros(num_rows)], 1).astype(np.float32)
        self.turns: list[list[int]] = []

    def begin(self, ids: np.ndarray, slots: np.ndarray) -> None:
        self.slab[slots] = np.stack([ids, np.zeros(len(ids))], 1)

    def enter(self, rows: list[int]) -> bool:
        if self.store.schedule.wants() and self.store.schedule.enter(np.array(rows, np.int64)):
            self.turns.append(rows)
            return True
        return False

    def update(self, dice: random.Random) -> None:
        """Change some rows of the batch whose turn it is, as a kernel would."""
        residency = self.store.residency
        for row in set(self.turns[self.store.schedule.finished]):
            slot = residency.where[row]
            assert slot >= 0
            assert residency.bucket[slot] == HELD
            assert (self.slab[slot] == self.rows[row]).all(), "a stale read"
            if dice.random() < 0.7:
                self.rows[row, 1] += 1
                self.slab[slot] = self.rows[row]
                self.store.dirty[slot] = 1

    def compare(self) -> None:
        self.store.check()
        ids = np.random.default_rng(0).permutation(self.num_rows)
        out = np.zeros((self.num_rows, 8), np.uint8)
        never = self.store.peek(ids, out)
        assert (self.rows[ids[never], 1] == 0).all(), "an update was lost"
        found = out.view(np.float32)
        found[never] = self.rows[ids[never]]
        assert (found == self.rows[ids]).all()


def below(kind: str, dice: random.Random, shelf: Shelf, folder: Path | None, num_rows: int, resume: bool) -> Opened:
    opened = File(folder).open(num_rows, 8, resume=resume) if folder else shelf.open(num_rows, 8, resume=resume)
    for _ in range(kind.count("ring")):
        opened = Dram(dice.randint(1, 5)).open(num_rows, 8, opened)
    return opened


def live(bench: Bench, dice: random.Random, steps: int, trouble: float) -> None:
    """Do what a training loop may do, in any order, while the tier below fails now and then."""
    owner, schedule = bench.store, bench.store.schedule
    for _ in range(steps):
        deed = dice.choice(["enter", "load", "turn", "turn", "turn", "abandon", "commit", "look", "hold", "keep"])
        in_flight = schedule.loaded > schedule.finished
        try:
            if deed == "enter":
                bench.enter([dice.randrange(bench.num_rows) for _ in range(dice.randint(0, 4))])
            elif deed == "load":
                owner.load()
            elif deed in ("turn", "keep") and in_flight:
                owner._settle()  # a batch whose rows did not all arrive has no turn
                bench.update(dice)
                owner.finish(keep=deed == "keep")
            elif deed == "hold" and in_flight:
                more = np.array(dice.sample(range(bench.num_rows), 2))
                owner.hold(more, schedule.finished)
                assert (owner.residency.bucket[owner.residency.where[more]] == HELD).all()
            elif deed == "abandon" and dice.random() < 0.3:
                owner.abandon()
                bench.turns = []
                assert not np.isin(owner.residency.bucket, [HELD, LOADING]).any(), "a slot is lost"
            elif deed == "commit" and dice.random() < 0.5:
                owner.commit({"rows": bench.rows.tolist()})
            elif deed == "look":
                bench.compare()
        except StorageError:
            assert trouble
        except InputError as error:  # the memory is full of rows that are held
            if "memory holds" not in error.message:
                raise
            owner.abandon()
            bench.turns = []


@pytest.mark.parametrize("kind", ["shelf", "ring shelf", "ring ring shelf"])
@QUICK
@given(seed=st.integers(0, 2**32), trouble=st.sampled_from([0.0, 0.2, 0.6]))
def test_no_update_is_lost_or_stale_whatever_fails(kind: str, seed: int, trouble: float):
    dice = random.Random(seed)
    num_rows = dice.randint(2, 14)
    policy, slots, ahead = dice.choice(POLICIES[:3] + POLICIES[4:]), dice.randint(4, 10), dice.randint(0, 3)
    broken = [0.0]
    shelf = Shelf(lambda what: dice.random() < broken[0], random.Random(dice.random()))
    before, store._CHUNK = store._CHUNK, dice.choice([8, 24, 2 << 20])
    try:
        bench = Bench(num_rows, slots, policy, below(kind, dice, shelf, None, num_rows, False), ahead)
        for _ in range(4):
            broken[0] = trouble
            live(bench, dice, 25, trouble)
            broken[0] = 0.0
            bench.compare()
            if dice.random() < 0.5:
                bench.store.commit({"rows": bench.rows.tolist()})
            if dice.random() < 0.4 and shelf.committed is not None:  # a crash
                opened = below(kind, dice, shelf, None, num_rows, True)
                bench = Bench(num_rows, slots, policy, opened, ahead)
                bench.rows = np.array(opened.note["rows"], np.float32)
                bench.compare()
    finally:
        store._CHUNK = before


@pytest.mark.parametrize("kind", ["file", "ring file"])
@settings(QUICK, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_nor_over_a_file_that_is_opened_again(kind: str, seed: int, tmp_path_factory: pytest.TempPathFactory):
    dice = random.Random(seed)
    folder = tmp_path_factory.mktemp("rows")
    num_rows, policy, slots = dice.randint(2, 40), dice.choice(POLICIES[:3] + POLICIES[4:]), dice.randint(4, 10)
    opened = below(kind, dice, Shelf(), folder, num_rows, False)
    for _ in range(3):
        bench = Bench(num_rows, slots, policy, opened)
        if opened.note is not None:
            bench.rows = np.array(opened.note["rows"], np.float32)
        bench.compare()
        live(bench, dice, 60, 0.0)
        bench.store.commit({"rows": bench.rows.tolist()})
        bench.store.close()
        opened = below(kind, dice, Shelf(), folder, num_rows, True)
    opened.tier.close()


def test_a_batch_whose_loading_failed_leaves_no_slot_behind():
    broken = []
    bench = Bench(12, 4, LRU(), Shelf(lambda what: what in broken).open(12, 8), ahead=0)
    for rows in ([0, 1, 2, 3], [4, 5, 2, 3]):
        bench.enter(rows)
    bench.store.load()
    bench.store.dirty[:] = 1
    broken.append("write")
    bench.store.finish()  # rows are retained, and leave only when room is wanted
    for _ in range(2):
        with pytest.raises(StorageError):
            bench.store.load()
    bench.store.abandon()
    bench.turns = []
    broken.clear()
    bench.enter([8, 9, 10, 11])
    assert bench.store.load()
    assert bench.store.residency.num_held == 4
    bench.compare()


def test_a_row_on_its_way_out_is_not_taken_for_one_that_is_held():
    inside, go = threading.Event(), threading.Event()

    def slow(what: str) -> bool:
        if what == "write":
            inside.set()
            assert go.wait(20)
        return False

    bench = Bench(8, 2, LRU(), Shelf(slow).open(8, 8), ahead=0)
    bench.enter([0, 1])
    bench.enter([2, 3])
    bench.store.load()
    bench.store.dirty[:] = 1
    bench.store.finish()
    loading = threading.Thread(target=bench.store.load)
    loading.start()
    assert inside.wait(20)
    residency = bench.store.residency
    assert (residency.bucket[residency.where[[0, 1]]] == LEAVING).all()
    go.set()
    loading.join()
    assert (residency.where[[0, 1]] < -1).all()


def test_rows_kept_for_a_step_go_on_without_a_next_batch_and_are_named_when_they_leave_no_room():
    bench = Bench(9, 4, LRU(), Shelf().open(9, 8), ahead=0)
    bench.enter([0, 1, 2])
    bench.store.load()
    bench.store.finish(keep=True)
    bench.enter([2, 3])
    assert bench.store.load()
    assert (bench.store.residency.bucket[bench.store.residency.where[:4]] == HELD).all()
    bench.store.finish(keep=True)
    bench.enter([4])
    with pytest.raises(InputError, match="gradients wait for a step, and the 4 rows"):
        bench.store.load()
    bench.store.abandon()
    assert bench.store.residency.num_held == 0
    bench.compare()


def test_a_batch_that_is_larger_than_the_memory_is_refused_with_both_numbers():
    bench = Bench(9, 4, LRU(), Shelf().open(9, 8), ahead=2)
    bench.enter([0, 1])
    bench.enter([2, 3, 4, 5, 6])
    assert bench.store.load()
    assert not bench.store.load()
    bench.store.finish()
    with pytest.raises(InputError, match="needs 5 rows at a time, and the memory holds 4"):
        bench.store.load()
    bench.store.abandon()
    bench.enter([5, 6, 7, 8])
    assert bench.store.load()


def test_clean_rows_leave_without_a_write_and_fresh_ones_begin_again():
    shelf = Shelf()
    bench = Bench(9, 2, LRU(), shelf.open(9, 8), ahead=0)
    for rows in ([0, 1], [2, 3], [0, 1], [2, 3]):
        bench.enter(rows)
        assert bench.store.load()
        bench.store.finish()
    moves, traffic = bench.store.moves, shelf.tiers[0].traffic
    assert (moves.needed, moves.missed, moves.fresh, moves.left, moves.clean) == (8, 8, 8, 6, 6)
    assert (traffic.rows_read, traffic.rows_written) == (0, 0)
    bench.compare()


def test_a_commit_writes_what_has_changed_and_nothing_twice():
    shelf = Shelf()
    bench = Bench(9, 4, LRU(), shelf.open(9, 8), ahead=0)
    bench.enter([0, 1, 2])
    bench.store.load()
    bench.rows[:2, 1] = 1
    bench.slab[bench.store.residency.where[:2]] = bench.rows[:2]
    bench.store.dirty[bench.store.residency.where[:2]] = 1
    assert [bench.store.commit({}), bench.store.commit({})] == [2, 0]
    bench.store.finish()
    bench.compare()
    assert shelf.tiers[0].traffic.rows_written == 2


def test_memory_alone_takes_nothing_below():
    bench = Bench(4, 4, LRU(), Opened(Nowhere(8), None, None))
    bench.enter([0, 1, 2, 3])
    bench.store.load()
    bench.update(random.Random(0))
    bench.store.finish()
    bench.compare()
    bench.store.dirty[:] = 0
    with pytest.raises(InputError, match="memory alone keeps nothing"):
        bench.store.commit({})
    assert (bench.store.residency.bucket != FREE).all()
