"""A loop that reads ahead is the loop without it: each batch once, in order, errors in their place, nothing left."""

from __future__ import annotations

import faulthandler
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from tests.tiers.shelf import Shelf
from vitalfew.core import InputError, StorageError
from vitalfew.embeddings import SGD, EmbeddingBags, Prefetch, Table, TieredEmbeddings
from vitalfew.tiers import LFU, LRU, Belady, Dram, LookAhead, Policy

Refuses = Callable[..., AbstractContextManager[None]]
Batch = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def watched() -> Iterator[None]:
    """End a test that hangs, and let none leave a thread."""
    faulthandler.dump_traceback_later(60, exit=True)
    before = set(threading.enumerate())
    yield
    faulthandler.cancel_dump_traceback_later()
    assert set(threading.enumerate()) <= before


def make(slots: int = 8, *, shelf: Shelf | None = None, **more: Any) -> TieredEmbeddings:
    more = {"generator": torch.Generator().manual_seed(0)} | more
    return TieredEmbeddings([Table("a", 50, 2)], SGD(0.5), tiers=[Dram(slots), shelf or Shelf()], **more)


def batches(count: int, size: int = 2, seed: int = 0) -> list[Batch]:
    dice = random.Random(seed)
    return [
        {"ids": torch.tensor([[dice.randrange(50)] for _ in range(size)]), "k": torch.tensor(k)} for k in range(count)
    ]


def step(tables: EmbeddingBags, batch: Batch) -> None:
    torch.sin(tables(batch["ids"])).sum().backward()


def right(tables: TieredEmbeddings, trained: Iterable[Batch]) -> None:
    """Compare with all rows in memory after the same batches."""
    plain = EmbeddingBags([Table("a", 50, 2)], SGD(0.5), generator=torch.Generator().manual_seed(0))
    for batch in trained:
        step(plain, batch)
    assert torch.equal(plain.rows_of("a"), tables.rows_of("a"))
    tables.store.check()
    assert tables.store.residency.num_held == 0


class Counted:
    """A loader that tells how far it was read, and may be slow or break."""

    def __init__(self, content: list[Batch], fails_at: int | None = None, pause: Callable[[], float] = lambda: 0.0):
        self.content, self.fails_at, self.pause = content, fails_at, pause
        self.read, self.rounds = 0, 0

    def __len__(self) -> int:
        return len(self.content)

    def __iter__(self) -> Iterator[Batch]:
        self.rounds += 1
        for k, batch in enumerate(self.content):
            time.sleep(self.pause())
            if k == self.fails_at:
                raise ZeroDivisionError(f"batch {k}")
            self.read += 1
            yield batch


POLICIES = [LRU(), LFU(), LookAhead(5), LookAhead(), Belady()]


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_batch_comes_once_and_in_order(policy: Policy, ahead: int):
    tables = make(policy=policy, ahead=ahead)
    loader = Counted([*batches(23), *batches(1, 1, seed=1)])  # the last one is smaller
    prefetch = Prefetch(tables, loader)
    assert len(prefetch) == 24
    trained = []
    for _ in range(2):
        for batch in prefetch:
            step(tables, batch)
            trained.append(batch)
    assert [id(batch) for batch in trained] == 2 * [id(batch) for batch in loader.content]
    assert prefetch.given == 48
    right(tables, trained)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_empty_loader_gives_nothing(policy: Policy):
    tables = make(policy=policy)
    assert list(Prefetch(tables, [])) == []
    right(tables, [])


def test_batches_of_all_sizes_some_of_them_empty():
    content = [batches(1, size, seed=size)[0] for size in (3, 0, 8, 1, 0, 0, 7, 2)]
    for batch in content:
        batch["ids"] = batch["ids"].reshape(-1, 1).long()
    tables = make(8)
    for batch in Prefetch(tables, content):
        step(tables, batch)
    right(tables, content)


# -- back-pressure


@pytest.mark.parametrize(("policy", "most"), [(LRU(), 4), (LookAhead(6), 7), (LookAhead(1), 4)])
def test_a_slow_loop_is_not_run_away_from(policy: Policy, most: int):
    loader = Counted(batches(40))
    tables = make(30, policy=policy, ahead=3)
    for k, batch in enumerate(Prefetch(tables, loader)):
        time.sleep(0.002)
        # The window holds the batch that is given and `most` more; one may wait before it.
        assert loader.read <= k + 1 + most + 1
        step(tables, batch)
    assert loader.read == 40
    right(tables, loader.content)


def test_large_batches_do_not_pile_up():
    content = batches(40)
    for batch in content:
        batch["image"] = torch.zeros(1 << 18)  # a mebibyte
    loader, tables = Counted(content), make(30, policy=LookAhead(30), ahead=1)
    queue = tables.room.queue_bytes >> 20
    for k, batch in enumerate(Prefetch(tables, loader)):
        time.sleep(0.002)
        assert loader.read <= k + 1 + max(queue, 3) + 1
        step(tables, batch)
    right(tables, content)


def test_a_window_too_small_for_repeats_goes_on():
    dice = random.Random(0)
    content = [
        {"ids": torch.tensor([[dice.choice([k % 7, 9, 11])] for _ in range(1500)])} for k in range(12)
    ]  # fmt: skip
    for update in ("backward", "step"):
        plain = EmbeddingBags([Table("a", 50, 2)], SGD(1e-3), generator=torch.Generator().manual_seed(0), update=update)
        tables = TieredEmbeddings(
            plain.tables,
            SGD(1e-3),
            tiers=[Dram(12), Shelf()],
            generator=torch.Generator().manual_seed(0),
            update=update,
        )
        for some in (plain, tables):
            for k, batch in enumerate(content if some is plain else Prefetch(tables, content)):
                step(some, batch)
                if update == "step" and k % 3 == 2:
                    some.step()
        assert torch.equal(plain.rows_of("a"), tables.rows_of("a"))


# -- errors in their place


@pytest.mark.parametrize("policy", [LRU(), LookAhead()])
@pytest.mark.parametrize("at", [0, 1, 2, 9, 19])
def test_an_error_of_the_loader_comes_where_its_batch_would(policy: Policy, at: int):
    loader, tables, trained = Counted(batches(20), fails_at=at), make(policy=policy), []
    with pytest.raises(ZeroDivisionError, match=f"batch {at}"):  # noqa: PT012
        for batch in Prefetch(tables, loader):
            step(tables, batch)
            trained.append(batch)
    assert len(trained) == at
    right(tables, trained)
    for batch in Prefetch(tables, loader.content[at:]):
        step(tables, batch)
    right(tables, loader.content)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"ids": torch.tensor([[3], [50]])}, "id 50 of feature `a` in sample 1"),
        ({"ids": torch.tensor([[3, 4]])}, "expected ids of shape (samples, 1), got (1, 2)"),
        ({"ids": torch.tensor([0.5])}, "expected ids of shape"),
        ({"ids": torch.tensor([[0.5]])}, "ids must be integers"),
        ({"ids": torch.tensor([1, 2]), "offsets": torch.tensor([0, 3])}, "offsets must rise"),
        ({"rows": torch.tensor([1])}, "a batch of type dict has no `ids`"),
        ({"ids": torch.arange(9)[:, None]}, "needs 9 rows at a time, and the memory holds 8"),
    ],
)
@pytest.mark.parametrize("at", [0, 6])
def test_a_batch_that_is_wrong_is_told_when_its_turn_comes(refuses: Refuses, wrong: Batch, says: str, at: int):
    content, tables, trained = batches(12), make(), []
    with refuses(says):
        for batch in Prefetch(tables, [*content[:at], wrong, *content[at:]]):
            step(tables, batch)
            trained.append(batch)
    assert trained == content[:at]
    right(tables, trained)
    for batch in Prefetch(tables, content[at:]):
        step(tables, batch)
    right(tables, content)


def test_a_stop_iteration_of_ids_does_not_end_the_epoch_in_silence():
    def ids(batch: Batch) -> torch.Tensor:
        if batch["k"] == 3:
            raise StopIteration
        return batch["ids"]

    tables, trained = make(), []
    with pytest.raises(RuntimeError):  # noqa: PT012
        for batch in Prefetch(tables, batches(9), ids=ids):
            trained.append(batch)  # noqa: PERF402
    assert len(trained) == 3


@pytest.mark.parametrize("what", ["read", "write"])
def test_an_error_of_the_disk_comes_into_the_loop_and_what_was_given_is_done(what: str):
    for wait in range(0, 10, 2):
        left = wait

        def fails(deed: str) -> bool:
            nonlocal left
            left -= deed == what
            return left < 0 and deed == what

        content, tables, trained = batches(30, 3), make(7, shelf=Shelf(fails)), []
        with pytest.raises(StorageError, match="the shelf broke"):  # noqa: PT012
            for batch in Prefetch(tables, content):
                step(tables, batch)
                trained.append(batch)
        left = 10**9
        right(tables, trained)
        for batch in Prefetch(tables, content[len(trained) :]):
            step(tables, batch)
        right(tables, content)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, GeneratorExit])
def test_the_loop_may_be_left_and_begun_again(error: type[BaseException]):
    content, tables = batches(20), make()
    prefetch = Prefetch(tables, content)
    trained = []
    for at in (0, 3, 7):
        with pytest.raises(error):  # noqa: PT012
            for k, batch in enumerate(prefetch):
                if k == at:
                    tables(batch["ids"]).sum()
                    raise error
                step(tables, batch)
                trained.append(batch)
        right(tables, trained)
    for k, batch in enumerate(prefetch):
        step(tables, batch)
        trained.append(batch)
        if k == 4:
            break
    for batch in prefetch:
        step(tables, batch)
        trained.append(batch)
    right(tables, trained)


def test_a_loop_in_a_loop_is_refused(refuses: Refuses):
    content, tables = batches(10), make(20)
    prefetch, trained = Prefetch(tables, content), []
    for batch in prefetch:
        with refuses("a loop over this Prefetch is running"):
            next(iter(prefetch))
        with refuses("another Prefetch reads ahead"):
            next(iter(Prefetch(tables, content)))
        step(tables, batch)
        trained.append(batch)
    assert trained == content
    right(tables, trained)


def test_a_prefetch_closed_inside_its_loop_says_so(refuses: Refuses):
    content, tables = batches(10), make()
    with Prefetch(tables, content) as prefetch:
        loop = iter(prefetch)
        first = next(loop)
        step(tables, first)
        prefetch.close()
        with refuses("closed inside its own loop"):
            next(loop)
        again = [batch for batch in prefetch if step(tables, batch) is None]
    del loop
    assert again == content
    right(tables, [first, *content])


def test_an_old_loop_that_is_let_go_does_not_end_a_new_one():
    content, tables = batches(10), make()
    prefetch = Prefetch(tables, content)
    old = iter(prefetch)
    next(old)
    prefetch.close()
    trained = []
    for batch in prefetch:
        old = None
        step(tables, batch)
        trained.append(batch)
    assert old is None
    right(tables, content)


def test_tables_closed_inside_the_loop_end_it_with_a_clear_error(refuses: Refuses):
    tables = make(4, ahead=0)
    with refuses("these rows are closed"):
        for batch in Prefetch(tables, batches(20)):
            step(tables, batch)
            tables.close()


def test_gradients_that_wait_at_the_end_are_not_dropped_in_silence(refuses: Refuses):
    tables = make(20, update="step")
    with refuses("2 gradients waited for a step when the loop ended"):
        for k, batch in enumerate(Prefetch(tables, batches(5))):
            step(tables, batch)
            if k == 2:
                tables.step()
    right_after = make(20, update="step")
    with pytest.raises(ZeroDivisionError):  # noqa: PT012  no second complaint
        for batch in Prefetch(right_after, batches(5)):
            step(right_after, batch)
            raise ZeroDivisionError
    assert tables.rows.pending == right_after.rows.pending == 0


@pytest.mark.parametrize("ahead", [0, 2])
def test_gradients_that_leave_no_room_end_in_one_clear_error(refuses: Refuses, ahead: int):
    tables = make(5, update="step", ahead=ahead)
    content = [{"ids": torch.tensor([[2 * k], [2 * k + 1]])} for k in range(6)]
    with refuses("gradients wait for a step, and the 4 rows of theirs leave no room"):
        for batch in Prefetch(tables, content):
            step(tables, batch)
    tables.zero_grad()
    for batch in Prefetch(tables, content):
        step(tables, batch)
        tables.step()
    right(tables, content)


def test_a_forward_before_the_loop_is_not_forgotten(refuses: Refuses):
    tables = make()
    out = tables(torch.tensor([[1]]))
    with refuses("an update may come for a forward before this loop"):
        next(iter(Prefetch(tables, batches(3))))
    out.sum().backward()
    assert len(list(Prefetch(tables, batches(3)))) == 3


# -- no clock decides


@pytest.mark.parametrize("policy", [LookAhead(3), LookAhead(), LFU(2)])
def test_counts_do_not_depend_on_who_is_faster(policy: Policy):
    content = batches(30, 3)
    for k, batch in enumerate(content):
        batch["image"] = torch.zeros((1 << 16) * (k % 5))  # the queue is full now and then
    found = []
    for run in range(10):
        dice = random.Random(run)
        pause = lambda dice=dice, run=run: dice.random() * 2e-3 * (run > 0)  # noqa: E731
        shelf = Shelf(lambda what, pause=pause: bool(time.sleep(pause())))
        tables = make(9, shelf=shelf, policy=policy, ahead=2)
        for batch in Prefetch(tables, Counted(content, pause=pause)):
            time.sleep(pause())
            step(tables, batch)
        traffic = tables.store.lower.traffic
        found.append((repr(tables.moves), traffic.rows_read, traffic.rows_written))
        right(tables, content)
    assert len(set(found)) == 1


def test_a_receipt_tells_what_moved():
    content, tables = batches(10), make(6)
    prefetch = Prefetch(tables, content)
    for batch in prefetch:
        step(tables, batch)
    lines = {line.what: line for line in prefetch.receipt().lines}
    moves = tables.moves
    assert lines["rows fetched per step"].after == moves.missed / 10
    assert lines["of them never written before"].after == moves.fresh / 10
    assert lines["memory"].after == tables.room.nbytes


def test_only_tables_over_tiers_can_be_read_ahead(refuses: Refuses):
    with refuses("EmbeddingBags has nothing to read ahead"):
        Prefetch(EmbeddingBags([Table("a", 5, 2)], SGD(0.1)), [])  # type: ignore[arg-type]


def test_ids_may_come_from_anywhere(refuses: Refuses):
    del refuses
    content = [(torch.tensor([[k]]), "label") for k in range(5)]
    tables = make()
    for ids, _ in Prefetch(tables, content, ids=lambda batch: batch[0]):
        tables(ids).sum().backward()
    assert tables.moves.needed == 5


def test_input_error_is_what_a_user_sees():
    with pytest.raises(InputError):
        list(Prefetch(make(), [object()]))
