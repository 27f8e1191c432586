"""What was foretold, and what came: misses and step time on real logs with a tenth of the rows in memory; R1, R7.

For each log a DLRM trains with everything in memory and with a tenth of the rows in memory and the rest on disk, in
turns. Misses are foretold by `replay`, the step by the speed of memory and disk measured beforehand. A last part puts
the rows into Ray actors that wait 2 ms with every answer, and says how much of the moving the loop did not wait for.

    python benchmarks/embeddings/foretold.py --folder /nvme/scratch --out benchmarks/results/foretold.json
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
sys.path.insert(0, str(Path(__file__).parent.parent / "tiers"))

import numpy as np
import torch
from traces import TRACES, Trace

from vitalfew.core.files import write_document
from vitalfew.embeddings import EmbeddingBags, Prefetch, RowwiseAdagrad, Table, TieredEmbeddings
from vitalfew.meter import machine
from vitalfew.tiers import Dram, File, LookAhead, Remote
from vitalfew.tiers.replay import replay
from vitalfew.tiers.schedule import Schedule
from vitalfew.tiers.speed import expected_pages, measure_speed, predict_step

DIM, BATCH = 64, 512
RULE = RowwiseAdagrad(lr=0.02)


class Model(torch.nn.Module):
    """One bag of rows per sample under a few layers."""

    def __init__(self, tables: EmbeddingBags) -> None:
        super().__init__()
        self.tables = tables
        sizes, layers = (DIM, 512, 512, 256, 1), []
        torch.manual_seed(0)
        for a, b in itertools.pairwise(sizes):
            layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
        self.top = torch.nn.Sequential(*layers[:-1])

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.top(self.tables(ids, offsets)[:, 0])


def batches_of(trace: Trace, name: str) -> list[dict[str, torch.Tensor]]:
    """Cut a trace into bags: pairs have two rows a sample, Frappe ten; of baskets each id is a sample."""
    width = {"frappe": 10, "retail": 1, "kosarak": 1}.get(name, 2)
    out = []
    for a, b in itertools.pairwise(trace.batch_offsets):
        ids = torch.from_numpy(trace.ids[a:b].copy())
        offsets = torch.arange(0, len(ids) + 1, width)
        out.append({"ids": ids, "offsets": offsets, "label": (ids[::width] % 3 == 0).float()})
    return out


def step(model: Model, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> float:
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        model(batch["ids"], batch["offsets"])[:, 0], batch["label"]
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


class Arm:
    """One way to train, some steps at a time."""

    def __init__(self, tables: EmbeddingBags, batches) -> None:
        self.tables, self.batches, self.model = tables, iter(batches), Model(tables)
        self.optimizer = torch.optim.Adagrad(self.model.top.parameters(), lr=0.02)
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def turn(self, steps: int) -> bool:
        for _ in range(steps):
            start = time.perf_counter()
            batch = next(self.batches, None)
            if batch is None:
                return False
            self.losses.append(step(self.model, self.optimizer, batch))
            self.seconds.append(time.perf_counter() - start)
        return True


def run(name: str, folder: Path, share: float) -> dict[str, float]:
    trace = TRACES[name]()
    batches = batches_of(trace, name)
    uses = max(len(np.unique(b["ids"])) for b in batches)
    slots = max(int(share * trace.distinct), 0) + 3 * uses  # what is kept, and three batches in flight
    seed = torch.Generator()
    memory = EmbeddingBags([Table("rows", trace.num_rows, DIM)], RULE, generator=seed.manual_seed(0))
    tables = TieredEmbeddings(
        [Table("rows", trace.num_rows, DIM)], RULE, tiers=[Dram(slots), File(folder / name)],
        generator=seed.manual_seed(0), policy=LookAhead(),
    )  # fmt: skip
    # All rows lie on the disk, as a run before would have left them.
    every = np.arange(trace.num_rows)
    for part in np.array_split(every, max(1, len(every) // 4096)):
        tables.fill(int(part[0]), memory.columns(int(part[0]), int(part[-1]) + 1))
    speed = measure_speed(folder, tables.store.record.nbytes)
    with Prefetch(tables, batches) as ahead:
        arms = [Arm(memory, batches), Arm(tables, ahead)]
        turn = 0
        while all([arm.turn(10) for arm in arms[:: 1 if turn % 2 else -1]]):  # noqa: C419  both take their turn
            turn += 1
        waited, moving = ahead.waited, ahead.moving
    assert arms[0].losses == arms[1].losses, "rows in tiers differ from rows in memory"
    room = tables.room
    schedule = Schedule(
        trace.num_rows, slots, LookAhead(), ahead=2, depth=tables.store.schedule.depth, entries=room.entries
    )
    start = time.perf_counter()
    found = replay(
        ((b["ids"].numpy(), sum(t.nbytes for t in b.values())) for b in batches),
        schedule, queue_bytes=room.queue_bytes, below=every,
    )  # fmt: skip
    planning = (time.perf_counter() - start) / len(batches)
    moves, traffic = tables.moves, tables.store.lower.traffic
    computing, measured = statistics.mean(arms[0].seconds[5:]), statistics.mean(arms[1].seconds[5:])
    n = len(batches)
    pages = expected_pages(found.missed / n, trace.num_rows, speed.records_per_page)
    written = found.left / n / speed.records_per_page * speed.page_bytes
    crowded = torch.get_num_threads() >= machine()["usable_cores"]
    foretold = predict_step(
        computing, pages, written, speed, rows_moved=(found.missed + found.left) / n, planning=planning, crowded=crowded
    )
    tables.close()
    return {
        "rows": trace.num_rows, "slots": slots, "batches": n,
        "miss ratio foretold": found.miss_ratio, "miss ratio": moves.missed / moves.needed,
        "in memory ms": 1e3 * computing, "step ms foretold": 1e3 * foretold, "step ms": 1e3 * measured,
        "foretold / step": foretold / measured, "pages read": traffic.reads / n,
        "share of the moving that was hidden": max(1 - waited / moving, 0.0),
    }  # fmt: skip


def remote(latency: float) -> dict[str, float]:
    """Rows in two Ray actors that wait with every answer."""
    trace = TRACES["amazon-book"]()
    batches = batches_of(trace, "amazon-book")[:200]
    tables = TieredEmbeddings(
        [Table("rows", trace.num_rows, DIM)], RULE, tiers=[Dram(0.1), Remote(shards=2, latency=latency)]
    )
    with Prefetch(tables, batches) as ahead:
        arm = Arm(tables, ahead)
        while arm.turn(10):
            pass
    seconds = tables.store.lower.traffic.seconds
    tables.close()
    return {
        "calls": tables.store.lower.traffic.reads + tables.store.lower.traffic.writes, "latency ms": 1e3 * latency,
        "step ms": 1e3 * statistics.mean(arm.seconds), "remote s": seconds, "waited s": ahead.waited,
        "share of the remote time that was hidden": 1 - ahead.waited / seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--logs", default="amazon-book,gowalla,video-games,retail,frappe")
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name in args.logs.split(","):
            results[name] = run(name, Path(folder), args.share)
            print(name, {k: round(v, 3) for k, v in results[name].items()}, flush=True)
    results["remote"] = remote(0.002)
    print("remote", {k: round(v, 3) for k, v in results["remote"].items()})
    if args.out:
        about = {"command": "python " + " ".join(sys.argv), "machine": machine()}
        write_document(args.out, "benchmark", 1, {**about, "results": results})


if __name__ == "__main__":
    main()
