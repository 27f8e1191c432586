"""How much memory training on a log needs: each policy at each budget, tried on the log's own batches."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vitalfew.core import Budget, InputError
from vitalfew.data.batches import Batches
from vitalfew.data.encoded import Encoded
from vitalfew.embeddings.foretell import speed_of, step_time
from vitalfew.embeddings.options import LogOptions, Progress, silent
from vitalfew.embeddings.payoff import step_seconds
from vitalfew.embeddings.preparing import prepare
from vitalfew.embeddings.room import Room, room_for
from vitalfew.embeddings.settings import Settings
from vitalfew.embeddings.tiering import Tiering, ids_of, record_bytes, schedule_for
from vitalfew.tiers.curves import lru_curve
from vitalfew.tiers.dram import Dram
from vitalfew.tiers.file import file_memory
from vitalfew.tiers.policies import Belady, Policy, Static, policy_named
from vitalfew.tiers.rehearsal import Rehearsal
from vitalfew.tiers.replay import Replayed, replay
from vitalfew.tiers.speed import Speed
from vitalfew.tiers.trace import Trace

__all__ = ["POLICIES", "BudgetLook", "MemoryLook", "look_at_budgets"]

POLICIES = ("static", "lru", "lfu", "lookahead", "belady")
_TRAINS = ("lookahead", "lfu", "lru")
"""What `train` can do, the best first."""
SLOWER = 1.1
"""How much longer than with everything in memory a step may take for a budget to be enough."""
_TIMED = 12
_POINTS = 160
_NEAR = 1.06
"""Budgets nearer to each other than this are not told apart."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class BudgetLook:
    """What one budget does.

    Attributes
    ----------
    budget
        As it was asked for.
    nbytes, rows, share
        All the memory it takes, the rows that are in it at a time, and their share of all.
    misses
        By policy, rows fetched per row that a batch needs.
    seconds, slower
        Of a step with the policy that trains, modelled; and how many times longer than with everything in memory.
    problem
        Why it cannot work; then there are no figures.
    """

    budget: str
    nbytes: int = 0
    rows: int = 0
    share: float = 0.0
    misses: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float | None = None
    slower: float | None = None
    problem: str = ""

    @property
    def is_enough(self) -> bool:
        """Whether a step takes hardly longer than with everything in memory."""
        return self.slower is not None and self.slower <= SLOWER


@dataclass(frozen=True, slots=True)
class MemoryLook:
    """Each policy at each budget, and how much memory is enough.

    Attributes
    ----------
    batches, uses, distinct
        Of the log as training would read it: batches, rows they need, and different rows among those.
    table_rows, table_bytes
        All rows, and their bytes with state and statistics.
    largest
        The most rows that a batch needs.
    policy
        The policy of `seconds`; None where no policy was asked for that `train` has.
    compute, speed
        Seconds of a step with everything in memory, and what the disk does: both measured.
    enough
        The smallest budget that is enough, between those that were asked for.
    lru
        (share of the rows retained, miss ratio) of LRU at every size, exact.
    """

    batches: int
    uses: int
    distinct: int
    table_rows: int
    table_bytes: int
    largest: int
    policy: str | None
    compute: float
    speed: Speed
    budgets: tuple[BudgetLook, ...]
    enough: BudgetLook | None
    lru: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {**dataclasses.asdict(self), "how": {"misses": "counted", "seconds": "modelled", "speed": "measured"}}


def look_at_budgets(
    path: str | Sequence[str],
    options: LogOptions,
    settings: Settings,
    budgets: Sequence[str],
    policies: Sequence[str] = POLICIES,
    *,
    ahead: int = 2,
    depth: int = 200,
    most_batches: int | None = None,
    store: str | None = None,
    progress: Progress = silent,
) -> MemoryLook:
    """Read a log as `train` would, and count what each policy would fetch within each budget of memory.

    Parameters
    ----------
    path, options
        The log; its training rows are read, in the order of the first epoch.
    budgets
        Each a share of the rows such as ``"5%"``, or a size such as ``"2GiB"``, as for ``train --memory``.
    policies
        Of `POLICIES`. ``static`` keeps the rows that most batches need; ``belady`` knows all batches beforehand.
    ahead, depth
        As for `train`.
    most_batches
        Stop reading after so many.
    store
        The folder whose disk is measured, and where the encoded log lies meanwhile; by default where temporary files
        go. Nothing stays there.

    Notes
    -----
    Cost: two passes over the log, disk space for its encoded rows, four bytes per row a batch needs, and for each
    policy and budget a pass over those, at some million a second. Memory: the directory of the rows and, for the
    exact curve, eight bytes per row a batch needs.
    """
    _check(budgets, policies, most_batches)
    Tiering("100%", ahead=ahead, depth=depth)  # refuses what `train` would
    where = _folder(store)
    with tempfile.TemporaryDirectory(prefix=".vitalfew-look-", dir=where) as work:
        path = path if isinstance(path, str) else list(path)
        job = prepare(path, options, settings, Path(work), progress, checked=False)
        batches = Batches(job.train, settings.batch_size, seed=settings.seed)
        number = min(len(batches), most_batches or len(batches))
        timed = list(islice(batches.epoch(0), min(_TIMED, number)))

        def read() -> Iterator[Encoded]:
            return islice(batches.epoch(0), number)

        with Trace(
            ids_of(read(), job.num_rows), folder=work, progress=lambda n: progress("read ids", n / number)
        ) as trace:
            table = _Table(trace, sum(job.num_rows.values()), settings, ahead, depth, work)
            try:
                return _look(table, budgets, policies, timed, job.num_rows, where, progress)
            finally:
                table.close()


def _check(budgets: Sequence[str], policies: Sequence[str], most_batches: int | None) -> None:
    for text in budgets:
        if Budget.of(text).value <= 0:
            raise InputError(f"no row fits into a budget of {text}", hint="such as --budget 1%,5%,10%,20%")
    if not budgets:
        raise InputError("there is no budget to look at", hint="such as --budget 1%,5%,10%,20%")
    for policy in policies:
        if policy not in POLICIES:
            raise InputError(f"there is no policy {policy!r}", hint=f"choose from {', '.join(POLICIES)}")
    if not policies:
        raise InputError("there is no policy to look at", hint=f"choose from {', '.join(POLICIES)}")
    if most_batches is not None and most_batches < 1:
        raise InputError(f"at least one batch must be read, got {most_batches}", hint="leave it out to read all")


def _folder(store: str | None) -> Path:
    """Return the folder to work in: that of the store, or the nearest above it that is there."""
    folder = Path(store or tempfile.gettempdir()).absolute()
    return next(each for each in (folder, *folder.parents) if each.is_dir())


class _Table:
    """All rows of a model, and what its batches need: tries policies on them."""

    def __init__(self, trace: Trace, num_rows: int, settings: Settings, ahead: int, depth: int, work: str) -> None:
        self.trace, self.num_rows, self.settings = trace, num_rows, settings
        self.ahead, self.depth = ahead, depth
        self.record = record_bytes(settings)
        self.counts = trace.counts(num_rows)
        self._work = work
        self._rehearsal: Rehearsal | None = None

    def room(self, memory: str, policy: str) -> Room:
        """Divide memory as `train` does."""
        below = file_memory(self.num_rows, self.record)
        return room_for(Dram(memory), self.num_rows, self.record, below, self._rule(policy, 0))

    def problem(self, memory: str, policies: Sequence[str]) -> str:
        """Say why a budget cannot work; nothing where it can."""
        try:
            rooms = [self.room(memory, policy) for policy in policies]
        except InputError as error:
            return error.message
        if all(room.slots >= self.trace.largest and room.entries >= self.trace.largest for room in rooms):
            return ""
        return f"a batch needs {self.trace.largest:,} rows at a time"

    def try_(self, memory: str, policy: str) -> tuple[Replayed, int]:
        """Count what a policy moves, and the rows that are below in the end."""
        room = self.room(memory, policy)
        schedule = schedule_for(room, self.num_rows, self._rule(policy, room.slots), self.ahead)
        if isinstance(schedule.residency.policy, Belady):
            if self._rehearsal is None:
                self._rehearsal = Rehearsal((ids for ids, _ in self.trace), self.num_rows, folder=self._work)
            schedule.forget(self._rehearsal)
        moved = replay(iter(self.trace), schedule, queue_bytes=room.queue_bytes)
        return moved, int((schedule.residency.where < -1).sum())

    def close(self) -> None:
        """Give the file of next uses back."""
        if self._rehearsal is not None:
            self._rehearsal.close()

    def _rule(self, policy: str, slots: int) -> Policy:
        if policy != "static":
            return policy_named(policy, depth=self.depth)
        count = max(slots - self.trace.largest, 0)  # a batch needs room beside the rows that stay
        order = np.argsort(-self.counts, kind="stable")[:count]
        return Static.of(order[self.counts[order] > 0])


def _look(
    table: _Table,
    asked: Sequence[str],
    policies: Sequence[str],
    timed: Sequence[Encoded],
    num_rows: dict[str, int],
    where: Path,
    progress: Progress,
) -> MemoryLook:
    chosen = next((policy for policy in _TRAINS if policy in policies), None)
    progress("time steps", 0.0)
    speed = speed_of(where, table.num_rows, table.record)
    compute = step_seconds(num_rows, timed, table.settings)
    progress("time steps", 1.0)

    def seen(memory: str, some: Sequence[str]) -> BudgetLook:
        if problem := table.problem(memory, some):
            return BudgetLook(memory, problem=problem)
        room = table.room(memory, chosen or some[0])
        misses, seconds = {}, None
        for policy in some:
            moved, below = table.try_(memory, policy)
            misses[policy] = moved.miss_ratio
            if policy == chosen:
                seconds = step_time(moved, compute, speed, table.record, below / 2, overlap=table.ahead > 0)
        share = room.slots / table.num_rows
        slower = None if seconds is None else seconds / compute
        return BudgetLook(memory, room.nbytes, room.slots, share, misses, seconds, slower)

    found: list[BudgetLook] = []
    for n, budget in enumerate(asked):
        found.append(seen(budget, policies))
        progress("try budgets", (n + 1) / len(asked))
    enough = None
    if chosen is not None:
        only = [chosen]
        enough = _enough(found, lambda memory: seen(memory, only))
        progress("refine", 1.0)
    return MemoryLook(
        len(table.trace), table.trace.uses, int((table.counts > 0).sum()), table.num_rows,
        table.num_rows * table.record, table.trace.largest, chosen, compute, speed, tuple(found), enough,
        _lru_points(table),
    )  # fmt: skip


def _enough(found: Sequence[BudgetLook], seen: Callable[[str], BudgetLook]) -> BudgetLook | None:
    """Return the smallest budget that is enough, refined between the largest that is not and the smallest that is.

    Budgets of the kind of the first are compared: shares, or sizes. Where none is enough, larger ones are tried.
    """
    shares = Budget.of(found[0].budget).kind == "share"
    tried = {_amount(each.budget): each for each in found if (Budget.of(each.budget).kind == "share") == shares}
    good = min((amount for amount, each in tried.items() if each.is_enough), default=None)
    while good is None:
        amount = 1.0 if shares else 2 * max(tried)
        if amount in tried:
            return None  # all rows are there, and batches have no room for theirs
        tried[amount] = each = seen(_text(amount, shares))
        if each.is_enough or each.share == 1:
            good = amount
    bad = max((amount for amount in tried if amount < good), default=good)
    while good / bad > _NEAR:
        amount = _amount(text := _text(math.sqrt(good * bad), shares))
        if not bad < amount < good:
            break
        tried[amount] = seen(text)
        if tried[amount].is_enough:
            good = amount
        else:
            bad = amount
    return tried[good]


def _amount(budget: str) -> float:
    return Budget.of(budget).value


def _text(amount: float, is_share: bool) -> str:
    """Return a budget to type: a share of three digits, or a size of whole MiB (KiB where it is small)."""
    if is_share:
        return f"{100 * amount:.{max(0, 2 - math.floor(math.log10(100 * amount)))}f}%"
    return f"{amount / 2**20:.0f}MiB" if amount >= 100 << 20 else f"{amount / 2**10:.0f}KiB"


def _lru_points(table: _Table) -> tuple[Point, ...]:
    """Return the exact miss ratio of LRU over the share of the rows retained, at sizes of equal ratio."""
    curve = lru_curve(*table.trace.flat())
    if not curve.uses:
        return ()
    sizes = np.unique(np.geomspace(1, max(curve.distinct, 1), _POINTS).round().astype(np.int64))
    return tuple((int(size) / table.num_rows, curve.misses_at(int(size)) / curve.uses) for size in sizes)
