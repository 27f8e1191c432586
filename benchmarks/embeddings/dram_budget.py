"""Train with rows on a disk and a tenth of them in memory: against all in memory, LRU, next-batch prefetch, memmap.

Workload W1: tables of Criteo Kaggle's sizes, 33.8 M rows of 64 floats with row-wise Adagrad, 9 GB on disk; synthetic
ids whose skew follows published statistics; a DLRM. All arms train on the same batches from the same rows, take turns
of a few steps, and must come to the same losses bit by bit (the memmap arm uses PyTorch's SGD and need not).

The budget is a hard limit for rows, optimizer state, directory, window and buffers. The memmap arm is a process of
its own in a memory control group of that budget and 256 MiB for
activations, where the system allows to make one.

    python benchmarks/embeddings/dram_budget.py --folder /nvme/scratch --out benchmarks/results/dram_budget.json
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.nn.functional as F

from vitalfew.core.files import write_document
from vitalfew.data.synthetic import CRITEO_KAGGLE_ROWS, CriteoLike
from vitalfew.embeddings import DLRM, EmbeddingBags, Prefetch, RowwiseAdagrad, Table, TieredEmbeddings
from vitalfew.embeddings.first import FirstRows
from vitalfew.meter import machine
from vitalfew.tiers import LRU, Belady, Dram, File, LookAhead, lower_bound, simulate
from vitalfew.tiers._direct import aligned
from vitalfew.tiers.speed import expected_pages, measure_speed, predict_step

DIM, BATCH = 64, 2048
BOTTOM, TOP = (512, 256, DIM), (512, 512, 256, 1)  # published for Criteo Terabyte at this width
RULE = RowwiseAdagrad(lr=0.02)


class Stream:
    """The batches of the workload; iterating again gives the same."""

    def __init__(self, rows: tuple[int, ...], steps: int, seed: int = 0) -> None:
        log = CriteoLike(steps * BATCH, seed=seed, cardinalities=rows)
        self.batches = [
            {
                "ids": torch.from_numpy(np.ascontiguousarray(p.ids, np.int64)),
                "dense": torch.from_numpy(np.ascontiguousarray(p.dense, np.float32)),
                "label": torch.from_numpy(np.ascontiguousarray(p.label, np.float32)),
            }
            for p in log.batches(BATCH)
        ]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def tables_of(rows: tuple[int, ...]) -> list[Table]:
    return [Table(f"C{i}", n, DIM) for i, n in enumerate(rows)]


def dlrm(tables: torch.nn.Module) -> DLRM:
    return DLRM(tables, dense_in=13, bottom=BOTTOM, top=TOP, generator=torch.Generator().manual_seed(1))


class Arm:
    """One way to train. `turn` does some steps and returns the seconds of each."""

    def __init__(self, name: str, tables: EmbeddingBags, batches: Iterator) -> None:
        self.name, self.tables, self.batches = name, tables, batches
        self.model = dlrm(tables)
        dense = [p for n, p in self.model.named_parameters() if not n.startswith("tables.")]
        self.optimizer = torch.optim.Adagrad(dense, lr=0.02)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.cpu = 0.0

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        loss = F.binary_cross_entropy_with_logits(self.model(batch["dense"], batch["ids"]), batch["label"])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())

    def warm(self, steps: int) -> None:
        """Update rows without the dense layers: what fills the memory is the same."""
        for _ in range(steps):
            self.tables(next(self.batches)["ids"]).sum().backward()

    def turn(self, steps: int) -> None:
        # The time between the end of a step and the end of the next, the wait for its rows included.
        cpu = time.process_time()
        for _ in range(steps):
            start = time.perf_counter()
            self.step(next(self.batches))
            self.seconds.append(time.perf_counter() - start)
        self.cpu += time.process_time() - cpu


def fill(tables: TieredEmbeddings, first: FirstRows) -> None:
    """Put all rows on the disk, in the order of their ids, as a run before would have left them."""
    store, n = tables.store, tables.num_rows
    columns = [np.zeros((1 << 16, w), np.float32) for w in (DIM, 1)] + [np.zeros((1 << 16, 2), np.uint32)]
    from vitalfew.tiers.record import Record

    record = Record(columns)
    records = np.empty((1 << 16, record.nbytes), np.uint8)
    for start in range(0, n, 1 << 16):
        ids = np.arange(start, min(start + (1 << 16), n))
        columns[0][: len(ids)] = first(ids, DIM)
        record.take(np.arange(len(ids), dtype=np.int32), records[: len(ids)])
        store.residency.where[ids] = -2 - store.lower.write(ids, records[: len(ids)])
        assert store.lower.moved() is None


def memmap_child(folder: Path, rows: tuple[int, ...], steps: int) -> None:
    """Train over a memory-mapped file, as one would without a library; one line of JSON per turn."""
    stream = iter(Stream(rows, steps))
    weight = torch.from_file(str(folder / "memmap.f32"), shared=True, size=sum(rows) * DIM).view(-1, DIM)
    # Without this the system reads 128 KiB around every row: 100 s a step.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(weight.data_ptr()), ctypes.c_size_t(weight.nbytes), mmap.MADV_RANDOM)
    bags, start = torch.nn.ModuleList(), 0
    for n in rows:
        part = weight[start : start + n]
        bags.append(torch.nn.EmbeddingBag.from_pretrained(part, freeze=False, mode="sum", sparse=True))
        start += n

    class Bags(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bags, self.dim, self.features = bags, DIM, tuple(f"C{i}" for i in range(len(rows)))

        def forward(self, ids: torch.Tensor, offsets: torch.Tensor | None = None) -> torch.Tensor:
            one = torch.arange(len(ids))
            return torch.stack([bag(ids[:, f].contiguous(), one) for f, bag in enumerate(self.bags)], 1)

    model = dlrm(Bags())
    sparse = torch.optim.SGD(bags.parameters(), lr=0.02)
    dense = torch.optim.Adagrad([p for n, p in model.named_parameters() if not n.startswith("tables.")], lr=0.02)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            begin = time.perf_counter()
            batch = next(stream)
            with torch.sparse.check_sparse_tensor_invariants(enable=False):
                loss = F.binary_cross_entropy_with_logits(model(batch["dense"], batch["ids"]), batch["label"])
                sparse.zero_grad()
                dense.zero_grad()
                loss.backward()
                sparse.step()
                dense.step()
            seconds.append(time.perf_counter() - begin)
        print(json.dumps(seconds), flush=True)


class Memmap:
    """The memmap arm: a child in a memory control group."""

    name = "memmap"

    def __init__(self, folder: Path, rows: tuple[int, ...], steps: int, budget: int, shape: str) -> None:
        file = folder / "memmap.f32"
        first = FirstRows(rows, 7)
        with file.open("wb") as out:
            for start in range(0, sum(rows), 1 << 17):
                out.write(first(np.arange(start, min(start + (1 << 17), sum(rows))), DIM).tobytes())
            out.flush()
            os.fsync(out.fileno())
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self.group = Path("/sys/fs/cgroup/memory/vitalfew_memmap")
        self.limited = True
        try:
            self.group.mkdir(exist_ok=True)
        except OSError:
            self.limited = False
        self.seconds: list[float] = []
        words = [sys.executable, __file__, "--memmap-child", "--folder", str(folder)]
        words += ["--steps", str(steps), "--rows", shape]
        self.child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert json.loads(self.child.stdout.readline()) == "ready"
        if self.limited:  # what the process itself takes is not charged: it joins when it is up
            (self.group / "memory.limit_in_bytes").write_text(str(budget))
            for thread in Path(f"/proc/{self.child.pid}/task").iterdir():
                with contextlib.suppress(OSError):
                    (self.group / "tasks").write_text(thread.name)

    def turn(self, steps: int) -> None:
        print(steps, file=self.child.stdin, flush=True)
        self.seconds += json.loads(self.child.stdout.readline())

    def close(self) -> None:
        self.child.stdin.close()
        self.child.wait(60)
        with contextlib.suppress(OSError):
            self.group.rmdir()


def cpu_per_page(tables: TieredEmbeddings, batches: int = 20) -> float:
    """Return the processor seconds that the bare read of a random page takes, without looking at what is in it."""
    file, width = tables.store.lower._file, tables.store.lower.layout.page_bytes
    buffer, rng = aligned(1024, width), np.random.default_rng(0)
    start = time.process_time()
    for _ in range(batches):
        file.read(np.sort(rng.integers(0, file.size // width, 1024)) * width, buffer)
    return (time.process_time() - start) / batches / 1024


def compute_only(stream: Stream, rows: tuple[int, ...], steps: int) -> None:
    """Compile the kernels before the clock runs."""
    arm = Arm("", EmbeddingBags([Table(f"C{i}", 8, DIM) for i in range(len(rows))], RULE), iter(stream))
    for batch in stream.batches[:steps]:
        arm.step({**batch, "ids": batch["ids"] % 8})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to be measured; needs 40 GB")
    parser.add_argument("--budget", type=float, default=0.1, help="share of the bytes of rows and state")
    parser.add_argument("--steps", type=int, default=120, help="measured steps per arm")
    parser.add_argument("--warm", type=int, default=500, help="steps before, to fill the memory")
    parser.add_argument("--memmap-steps", type=int, default=12, help="measured steps of the memmap arm, which is slow")
    parser.add_argument("--turn", type=int, default=10, help="steps per turn")
    parser.add_argument("--rows", default="kaggle", help="kaggle, or a divisor of its sizes, such as 100")
    parser.add_argument("--arms", default="memory,belady,lookahead,lru,lru_next,memmap")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memmap-child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    divisor = 1 if args.rows == "kaggle" else int(args.rows)
    rows = tuple(max(n // divisor, 2) for n in CRITEO_KAGGLE_ROWS)
    if args.memmap_child:
        memmap_child(args.folder, rows, args.steps)
        return
    steps = args.warm + args.steps
    stream = Stream(rows, steps + 8)
    compute_only(stream, rows, 3)
    record = DIM * 4 + 4 + 8
    budget = int(args.budget * sum(rows) * (DIM * 4 + 4))
    print(f"{sum(rows):,} rows, {sum(rows) * record / 1e9:.2f} GB; budget {budget / 1e6:,.0f} MB", flush=True)
    work = args.folder / "dram_budget"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    chosen, arms = args.arms.split(","), []
    policies = {
        "belady": (Belady(), 2, True),
        "lookahead": (LookAhead(), 2, True),
        "lru": (LRU(), 0, False),
        "lru_next": (LRU(), 1, True),
    }
    rehearsal = 0.0
    seed = torch.Generator().manual_seed(7)
    for name in chosen:
        seed.manual_seed(7)
        if name == "memory":
            arms.append(Arm(name, EmbeddingBags(tables_of(rows), RULE, generator=seed), iter(stream)))
        elif name in policies:
            policy, ahead, prefetch = policies[name]
            tables = TieredEmbeddings(
                tables_of(rows), RULE, tiers=[Dram(f"{budget}B"), File(work / name)], policy=policy, ahead=ahead,
                generator=seed,
            )  # fmt: skip
            begin = time.perf_counter()
            fill(tables, tables.rows._first)
            took = time.perf_counter() - begin
            print(f"{name}: {tables.room.slots:,} rows at a time; filled in {took:.0f} s", flush=True)
            assert tables.room.nbytes <= budget
            source = Prefetch(tables, stream, scratch=work) if prefetch else stream
            begin = time.perf_counter()
            batches = iter(source)
            arm = Arm(name, tables, batches)
            if name == "belady":
                head = next(batches)
                rehearsal = time.perf_counter() - begin
                arm.tables(head["ids"]).sum().backward()
            arms.append(arm)
            arm.source = source
    for arm in arms:
        begin = time.perf_counter()
        arm.warm(args.warm - (arm.name == "belady"))
        arm.warm_seconds = time.perf_counter() - begin
        print(f"{arm.name}: warm after {arm.warm_seconds:.0f} s", flush=True)
    memmap = Memmap(work, rows, args.steps, budget + (256 << 20), args.rows) if "memmap" in chosen else None
    before = {a.name: (a.tables.moves.missed, a.tables.moves.left, a.tables.store.lower.traffic.reads,
                       a.tables.store.lower.traffic.bytes_written, a.tables.store.lower.traffic.seconds)
              for a in arms if a.name != "memory"}  # fmt: skip
    gc.collect()
    for turn in range(args.steps // args.turn):
        for arm in arms[:: 1 if turn % 2 else -1]:
            arm.turn(args.turn)
        if memmap and len(memmap.seconds) < args.memmap_steps:
            memmap.turn(2)
        print(f"turn {turn}:", *(f"{a.name} {1e3 * statistics.median(a.seconds[-args.turn:]):.0f} ms" for a in arms),
              *([f"memmap {1e3 * memmap.seconds[-1]:.0f} ms"] if memmap else []), flush=True)  # fmt: skip
    if memmap:
        memmap.close()
    speed = measure_speed(work, record)
    page_cpu = next((cpu_per_page(arm.tables) for arm in arms if arm.name in before), 0.0)
    by = {arm.name: arm for arm in arms}
    name_overlaps = {"belady": True, "lookahead": True, "lru": False, "lru_next": True}
    for arm in arms:
        assert arm.losses == arms[0].losses, f"{arm.name} differs from {arms[0].name}"
    results: dict[str, dict[str, float]] = {}
    starts = np.concatenate([[0], np.cumsum(rows[:-1])])
    ids = np.concatenate([b["ids"].numpy() + starts for b in stream.batches[:steps]]).reshape(-1)
    offsets = np.arange(steps + 1) * BATCH * len(rows)
    for arm in [*arms, *([memmap] if memmap else [])]:
        at = results[arm.name] = {
            "median step ms": 1e3 * statistics.median(arm.seconds), "mean step ms": 1e3 * statistics.mean(arm.seconds)
        }  # fmt: skip
        if arm is not memmap:
            at["processor ms per step"] = 1e3 * arm.cpu / args.steps
        if arm.name in before:
            moves, traffic = arm.tables.moves, arm.tables.store.lower.traffic
            missed, left, reads, written, busy = before[arm.name]
            at["missed rows per step"] = (moves.missed - missed) / args.steps
            at["left rows per step"] = (moves.left - left) / args.steps
            at["pages read per step"] = (traffic.reads - reads) / args.steps
            at["bytes written per step"] = (traffic.bytes_written - written) / args.steps
            at["disk ms per step"] = 1e3 * (traffic.seconds - busy) / args.steps
            slots, ahead = arm.tables.room.slots, arm.tables.store.schedule.ahead
            bound = lower_bound(ids, offsets, slots)
            at["rows moved / lower bound"] = (moves.missed + moves.left) / (2 * bound - slots)
            at["rows read / lower bound"] = moves.missed / bound
            found = simulate(ids, offsets, arm.tables.policy, slots, ahead=ahead, slots=slots)
            foretold = float(found.per_batch[args.warm :].mean())
            at["foretold missed rows per step"] = foretold
            at["foretold / missed"] = foretold / at["missed rows per step"]
            if "memory" in by:
                pages = expected_pages(foretold, sum(rows), speed.records_per_page)
                written = at["left rows per step"] / speed.records_per_page * speed.page_bytes
                computing = statistics.mean(by["memory"].seconds)
                overlaps = name_overlaps[arm.name]
                crowded = torch.get_num_threads() >= machine()["usable_cores"]
                foretold_s = predict_step(
                    computing, pages, written, speed, overlaps, rows_moved=foretold, crowded=crowded
                )
                at["foretold step ms"] = 1e3 * foretold_s
                at["foretold / step"] = at["foretold step ms"] / at["mean step ms"]
            at["disk floor ms"] = 1e3 * at["pages read per step"] / speed.page_reads
    ratios = {}
    if "memory" in results:
        base = results["memory"]["median step ms"]
        for at in results.values():
            at["/ memory"] = at["mean step ms"] / results["memory"]["mean step ms"]
            if "disk ms per step" in at:
                # What the cores have to do in any case, and the disk beside them.
                work_ms = results["memory"]["processor ms per step"] + 1e3 * page_cpu * at["pages read per step"]
                floor = max(base, at["disk floor ms"], work_ms / torch.get_num_threads())
                at["floor / memory"], at["/ floor"] = floor / base, at["mean step ms"] / floor
    for name in ("belady", "lookahead"):
        if name in results:
            ratios |= {f"{o} / {name}": results[o]["mean step ms"] / results[name]["mean step ms"]
                       for o in results if o not in (name, "memory")}  # fmt: skip
    for name, at in results.items():
        print(name, {k: round(v, 3) for k, v in at.items()})
    print({k: round(v, 2) for k, v in ratios.items()}, f"rehearsal of {steps} batches {rehearsal:.1f} s")
    if args.out:
        body = {
            "command": "python " + " ".join(sys.argv), "machine": machine(),
            "budget_bytes": budget, "rows": sum(rows), "arms": results, "ratios": ratios,
            "disk": dataclasses.asdict(speed), "rehearsal_seconds": rehearsal,
            "memmap_limited": bool(memmap and memmap.limited),
        }  # fmt: skip
        write_document(args.out, "benchmark", 1, body)
    for arm in arms:
        if hasattr(arm, "source") and hasattr(arm.source, "close"):
            arm.batches.close()
        if isinstance(arm.tables, TieredEmbeddings):
            arm.tables.close()
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
