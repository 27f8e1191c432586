"""Where a row lies never changes what it becomes: also after a failure, a crash, or with very little memory."""

from __future__ import annotations

import faulthandler
import gc
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.embeddings.twins import Case, same, same_seen, train
from tests.tiers.shelf import Shelf
from vitalfew.core import InputError, StorageError
from vitalfew.embeddings import SGD, Adagrad, EmbeddingBags, LazyAdam, Prefetch, Table, TieredEmbeddings
from vitalfew.tiers import LFU, LRU, Dram, File, LookAhead

Refuses = Callable[..., AbstractContextManager[None]]
QUICK = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
WIDE = settings(QUICK, max_examples=300)
SEEDS = st.integers(0, 2**32)


@pytest.fixture(autouse=True)
def watched(request: pytest.FixtureRequest) -> Iterator[None]:
    """End a test that hangs."""
    faulthandler.dump_traceback_later(900 if request.node.get_closest_marker("slow") else 120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def small(tmp_path: Path, slots: int = 6, **more: Any) -> TieredEmbeddings:
    tables = [Table("a", 20, 3), Table("b", 10, 3)]
    more = {"generator": torch.Generator().manual_seed(0)} | more
    return TieredEmbeddings(tables, SGD(0.1), tiers=[Dram(slots), File(tmp_path)], **more)


def one(a: int, b: int) -> torch.Tensor:
    return torch.tensor([[a, b]])


# -- the same bits


def compare(seed: int, *, driven: bool, **fixed: Any) -> None:
    case = Case.drawn(seed, **fixed)
    plain = case.plain()
    want = train(case, plain, case.batches) + train(case, plain, case.batches)
    with TemporaryDirectory() as folder, case.tiered(Path(folder)) as tiered:
        loader = Prefetch(tiered, case.batches) if driven else case.batches
        same_seen(train(case, tiered, loader) + train(case, tiered, loader), want)
        same(plain, tiered)
        assert plain.counts == tiered.counts


@pytest.mark.parametrize("driven", [False, True])
@QUICK
@given(seed=SEEDS)
def test_bits_are_those_of_all_in_memory(driven: bool, seed: int):
    compare(seed, driven=driven)


@pytest.mark.slow
@pytest.mark.parametrize("driven", [False, True])
@WIDE
@given(seed=SEEDS)
def test_bits_are_those_of_all_in_memory_in_many_cases(driven: bool, seed: int):
    compare(seed, driven=driven)


def test_several_threads_give_the_same_bits(threads: Callable[[int], None]):
    threads(2)
    for seed in range(5):
        compare(seed, driven=seed % 2 == 0)


# -- commit, crash and resume


@settings(QUICK, max_examples=25)
@given(seed=SEEDS)
def test_a_run_that_was_committed_and_opened_again_is_the_uninterrupted_one(
    seed: int, tmp_path_factory: pytest.TempPathFactory
):
    dice, folder = random.Random(seed), tmp_path_factory.mktemp("rows")
    case = Case.drawn(seed, kind=dice.choice(["file", "ring file", "shelf", "ring shelf"]), every=1)
    plain = case.plain()
    want = train(case, plain, case.batches)
    cut = dice.randint(0, len(case.batches))
    tiered = case.tiered(folder)
    found = train(case, tiered, Prefetch(tiered, case.batches[:cut]))
    tiered.commit({"step": cut})
    train(case, tiered, case.batches[cut : cut + 2], first=cut)  # and this is lost
    tiered.close()
    tiered = case.tiered(folder, resume=True)
    assert tiered.note == {"step": cut}
    found += train(case, tiered, Prefetch(tiered, case.batches[cut:]), first=cut)
    same_seen(found, want)
    same(plain, tiered)
    tiered.close()


def test_a_commit_inside_a_loop_is_that_of_the_moment(tmp_path: Path):
    case = Case.drawn(11, kind="ring file", update="backward", every=1)
    plain, tiered = case.plain(), case.tiered(tmp_path)
    train(case, plain, case.batches[:3])
    for k, batch in enumerate(Prefetch(tiered, case.batches)):
        train(case, tiered, [batch], first=k)
        if k == 2:
            tiered.commit()
    tiered.close()
    with case.tiered(tmp_path, resume=True) as again:
        same(plain, again)


CHILD = """
import sys
from pathlib import Path
from tests.embeddings.twins import Case, train
from vitalfew.embeddings import Prefetch
seed, folder = int(sys.argv[1]), Path(sys.argv[2])
case = Case.drawn(seed, kind="ring file", update="backward", every=1)
tables = case.tiered(folder)
tables.commit({"done": 0})
print("begun", flush=True)
done = 0
while True:
    for batch in Prefetch(tables, case.batches):
        train(case, tables, [batch], first=done)
        done += 1
        if done % 3 == 0:
            tables.commit({"done": done})
            print(done, flush=True)
"""


def kill_and_resume(seed: int, folder: Path) -> int:
    dice = random.Random(seed)
    root = Path(__file__).parents[2]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(seed), str(folder)], cwd=root, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    with child:
        assert child.stdout.readline() == "begun\n"
        time.sleep(dice.random() * 1.5)  # any moment will do
        child.send_signal(signal.SIGKILL)
        told = [int(line) for line in child.stdout.read().split()]
    case = Case.drawn(seed, kind="ring file", update="backward", every=1)
    plain = case.plain()
    with case.tiered(folder, resume=True) as tiered:
        done = tiered.note["done"]
        assert done >= max(told, default=0), "a commit that was acknowledged is lost"
        for k in range(done + 5):
            batch = case.batches[k % len(case.batches)]
            train(case, plain, [batch], first=k)
            if k >= done:
                train(case, tiered, [batch], first=k)
        same(plain, tiered)
    return done


def test_a_killed_process_goes_on_from_its_last_commit(tmp_path: Path):
    assert kill_and_resume(5, tmp_path) >= 0


@pytest.mark.slow
def test_processes_killed_at_many_moments_go_on_from_their_last_commits(tmp_path: Path):
    done = [kill_and_resume(seed, tmp_path / str(seed)) for seed in range(12)]
    assert len(set(done)) > 3, "they were killed at different moments"


# -- failures


@pytest.mark.parametrize("driven", [False, True])
@QUICK
@given(seed=SEEDS)
def test_no_update_is_lost_when_the_lower_tier_fails_and_heals(driven: bool, seed: int):
    dice = random.Random(seed)
    case = Case.drawn(seed, kind=dice.choice(["shelf", "ring shelf"]), every=1)
    left = dice.randint(0, 25)

    def fails(what: str) -> bool:
        nonlocal left
        left -= 1
        return left < 0

    def heal() -> None:
        nonlocal left
        left = dice.randint(1, 25)

    case.shelf.fails = fails
    plain = case.plain()
    # Evaluation reads as well, and a batch is done only after it: so there is none.
    case.batches = [{**batch, "weights": None} for batch in case.batches]
    for k, batch in enumerate(case.batches):
        step(case, plain, batch, k)
    tiered, done = case.tiered(Path()), 0
    while done < len(case.batches):
        rest = case.batches[done:]
        try:
            for batch in Prefetch(tiered, rest) if driven else rest:
                step(case, tiered, batch, done)
                done += 1
        except StorageError:
            heal()
    left = 10**9
    same(plain, tiered)
    assert tiered.store.residency.num_held <= case.slots
    tiered.commit()
    tiered.close()
    with case.tiered(Path(), resume=True) as again:
        same(plain, again)


def step(case: Case, tables: EmbeddingBags, batch: dict[str, Any], k: int) -> None:
    out = tables(batch["ids"], batch["offsets"])
    (torch.sin(out + k) * torch.linspace(-1, 2, out.numel()).reshape(out.shape)).sum().backward()
    if case.update == "step":
        tables.step()


@pytest.mark.parametrize("driven", [False, True])
def test_an_error_between_forward_and_backward_loses_nothing_but_that_step(tmp_path: Path, driven: bool):
    for seed in range(4):
        case = Case.drawn(seed, kind="ring shelf", every=1)
        plain = case.plain()
        for k, batch in enumerate(case.batches):
            step(case, plain, batch, k)
        with case.tiered(tmp_path / str(seed)) as tiered:
            done = 0
            for trial in itertools.count():  # noqa: B007  it is the number of errors at the end
                rest = case.batches[done:]
                try:
                    for at, batch in enumerate(Prefetch(tiered, rest) if driven else rest):
                        if at == 1:
                            lost = tiered(batch["ids"], batch["offsets"])
                            raise ZeroDivisionError
                        step(case, tiered, batch, done)
                        done += 1
                    break
                except ZeroDivisionError:
                    del lost
                    gc.collect()
                    tiered.zero_grad()
            assert trial == max(len(case.batches) - 1, 0)
            same(plain, tiered)


def test_a_failed_commit_can_be_tried_again(tmp_path: Path):
    broken: list[str] = []
    case = Case.drawn(4, kind="ring shelf", update="backward", every=1)
    case.shelf.fails = lambda what: what in broken
    plain, tiered = case.plain(), case.tiered(tmp_path)
    train(case, plain, case.batches)
    train(case, tiered, case.batches)
    for what in ("write", "commit"):
        broken.append(what)
        with pytest.raises(StorageError, match="the shelf broke"):
            tiered.commit()
        same(plain, tiered)
        broken.clear()
    tiered.commit()
    tiered.close()
    with case.tiered(tmp_path, resume=True) as again:
        same(plain, again)


# -- backward at the wrong time


def test_backward_after_the_loop_is_refused_and_changes_nothing(tmp_path: Path, refuses: Refuses):
    with small(tmp_path) as tables:
        for batch in Prefetch(tables, [{"ids": one(1, 2)}]):
            loss = tables(batch["ids"]).sum()
        before = tables.rows_of("a")
        with refuses("no longer held"):
            loss.backward()
        assert torch.equal(before, tables.rows_of("a"))
        tables(one(1, 2)).sum().backward()
        assert not torch.equal(before, tables.rows_of("a"))


@pytest.mark.parametrize("driven", [False, True])
def test_a_second_backward_is_refused(tmp_path: Path, refuses: Refuses, driven: bool):
    with small(tmp_path) as tables:
        loader = [{"ids": one(1, 2)}, {"ids": one(3, 4)}]
        for batch in Prefetch(tables, loader) if driven else loader:
            loss = tables(batch["ids"]).sum()
            loss.backward(retain_graph=True)
            before = tables.rows_of("a")
            with refuses("backward ran twice"):
                loss.backward()
            assert torch.equal(before, tables.rows_of("a"))


@pytest.mark.parametrize("driven", [False, True])
def test_forwards_that_stay_without_backward_end_in_one_clear_error(tmp_path: Path, refuses: Refuses, driven: bool):
    with small(tmp_path, 6) as tables:
        kept: list[torch.Tensor] = []
        loader = [{"ids": one(k, k % 10)} for k in range(20)]
        with refuses("memory holds 6"):
            for batch in Prefetch(tables, loader) if driven else loader:
                kept.append(tables(batch["ids"]))  # noqa: PERF401  what was done before the error counts
        assert len(kept) == 3
        if not driven:
            for out in kept:  # what was held is still right
                out.sum().backward()
        kept.clear()
        tables(one(19, 9)).sum().backward()
        tables.store.check()


def test_losses_of_several_batches_may_be_joined_while_their_rows_fit(tmp_path: Path):
    for driven in (False, True):
        plain = EmbeddingBags(
            [Table("a", 20, 3), Table("b", 10, 3)], SGD(0.1), generator=torch.Generator().manual_seed(0)
        )
        with small(tmp_path / str(driven), 8) as tables:
            loader = [{"ids": one(k, k % 10)} for k in range(12)]
            for some in (plain, tables):
                outs: list[torch.Tensor] = []
                for batch in Prefetch(tables, loader) if driven and some is tables else loader:
                    outs.append(some(batch["ids"]))
                    if len(outs) == 3:
                        torch.sin(torch.stack(outs)).sum().backward()
                        outs.clear()
            same(plain, tables)


def test_rows_beside_those_of_the_batch_are_held_for_its_turn(tmp_path: Path):
    """A loop may draw rows of its own, such as negatives, while others leave in the background."""
    dice = np.random.default_rng(0)
    loader = [{"ids": torch.from_numpy(dice.integers(0, 10, (2, 2)))} for _ in range(300)]
    more = [torch.from_numpy(dice.integers(0, 10, (2, 2))) for _ in loader]
    for policy in (LRU(), LookAhead(4)):
        plain = EmbeddingBags(
            [Table("a", 20, 3), Table("b", 10, 3)], SGD(0.1), generator=torch.Generator().manual_seed(0)
        )
        tables = TieredEmbeddings(
            plain.tables, SGD(0.1), tiers=[Dram(16), Shelf(wanders=random.Random(0))], policy=policy,
            generator=torch.Generator().manual_seed(0), ahead=1,
        )  # fmt: skip
        for some in (plain, tables):
            for batch, other in zip(loader if some is plain else Prefetch(tables, loader), more, strict=True):
                torch.sin(some(batch["ids"]) + some(other)).sum().backward()
        same(plain, tables)


# -- the budget


def held_bytes(*roots: Any) -> int:
    """Add up the arrays that objects of this library lead to, each piece of memory once."""
    seen: set[int] = set()
    memory: dict[int, int] = {}
    todo = list(roots)
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            memory[storage.data_ptr()] = max(memory.get(storage.data_ptr(), 0), storage.nbytes())
        elif isinstance(one, np.ndarray):
            while isinstance(one.base, np.ndarray):
                one = one.base
            memory[one.ctypes.data] = max(memory.get(one.ctypes.data, 0), one.nbytes)
        elif isinstance(one, dict):
            todo += one.values()
        elif isinstance(one, list | tuple | set):
            todo += one
        elif type(one).__module__.startswith("vitalfew"):
            todo += vars(one).values() if hasattr(one, "__dict__") else []
            todo += [getattr(one, name, None) for name in getattr(type(one), "__slots__", ())]
    return sum(memory.values())


@settings(QUICK, max_examples=40)
@given(seed=SEEDS)
def test_memory_stays_in_its_budget_and_too_little_is_refused_with_what_would_do(
    seed: int, tmp_path_factory: pytest.TempPathFactory
):
    dice, folder = random.Random(seed), tmp_path_factory.mktemp("rows")
    tables = [Table("a", int(10 ** dice.uniform(3, 6)), dice.choice([1, 3, 16, 64]))]
    policy = dice.choice([LRU(), LFU(), LookAhead(), LookAhead(2**30)])
    optimizer = dice.choice([SGD(0.1), Adagrad(0.1), LazyAdam(0.1)])
    rings = [Dram(dice.randint(1, 5000))] if dice.random() < 0.3 else []
    nbytes = int(2 ** dice.uniform(20, 27))

    def make(nbytes: int) -> TieredEmbeddings:
        return TieredEmbeddings(
            tables, optimizer, tiers=[Dram(f"{nbytes} B"), *rings, File(folder)], policy=policy
        )  # fmt: skip

    try:
        made = make(nbytes)
    except InputError as error:
        least = int(re.search(r"at least ([\d,]+) bytes", error.hint).group(1).replace(",", ""))
        assert least > nbytes
        made, nbytes = make(least), least
    with made:
        assert made.room.nbytes <= nbytes
        ids = torch.arange(min(made.room.slots, tables[0].num_rows, 1000))[:, None]
        for batch in Prefetch(made, [{"ids": ids}]):
            made(batch["ids"]).sum().backward()
        made.rows._scratch.arrays.clear()  # belongs to a step, not to the rows
        assert held_bytes(made.rows, made.store) <= made.room.nbytes
        assert made.store.busy_slots == len(ids)


RSS = """
import shutil, sys, numpy as np, torch
from vitalfew.embeddings import SGD, Prefetch, Table, TieredEmbeddings
from vitalfew.tiers import Dram, File
torch.set_num_threads(1)
ROWS, DIM, B = 1_000_000, 250, 1024
def status(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))
def run(folder, memory, batches, rows):
    tables = TieredEmbeddings([Table("a", rows, DIM)], SGD(0.1), tiers=[Dram(memory), File(folder)])
    order = np.random.default_rng(0)
    def loader():
        for k in range(batches):
            fresh = np.arange(k * B, k * B + B) % rows
            fresh[::4] = order.integers(0, rows, len(fresh[::4]))
            yield {"ids": torch.from_numpy(fresh)[:, None]}
    for batch in Prefetch(tables, loader()):
        tables(batch["ids"]).sum().backward()
    traffic = tables.store.lower.traffic
    tables.commit()
    tables.close()
    shutil.rmtree(folder)
    return traffic.bytes_written
run(sys.argv[1] + "/warm", 8192, 12, 20_000)
before = status("VmRSS")
written = run(sys.argv[1] + "/full", sys.argv[2], 1000, ROWS)
print(status("VmHWM") - before, written)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mebibytes", [48, 96, 192])
def test_a_process_grows_by_no_more_than_the_budget_and_64_mebibytes(tmp_path: Path, mebibytes: int):
    done = subprocess.run(
        [sys.executable, "-c", RSS, str(tmp_path), f"{mebibytes} MiB"], capture_output=True, text=True, check=True
    )
    grown, written = map(int, done.stdout.split())
    assert written > 700 << 20, "most rows went to the disk"
    assert grown <= (mebibytes + 64) << 20, f"grown by {grown >> 20} MiB"


# -- wrong use


def test_ids_outside_are_refused_and_nothing_is_lost(tmp_path: Path, refuses: Refuses):
    with small(tmp_path) as tables:
        tables(one(1, 2)).sum().backward()
        before = tables.rows_of("a"), tables.rows_of("b")
        for wrong in (one(20, 0), one(-1, 0), one(0, 10)):
            with refuses("lies outside"):
                tables(wrong)
            with refuses("lies outside"), torch.no_grad():
                tables(wrong)
        with refuses("in sample 1"):
            tables(torch.tensor([[0, 0], [0, 11]]))
        assert torch.equal(before[0], tables.rows_of("a"))
        assert torch.equal(before[1], tables.rows_of("b"))
        tables(one(1, 2)).sum().backward()
        tables.store.check()
        with refuses("an id lies outside table `a`"):
            tables.rows_of("a", [20])


def test_a_batch_larger_than_the_memory_is_refused_with_the_number_of_its_rows(tmp_path: Path, refuses: Refuses):
    with small(tmp_path, 4) as tables:
        large = torch.tensor([[0, 0], [1, 1], [2, 2]])
        with refuses("needs 6 rows at a time, and the memory holds 4"):
            tables(large)
        with torch.no_grad():
            assert tables(large).shape == (3, 2, 3)
        tables(large[:2]).sum().backward()
        tables.store.check()


@pytest.mark.parametrize(
    ("tables", "optimizer", "dtype", "says"),
    [
        ([Table("a", 20, 3), Table("c", 10, 3)], SGD(0.1), torch.float32, "the store holds the tables"),
        ([Table("a", 10, 3), Table("b", 20, 3)], SGD(0.1), torch.float32, "the store holds the tables"),
        ([Table("a", 20, 3)], SGD(0.1), torch.float32, "num_rows"),
        ([Table("a", 20, 2), Table("b", 10, 2)], Adagrad(0.1), torch.float32, "record_bytes"),
        ([Table("a", 20, 6), Table("b", 10, 6)], SGD(0.1), torch.bfloat16, "holds rows of 3 float32, not 6 bfloat16"),
        ([Table("a", 20, 1), Table("b", 10, 1)], LazyAdam(0.1), torch.float32, "holds rows of 3 float32, not 1"),
    ],
)
def test_a_store_of_something_else_is_refused(
    tmp_path: Path, refuses: Refuses, tables: list[Table], optimizer: Any, dtype: torch.dtype, says: str
):
    with small(tmp_path) as first:
        first(one(1, 2)).sum().backward()
        first.commit()
        want = first.rows_of("a")
    with refuses(says):
        TieredEmbeddings(tables, optimizer, dtype=dtype, tiers=[Dram(6), File(tmp_path)], resume=True)
    with small(tmp_path, resume=True) as again:
        assert torch.equal(again.rows_of("a"), want)


def test_a_store_of_another_optimizer_is_refused(tmp_path: Path, refuses: Refuses):
    shelf = Shelf()
    tables = [Table("a", 20, 1)]
    with TieredEmbeddings(tables, Adagrad(0.1), tiers=[Dram(6), shelf]) as first:
        first.commit()
    from vitalfew.embeddings import RowwiseAdagrad

    with refuses("the store was trained by adagrad, not rowwise_adagrad"):
        TieredEmbeddings(tables, RowwiseAdagrad(0.1), tiers=[Dram(6), shelf], resume=True)
    assert shelf.tiers[-1].closed


def test_a_store_is_opened_once_and_only_as_what_it_is(tmp_path: Path, refuses: Refuses):
    with refuses("resume"):
        small(tmp_path, resume=True)
    with small(tmp_path) as tables:
        with refuses(tmp_path):
            small(tmp_path)
        tables.commit()
    with refuses(tmp_path):
        small(tmp_path)
    with small(tmp_path, resume=True):
        pass


@pytest.mark.parametrize(
    ("tiers", "says"),
    [
        ([], "the first tier must be a Dram"),
        ([File("x")], "the first tier must be a Dram"),
        ([Dram(4), Dram(4)], "the last tier is memory"),
        ([Dram(0), Shelf()], "0"),
        ([Dram("1 KiB")], "1,024 bytes"),
        ([Dram(4), Shelf(), Shelf()], "cannot stand between"),
    ],
)
def test_tiers_that_make_no_sense_are_refused(refuses: Refuses, tiers: list[Any], says: str):
    with refuses(says):
        TieredEmbeddings([Table("a", 20, 3)], SGD(0.1), tiers=tiers)


def test_what_is_closed_says_so(tmp_path: Path, refuses: Refuses):
    tables = small(tmp_path, 2)
    for k in range(4):
        tables(one(k, k)).sum().backward()
    tables.close()
    tables.close()
    with refuses("these rows are closed"):
        tables(one(9, 9))
    with refuses("these rows are closed"), torch.no_grad():
        tables(one(9, 9))
    with refuses("these rows are closed"):
        tables.commit()


def test_no_commit_while_gradients_wait(tmp_path: Path, refuses: Refuses):
    with small(tmp_path, update="step") as tables:
        tables(one(1, 2)).sum().backward()
        with refuses("gradients wait for a step"):
            tables.commit()
        tables.step()
        assert tables.commit() == 2


def test_the_note_of_a_commit_is_plain(tmp_path: Path):
    with small(tmp_path) as tables:
        tables.commit({"step": 3, "lr": 0.5, "names": ["x"]})
    with small(tmp_path, resume=True) as tables:
        assert json.dumps(tables.note) == '{"step": 3, "lr": 0.5, "names": ["x"]}'


def test_no_thread_stays(tmp_path: Path):
    before = threading.active_count()
    with small(tmp_path) as tables:
        for batch in Prefetch(tables, [{"ids": one(k, k % 10)} for k in range(20)]):
            tables(batch["ids"]).sum().backward()
    assert threading.active_count() == before
