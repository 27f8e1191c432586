"""Tables larger than a GPU's budget: six ways to keep the rows, the same training, side by side in one run.

    g0    all rows in the GPU's memory: the upper bound
    g1    rows in main memory, pooled and updated by the CPU; bags and their gradients are copied
    g2    rows in page-locked main memory, which the GPU's kernels read and write over the bus
    g3    a share of the rows on the GPU; what a batch lacks is fetched when its turn comes, least recently used leave
    plan  the same share; the next batch's rows travel while this one computes, the farthest next use leaves
    ours  the same share; `TieredEmbeddings` over `Hbm`, read ahead by `Prefetch` under the `Belady` policy

All arms train the same DLRM on the same ids, by row-wise Adagrad, from the same rows and dense weights in every round;
rounds are interleaved, and an arm's losses and final rows must equal the first arm's. The caches start full with the
most popular rows. In g3 and plan who stays is planned before the clock starts, and every row that leaves is written
back, so the two differ in what they know and in whether moves overlap with the computation, and in nothing else. In
ours the directory and the policy run beside the training, as a user's would; its rows carry 8 bytes of statistics.

    python benchmarks/gpu_tiers.py --out benchmarks/results/gpu_tiers.json
    python benchmarks/gpu_tiers.py --device cpu --tiny      # the whole script in seconds, without a GPU
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from vitalfew.core.files import write_document
from vitalfew.embeddings import DLRM, EmbeddingBags, Prefetch, RowwiseAdagrad, Table, TieredEmbeddings
from vitalfew.embeddings._kernels_torch import kernels_for
from vitalfew.meter import machine
from vitalfew.tiers import Belady, Hbm, Opened, Traffic
from vitalfew.tiers.hbm import HbmSlab, Move
from vitalfew.tiers.record import Record

RULE = RowwiseAdagrad(lr=0.01)
NEVER = 2**31 - 1
TOO_SMALL = "the caches hold fewer rows than one batch needs; raise --share or lower --batch"


# -- the rows in main memory


class Host:
    """Records read from and written to the master copy, by all cores."""

    def __init__(self, bags: EmbeddingBags) -> None:
        self.columns = [bags.rows.weight, bags.rows.narrow[0]]
        self.record = Record([column.numpy() for column in self.columns])
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads)

    def read(self, rows: np.ndarray, records: np.ndarray) -> np.ndarray:
        self._share(self.record.take, rows, records)
        return records

    def write(self, rows: np.ndarray, records: np.ndarray) -> None:
        self._share(self.record.put, rows, records)

    def _share(self, move: Callable, rows: np.ndarray, records: np.ndarray) -> None:
        edges = np.linspace(0, len(rows), self._threads + 1).astype(int)
        list(self._pool.map(lambda a, b: move(rows[a:b], records[a:b]), edges[:-1], edges[1:]))

    def lock_pages(self) -> None:
        """Let the GPU's kernels reach the master copy."""
        for column in self.columns:
            status = torch.cuda.cudart().cudaHostRegister(column.data_ptr(), column.nbytes, 3)  # portable, mapped
            torch.cuda.check_error(status)


# -- the ids


@dataclass
class Stream:
    """Batches of ids: power-law over the ranks of each table, ranks scattered over its rows."""

    tables: int
    rows: int
    exponent: float
    batch: int
    bag: int
    rng: np.random.Generator
    ids: list[np.ndarray] = field(default_factory=list)
    """Per batch, by sample, table and place in the bag, each within its table."""

    def draw(self, steps: int) -> None:
        power = 1 - self.exponent
        for _ in range(steps):
            u = self.rng.random((self.batch, self.tables, self.bag))
            rank = ((self.rows**power - 1) * u + 1) ** (1 / power) - 1
            self.ids.append(self.row_of(np.clip(rank.astype(np.int64), 0, self.rows - 1)))

    def row_of(self, rank: np.ndarray) -> np.ndarray:
        step = int(self.rows * 0.618) + 1  # popular rows lie far apart, as ids in a log do
        while math.gcd(step, self.rows) > 1:
            step += 1
        return rank * step % self.rows

    def gids(self, batch: int) -> np.ndarray:
        return (self.ids[batch] + np.arange(self.tables)[:, None] * self.rows).reshape(-1)

    def most_popular(self, num: int) -> np.ndarray:
        """Return the rows of the lowest ranks of all tables, the most popular first."""
        ranks = self.row_of(np.arange(-(-num // self.tables)))
        return (ranks[:, None] + np.arange(self.tables) * self.rows).reshape(-1)[:num]


# -- who stays


@dataclass
class Turn:
    """What one batch needs: the slot of each lookup, and the rows to bring in and to write back before it."""

    slots: torch.Tensor
    load_rows: np.ndarray
    load_slots: np.ndarray
    evict_rows: np.ndarray
    evict_slots: np.ndarray


def next_uses(uniques: list[np.ndarray], num_rows: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Return when each row of each batch is used next, and when each row of all is used first."""
    later = np.full(num_rows, NEVER, np.int32)
    found = []
    for b in reversed(range(len(uniques))):
        found.append(later[uniques[b]])
        later[uniques[b]] = b
    return found[::-1], later


class Farthest:
    """Victims by the farthest next use (Belady); of those never used again the least popular first."""

    def __init__(self, first_use: np.ndarray) -> None:
        self._slots: dict[int, list[np.ndarray]] = {}
        self.touch(-1, np.arange(len(first_use)), first_use)

    def touch(self, now: int, slots: np.ndarray, next_use: np.ndarray) -> None:
        self._slots.pop(now, None)  # all of them are among `slots`
        order = np.argsort(next_use, kind="stable")
        times, counts = np.unique(next_use, return_counts=True)
        ends = np.cumsum(counts)
        for when, start, end in zip(times.tolist(), ends - counts, ends, strict=True):
            self._slots.setdefault(when, []).append(slots[order[start:end]])

    def victims(self, num: int, now: int, in_use: np.ndarray) -> np.ndarray:
        del in_use  # their next use is now
        found = [np.empty(0, np.int64)]
        while num:
            when = max(self._slots)
            if when <= now:
                raise SystemExit(TOO_SMALL)
            slots = self._slots[when].pop()
            keep = max(0, len(slots) - num)
            found.append(slots[keep:])
            num -= len(slots) - keep
            if keep:
                self._slots[when].append(slots[:keep])
            if not self._slots[when]:
                del self._slots[when]
        return np.concatenate(found)


class Oldest:
    """Victims by the oldest last use; of those not used yet the least popular first."""

    def __init__(self, first_use: np.ndarray) -> None:
        self._queue = deque([(-1, np.arange(len(first_use))[::-1])])
        self._last = np.full(len(first_use), -1, np.int32)

    def touch(self, now: int, slots: np.ndarray, next_use: np.ndarray) -> None:
        del next_use
        self._last[slots] = now
        self._queue.append((now, slots))

    def victims(self, num: int, now: int, in_use: np.ndarray) -> np.ndarray:
        self._last[in_use] = now
        found = [np.empty(0, np.int64)]
        while num:
            if not self._queue:
                raise SystemExit(TOO_SMALL)
            when, slots = self._queue.popleft()
            some, rest = slots[: 2 * num], slots[2 * num :]
            some = some[self._last[some] == when]  # the others have been used since
            found.append(some[:num])
            self._queue.extendleft((when, left) for left in (rest, some[num:]) if len(left))
            num -= min(num, len(some))
        return np.concatenate(found)


def plan(stream: Stream, resident: np.ndarray, rule: type[Farthest] | type[Oldest]) -> list[Turn]:
    """Return every batch's moves, from a memory full of these rows."""
    num_rows = stream.tables * stream.rows
    gids = [stream.gids(b) for b in range(len(stream.ids))]
    uniques = [np.unique(each) for each in gids]
    next_use, first_use = next_uses(uniques, num_rows)
    row_of, slot_of = resident.copy(), np.full(num_rows, -1, np.int64)
    slot_of[resident] = np.arange(len(resident))
    order = rule(first_use[resident])
    turns = []
    for b, unique in enumerate(uniques):
        here = slot_of[unique]
        missing = unique[here < 0]
        slots = order.victims(len(missing), b, here[here >= 0])
        leaving = row_of[slots]
        slot_of[leaving] = -1
        slot_of[missing], row_of[slots] = slots, missing
        order.touch(b, slot_of[unique], next_use[b])
        turns.append(Turn(on_host(slot_of[gids[b]]), missing, slots, leaving, slots))
    return turns


def on_host(array: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


# -- the arms


class OnDevice:
    """Rows that the device's kernels look up and update, wherever they lie."""

    def __init__(self, setup: Setup, weight: torch.Tensor, narrow: torch.Tensor, slots: list[torch.Tensor]) -> None:
        self.setup, self.weight, self.narrow, self.slots = setup, weight, narrow, slots
        self.bytes_in = self.bytes_out = 0

    def begin(self) -> None:
        """Get ready for the first batch of a round."""

    def forward(self, b: int) -> torch.Tensor:
        s = self.setup
        self._there = self.slots[b].to(s.device, non_blocking=True)
        out = torch.empty(s.bags, s.dim, device=s.device)
        if s.stream.bag == 1:
            s.kernels.gather(self.weight, self._there, out)
        else:
            s.kernels.pool(self.weight, self._there, s.offsets, None, out)
        return out

    def backward(self, b: int, grad: torch.Tensor) -> None:
        del b
        rates = (*RULE.scalars(1), RULE.weight_decay)
        self.setup.kernels.update(
            RULE.kind, self.weight, [], [self.narrow], self._there, self.setup.bag_of, None, grad, rates
        )


class InHbm(OnDevice):
    """g0."""

    def __init__(self, setup: Setup) -> None:
        rows = setup.stream.tables * setup.stream.rows
        self.slab = setup.new_slab(rows)
        setup.upload(self.slab, np.arange(rows))
        super().__init__(setup, *self.slab.columns, setup.gids)

    def final(self) -> np.ndarray:
        return self.setup.download(self.slab, self.setup.touched)

    def restore(self) -> None:
        self.slab.put(self.setup.touched, self.setup.backup)


class InHost:
    """What g1 and g2 share: they change the master copy itself."""

    setup: Setup

    def final(self) -> np.ndarray:
        return self.setup.host.read(self.setup.touched, np.empty_like(self.setup.backup))

    def restore(self) -> None:
        self.setup.host.write(self.setup.touched, self.setup.backup)


class Zerocopy(InHost, OnDevice):
    """g2."""

    def __init__(self, setup: Setup) -> None:
        if setup.device.type == "cuda":
            setup.host.lock_pages()
        OnDevice.__init__(self, setup, *setup.host.columns, setup.gids)
        row = setup.host.record.nbytes
        distinct = sum(len(np.unique(gids)) for gids in setup.gids) // len(setup.gids)
        self.bytes_in = len(setup.gids[0]) * setup.dim * 4 + distinct * row
        self.bytes_out = distinct * row


class OnCpu(InHost):
    """g1."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._ids = [torch.from_numpy(ids.reshape(len(ids), -1)) for ids in setup.stream.ids]
        self._offsets = (
            None if setup.stream.bag == 1 else torch.arange(0, setup.bags * setup.stream.bag + 1, setup.stream.bag)
        )
        self._there = on_host(np.empty((setup.bags, setup.dim), np.float32))
        self._back = on_host(np.empty((setup.bags, setup.dim), np.float32))
        self.bytes_in = self.bytes_out = self._there.nbytes

    def begin(self) -> None:
        """Nothing travels ahead."""

    def forward(self, b: int) -> torch.Tensor:
        ids = self._ids[b] if self._offsets is None else self._ids[b].reshape(-1)
        self._out = self.setup.host_bags(ids, self._offsets)
        self._there.copy_(self._out.detach().reshape(self._there.shape))
        return torch.empty_like(self._there, device=self.setup.device).copy_(self._there, non_blocking=True)

    def backward(self, b: int, grad: torch.Tensor) -> None:
        del b
        self._back.copy_(grad)
        self._out.backward(self._back.reshape(self._out.shape))


class Cached(OnDevice):
    """g3 and plan: a slab that holds a share of the rows, and the planned moves.

    `ahead` decides when rows travel: with the batch before, beside its computation, or when the batch needs them.
    """

    def __init__(self, setup: Setup, rule: type[Farthest] | type[Oldest], *, ahead: bool) -> None:
        start = time.perf_counter()
        self.turns = plan(setup.stream, setup.resident, rule)
        self.plan_seconds = (time.perf_counter() - start) / len(self.turns)
        most = max(len(turn.load_rows) for turn in self.turns)
        self.slab = setup.new_slab(len(setup.resident), most)
        setup.upload(self.slab, setup.resident)
        super().__init__(setup, *self.slab.columns, [turn.slots for turn in self.turns])
        self.ahead = ahead
        self._arriving, self._leaving = self.slab.pinned(max(1, most)), self.slab.pinned(max(1, most))
        timed = self.turns[setup.warm :]
        self.bytes_in = sum(len(turn.load_rows) for turn in timed) * self.slab.row_bytes // len(timed)
        self.bytes_out = sum(len(turn.evict_rows) for turn in timed) * self.slab.row_bytes // len(timed)

    def begin(self) -> None:
        if self.ahead:
            self._coming = self._send(0)

    def forward(self, b: int) -> torch.Tensor:
        turn = self.turns[b]
        if self.ahead:
            self._going = self.slab.take_async(turn.evict_slots, self._leaving[: len(turn.evict_rows)])
            self._coming.wait()
        else:
            leaving = self._leaving[: len(turn.evict_rows)]
            self.slab.take(turn.evict_slots, leaving)
            self.setup.host.write(turn.evict_rows, leaving)
            self._send(b).wait()
        return super().forward(b)

    def backward(self, b: int, grad: torch.Tensor) -> None:
        super().backward(b, grad)
        if self.ahead:
            turn = self.turns[b]
            self._going.wait()
            self.setup.host.write(turn.evict_rows, self._leaving[: len(turn.evict_rows)])
            if b + 1 < len(self.turns):
                self._coming = self._send(b + 1)

    def _send(self, b: int) -> Move:
        turn = self.turns[b]
        arriving = self.setup.host.read(turn.load_rows, self._arriving[: len(turn.load_rows)])
        return self.slab.put_async(turn.load_slots, arriving)

    def _used(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the slots that a round uses, and the rows in them at its end."""
        row_of = np.full(self.slab.num_slots, -1, np.int64)
        for b, turn in enumerate(self.turns):
            row_of[turn.slots.numpy()] = self.setup.stream.gids(b)
        slots = np.flatnonzero(row_of >= 0)
        return slots, row_of[slots]

    def final(self) -> np.ndarray:
        slots, rows = self._used()
        self.setup.host.write(rows, self.setup.download(self.slab, slots))
        return self.setup.host.read(self.setup.touched, np.empty_like(self.setup.backup))

    def restore(self) -> None:
        slots, _ = self._used()
        self.setup.host.write(self.setup.touched, self.setup.backup)
        self.setup.upload(self.slab, self.setup.resident[slots], slots)


class Master:
    """The master copy as the tier below `Hbm`; the statistics of a row stay on the device."""

    traffic = Traffic()
    nbytes = 0

    def __init__(self, host: Host) -> None:
        self.host, self.row = host, host.record.nbytes

    def open(self, num_rows: int, record_bytes: int, *, resume: bool = False) -> Opened:
        del resume
        self.record_bytes = record_bytes
        return Opened(self, np.arange(num_rows, dtype=np.int32), None)

    def read(self, ids: np.ndarray, places: np.ndarray, out: np.ndarray) -> None:
        del places
        self.host.read(ids, out[:, : self.row])
        out[:, self.row :] = 0

    def write(self, ids: np.ndarray, records: np.ndarray) -> np.ndarray:
        self.host.write(ids, records[:, : self.row])
        return ids.astype(np.int32)

    def release(self, places: np.ndarray) -> None:
        """Do nothing: every row keeps its line."""

    def moved(self) -> None:
        """Nothing does."""

    def commit(self, places: object, note: object) -> None:
        """All rows have been written when this is called."""

    def close(self) -> None:
        """Nothing is open."""


class Ours:
    """What a user would write."""

    plan_seconds = 0.0

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        row, tables = setup.host.record.nbytes + 8, setup.host_bags.tables
        # Rows, and the staging, which is a share of the whole up to a size.
        rows = (len(setup.resident) + 1) * row
        size = min(rows * 32 // 29, rows + 3 * 2**24) + 4 * row
        self.tables = TieredEmbeddings(
            tables, RULE, tiers=[Hbm(size, str(setup.device)), Master(setup.host)], policy=Belady()
        )
        if self.tables.room.slots < max(len(np.unique(gids.numpy())) for gids in setup.gids):
            raise SystemExit(TOO_SMALL)
        self.batches = [torch.from_numpy(ids.reshape(len(ids), -1)) for ids in setup.stream.ids]
        self.offsets = None if setup.offsets is None or setup.stream.bag == 1 else setup.offsets.cpu()
        self.bytes_in = self.bytes_out = 0

    def begin(self) -> None:
        """Bring in the most popular rows, the least popular first, and get ready for the first batch."""
        rows, edges = self.setup.stream.rows, np.arange(self.setup.stream.tables + 1)
        for part in np.array_split(self.setup.resident[::-1], 8):
            part = np.sort(part)
            bags = torch.from_numpy(np.searchsorted(part, edges * rows))
            self.tables(torch.from_numpy(part % rows), bags)
        self.tables.rows.end_turn("the loop begins")
        ahead = Prefetch(self.tables, self.batches, ids=self._ids)
        self._loop = iter(ahead)

    def _ids(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return (batch, None) if self.offsets is None else (batch.reshape(-1), self.offsets)

    def forward(self, b: int) -> torch.Tensor:
        ids, offsets = self._ids(next(self._loop))
        if b == self.setup.warm:
            self._before = dataclasses.replace(self.tables.moves)
        self._out = self.tables(ids, offsets)
        return self._out.detach().reshape(-1, self.setup.dim)

    def backward(self, b: int, grad: torch.Tensor) -> None:
        del b
        self._out.backward(grad.reshape(self._out.shape))

    def final(self) -> np.ndarray:
        assert next(self._loop, None) is None
        now, before, row = self.tables.moves, self._before, self.tables.store.record.nbytes
        steps = len(self.batches) - self.setup.warm
        self.bytes_in = (now.missed - before.missed) * row // steps
        self.bytes_out = (now.left - now.clean - before.left + before.clean) * row // steps
        self.tables.commit()
        return self.setup.host.read(self.setup.touched, np.empty_like(self.setup.backup))

    def restore(self) -> None:
        statistics = np.zeros((len(self.setup.touched), 8), np.uint8)
        self.tables.rows.end_turn("the rows are restored")
        with self.tables.store.lock:
            self.tables.store.fill(self.setup.touched, np.hstack([self.setup.backup, statistics]))
            self.tables.commit()


ARMS: dict[str, Callable[[Setup], object]] = {
    "g0": InHbm,
    "g1": OnCpu,
    "g2": Zerocopy,
    "g3": lambda setup: Cached(setup, Oldest, ahead=False),
    "plan": lambda setup: Cached(setup, Farthest, ahead=True),
    "ours": Ours,
}


# -- the run


class Setup:
    """What all arms share: the ids, the master copy, the dense model's input and the device."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        self.kernels = kernels_for(self.device)
        self.dim, self.warm = args.dim, args.warm
        rows = int(args.gib * 2**30) // (4 * self.dim + 4) // args.tables
        self.stream = Stream(args.tables, rows, args.exponent, args.batch, args.bag, np.random.default_rng(1))
        self.stream.draw(args.warm + args.steps)
        self.gids = [on_host(self.stream.gids(b)) for b in range(len(self.stream.ids))]
        self.bags = args.batch * args.tables
        self.offsets = torch.arange(0, self.bags * args.bag + 1, args.bag, device=self.device)
        self.bag_of = None if args.bag == 1 else torch.arange(self.bags, device=self.device).repeat_interleave(args.bag)
        self.resident = self.stream.most_popular(int(args.share * rows * args.tables))
        self.host_bags = EmbeddingBags([Table(f"t{t}", rows, self.dim) for t in range(args.tables)], RULE)
        self.host = Host(self.host_bags)
        self.touched = np.unique(torch.cat(self.gids).numpy())
        self.backup = self.host.read(self.touched, np.empty((len(self.touched), self.host.record.nbytes), np.uint8))
        draw = torch.Generator().manual_seed(2)
        self.dense = torch.rand(len(self.stream.ids), args.batch, 13, generator=draw).to(self.device)
        self.labels = (torch.rand(len(self.stream.ids), args.batch, generator=draw) < 0.25).float().to(self.device)

    def new_slab(self, num_slots: int, most: int = 0) -> HbmSlab:
        """Take a slab whose staging carries a batch's moves, and some 64 MiB at least."""
        staging = min(num_slots, max(most, 2**26 // self.host.record.nbytes))
        columns = [(column.shape[1], column.dtype) for column in self.host.columns]
        return HbmSlab(columns, num_slots, self.device, staging_rows=staging)

    def upload(self, slab: HbmSlab, rows: np.ndarray, slots: np.ndarray | None = None) -> None:
        slots = np.arange(len(rows)) if slots is None else slots
        records = slab.pinned(slab.staging_rows)
        for start in range(0, len(rows), slab.staging_rows):
            part = slice(start, start + slab.staging_rows)
            slab.put(slots[part], self.host.read(rows[part], records[: len(rows[part])]))

    def download(self, slab: HbmSlab, slots: np.ndarray) -> np.ndarray:
        records = np.empty((len(slots), slab.row_bytes), np.uint8)
        slab.take(slots, records)
        return records

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Given:
    """Stands for the tables in the model: the arm has pooled the rows."""

    def __init__(self, tables: int, dim: int) -> None:
        self.features, self.dim = tuple(map(str, range(tables))), dim

    def __call__(self, fields: torch.Tensor, offsets: torch.Tensor | None = None) -> torch.Tensor:
        del offsets
        return fields


def train(
    setup: Setup, arm: OnDevice | OnCpu | Ours, wide: tuple[int, ...], tall: tuple[int, ...]
) -> tuple[float, np.ndarray]:
    """Return the seconds per step after the first ones, and the loss of every step."""
    model = DLRM(
        Given(setup.stream.tables, setup.dim), dense_in=13, bottom=(*wide, setup.dim), top=(*tall, 1),
        generator=torch.Generator().manual_seed(0),
    ).to(setup.device)  # fmt: skip
    dense = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = torch.zeros(len(setup.stream.ids), device=setup.device)
    arm.begin()
    start = 0.0
    for b in range(len(setup.stream.ids)):
        if b == setup.warm:
            setup.wait()
            start = time.perf_counter()
        pooled = arm.forward(b).requires_grad_()
        logits = model(setup.dense[b], pooled.view(-1, setup.stream.tables, setup.dim))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, setup.labels[b])
        dense.zero_grad()
        loss.backward()
        dense.step()
        losses[b] = loss.detach()
        arm.backward(b, pooled.grad)
    setup.wait()
    return (time.perf_counter() - start) / (len(setup.stream.ids) - setup.warm), losses.cpu().numpy()


def bus_speed(device: torch.device) -> dict[str, float]:
    """Return bytes per second between page-locked memory and the device, best of ten copies each way."""
    size = 2**28 if device.type == "cuda" else 2**24
    here, there = on_host(np.zeros(size, np.uint8)), torch.zeros(size, dtype=torch.uint8, device=device)
    speed = {}
    for name, a, b in (("in", here, there), ("out", there, here)):
        times = []
        for _ in range(10):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            b.copy_(a, non_blocking=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        speed[name] = size / min(times)
    return speed


def compare(first: np.ndarray, other: np.ndarray) -> tuple[bool, float]:
    """Return whether two sets of records are the same bits, and how far their numbers are apart."""
    apart = 0.0
    for part in range(0, len(first), 2**18):
        a, b = (x[part : part + 2**18].view(np.float32) for x in (first, other))
        apart = max(apart, float(np.abs(a - b).max(initial=0)))
    return bool(np.array_equal(first, other)), apart


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=64.0, help="size of all tables and their state")
    parser.add_argument("--share", type=float, default=0.1, help="of the rows that the caches hold")
    parser.add_argument("--tables", type=int, default=26)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16384)
    parser.add_argument("--bag", type=int, default=1, help="ids per sample and table")
    parser.add_argument("--exponent", type=float, default=1.05, help="of the power law, other than 1")
    parser.add_argument("--warm", type=int, default=5, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arms", default=",".join(ARMS), help="the first one is what the others must equal")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a trial of the script")
    parser.add_argument("--out")
    if "--tiny" in sys.argv:
        parser.set_defaults(gib=0.001, share=0.02, tables=4, dim=16, batch=64, warm=1, steps=9, rounds=2)
    args = parser.parse_args()
    if unknown := set(args.arms.split(",")) - set(ARMS):
        parser.error(f"there are no arms {sorted(unknown)}; choose among {', '.join(ARMS)}")
    return args


def main() -> int:
    args = options()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("there is no GPU here; nothing was measured (--device cpu --tiny tries the script out)")
        return 0
    torch.set_float32_matmul_precision("high")
    began = time.perf_counter()
    setup = Setup(args)
    names = args.arms.split(",")
    arms = {name: ARMS[name](setup) for name in names}
    rows, row = setup.stream.tables * setup.stream.rows, setup.host.record.nbytes
    print(
        f"{args.tables} tables, {rows:,} rows of {row} bytes, {rows * row / 2**30:.2f} GiB; caches of "
        f"{len(setup.resident):,} rows; batch {args.batch}, {setup.bags * args.bag:,} lookups, "
        f"{len(setup.touched):,} rows touched; ready after {time.perf_counter() - began:.0f} s"
    )
    speed = bus_speed(setup.device)
    print(f"page-locked copies: {speed['in'] / 1e9:.1f} GB/s in, {speed['out'] / 1e9:.1f} GB/s out")

    wide, tall = ((32,), (32,)) if args.tiny else ((512, 256), (1024, 1024, 512, 256))
    times: dict[str, list[float]] = {name: [] for name in names}
    agree: dict[str, dict[str, float | bool]] = {}
    wrong = []
    for turn in range(args.rounds):
        losses: dict[str, np.ndarray] = {}
        reference = None
        for name, arm in arms.items():
            seconds, losses[name] = train(setup, arm, wide, tall)
            times[name].append(seconds)
            final = arm.final()
            arm.restore()
            reference = final if reference is None else reference
            same, apart = compare(reference, final)
            loss_apart = float(np.abs(losses[name] / losses[names[0]] - 1).max())
            agree[name] = {"same_bits": same, "rows_apart": apart, "losses_apart": loss_apart}
            if not (np.isfinite(losses[name]).all() and loss_apart < 1e-4 and apart < 1e-3):
                wrong.append(f"{name} in round {turn}: {agree[name]}")

    median = {name: float(np.median(values)) for name, values in times.items()}
    figures = []
    for name, arm in arms.items():
        floor = max(arm.bytes_in / speed["in"], arm.bytes_out / speed["out"])
        ratios = {other: median[name] / median[other] for other in names}
        figures.append(
            {
                "arm": name,
                "median_ms": median[name] * 1e3,
                "rounds_ms": [1e3 * t for t in times[name]],
                "times": ratios,
                "bytes_in_per_step": arm.bytes_in,
                "bytes_out_per_step": arm.bytes_out,
                "bus_floor_ms": floor * 1e3,
                "plan_ms": 1e3 * getattr(arm, "plan_seconds", 0.0),
                **agree[name],
            }
        )
        print(
            f"{name:5} {median[name] * 1e3:9.2f} ms  "
            + "  ".join(f"{ratio:6.2f}x {other}" for other, ratio in ratios.items())
            + f"  bus {arm.bytes_in / 1e6:7.1f} MB in {arm.bytes_out / 1e6:7.1f} MB out, floor {floor * 1e3:6.2f} ms"
            + ("  same bits" if agree[name]["same_bits"] else f"  apart by {agree[name]['rows_apart']:.1e}")
        )

    if args.out:
        write_document(
            args.out,
            "benchmark",
            1,
            {
                "name": "gpu_tiers",
                "command": "python " + " ".join(sys.argv),
                "machine": machine(),
                "settings": {name: value for name, value in vars(args).items() if name != "out"},
                "rows": rows,
                "row_bytes": row,
                "bus_bytes_per_second": speed,
                "figures": figures,
            },
        )
    print("\n".join(wrong) or "all arms have trained the same")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
