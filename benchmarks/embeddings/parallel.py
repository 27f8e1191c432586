"""Two worker processes against one on the same batches, and how much of the time of a slow tier looking ahead hides.

Rows lie in a file whose every call is given 2 ms more, as if it were on another machine (or, with --ray, in Ray
actors that wait so long before they answer). Each figure is the median of runs that take turns. Prints seconds per
step, bytes per step by class, and the share of the time of moving that the loop does not wait for; ends with 1 where
that is less than 80 %.

    python benchmarks/embeddings/parallel.py --out benchmarks/results/parallel.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.distributed as dist

from vitalfew.core.files import write_document
from vitalfew.embeddings import DLRM, RowwiseAdagrad, Table
from vitalfew.embeddings.parallel import ShardedEmbeddings, sum_gradients
from vitalfew.embeddings.parallel_ahead import ShardedPrefetch
from vitalfew.meter import machine
from vitalfew.tiers import Dram, File, LookAhead, Remote
from vitalfew.tiers.lower import Opened

REQUIRED = 0.8
FEATURES, ROWS, DIM, DENSE = 8, 100_000, 32, 13
WARM = 10


class Slow:
    """A tier whose reads and writes take so many seconds more."""

    def __init__(self, tier: Any, seconds: float) -> None:
        self.tier, self.seconds, self.path = tier, seconds, tier.path

    def open(self, num_rows: int, record_bytes: int, *, resume: bool = False) -> Opened:
        opened = self.tier.open(num_rows, record_bytes, resume=resume)
        for name in ("read", "write"):
            setattr(opened.tier, name, self._slowed(getattr(opened.tier, name)))
        return opened

    def _slowed(self, call: Any) -> Any:
        def slowed(*args: Any) -> Any:
            time.sleep(self.seconds)
            return call(*args)

        return slowed


def batches(samples: int, steps: int) -> list[dict[str, torch.Tensor]]:
    draw = np.random.default_rng(0)
    return [
        {
            "ids": torch.from_numpy((draw.zipf(1.15, (samples, FEATURES)) - 1) % ROWS),
            "dense": torch.from_numpy(draw.normal(size=(samples, DENSE)).astype(np.float32)),
            "label": torch.from_numpy(draw.integers(0, 2, samples).astype(np.float32)),
        }
        for _ in range(steps)
    ]


def work(folder: Path, settings: dict[str, Any]) -> None:
    """Train as one worker."""
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    samples, latency = settings["samples"], settings["latency"]
    loader = [
        {name: part[samples * rank // world : samples * (rank + 1) // world] for name, part in batch.items()}
        for batch in batches(samples, settings["steps"])
    ]
    below = Remote(shards=1, latency=latency) if settings["ray"] else Slow(File(folder / f"rows-{rank}"), latency)
    tables = ShardedEmbeddings(
        [Table(f"f{i}", ROWS, DIM) for i in range(FEATURES)],
        RowwiseAdagrad(0.05),
        tiers=[Dram(settings["memory"]), below],
        policy=LookAhead(depth=100),
        generator=torch.Generator().manual_seed(0),
        exact=settings["exact"],
    )
    model = DLRM(tables, dense_in=DENSE, bottom=(512, 256, DIM), top=(512, 256, 1))
    rule = torch.optim.SGD(model.parameters(), 0.05)
    with ShardedPrefetch(tables, loader, overlap=settings["overlap"]) as ahead:
        for i, batch in enumerate(ahead):
            if i == WARM:
                dist.barrier()
                ahead.times.waited = ahead.times.synced = ahead.times.moving = 0.0
                before, start = dataclasses.asdict(ahead.wire), time.perf_counter()
            rule.zero_grad()
            out = model(batch["dense"], batch["ids"]).reshape(-1)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(out, batch["label"], reduction="sum")
            (loss / ahead.samples).backward()
            if world > 1:
                sum_gradients(model.parameters())
            rule.step()
    steps = settings["steps"] - WARM
    found = {
        "step": (time.perf_counter() - start) / steps,
        "waited": ahead.times.waited / steps,
        "synced": ahead.times.synced / steps,
        "moving": ahead.times.moving / steps,
        "missed": tables.owner.store.moves.missed / settings["steps"],
        "wire": {name: (n - before[name]) / steps for name, n in dataclasses.asdict(ahead.wire).items()},
    }
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    tables.close()
    dist.barrier()
    os._exit(0)


def run(world: int, **settings: Any) -> dict[str, Any]:
    """Return what the slowest worker has measured, and bytes summed over the workers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = [
            subprocess.Popen(
                [sys.executable, __file__, "--work", name, json.dumps(settings)],
                env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"},
            )
            for rank in range(world)
        ]
        codes = [process.wait() for process in started]
        if any(codes):
            raise RuntimeError("a worker has failed")
        found = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(world)]
    worst = max(found, key=lambda each: each["waited"])
    return worst | {"wire": {name: sum(each["wire"][name] for each in found) for name in worst["wire"]}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1024, help="samples of a batch, of all workers together")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--memory", type=int, default=40_000, help="rows in memory, of each worker")
    parser.add_argument("--latency", type=float, default=0.002)
    parser.add_argument("--ray", action="store_true", help="keep the rows in Ray actors")
    parser.add_argument("--out")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(Path(args.work[0]), json.loads(args.work[1]))
    shared = {"samples": args.samples, "steps": args.steps, "latency": args.latency, "ray": args.ray}
    arms = {
        "1 worker": (1, {"exact": True, "overlap": True, "memory": 2 * args.memory}),
        "2 workers": (2, {"exact": True, "overlap": True, "memory": args.memory}),
        "2 workers, sums": (2, {"exact": False, "overlap": True, "memory": args.memory}),
        "2 workers, nothing ahead": (2, {"exact": True, "overlap": False, "memory": args.memory}),
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for _ in range(args.runs):
        for name, (world, settings) in arms.items():
            runs[name].append(run(world, **shared, **settings))
    body: dict[str, Any] = {"arms": {}}
    for name, some in runs.items():
        middle = {key: statistics.median(each[key] for each in some) for key in ("step", "waited", "synced", "moving")}
        body["arms"][name] = middle | {"wire": some[0]["wire"], "missed": some[0]["missed"]}
        print(
            f"{name}: {1e3 * middle['step']:.1f} ms per step, of which waiting for values {1e3 * middle['waited']:.1f} "
            f"and exchanging shared rows {1e3 * middle['synced']:.1f}; moving {1e3 * middle['moving']:.1f} (measured)"
        )
        print("  bytes per step (counted):", ", ".join(f"{key} {n:,.0f}" for key, n in some[0]["wire"].items()))
    two, none = body["arms"]["2 workers"], body["arms"]["2 workers, nothing ahead"]
    hidden = 1 - two["waited"] / two["moving"]
    of_all = 1 - (two["waited"] + two["synced"]) / (two["moving"] + two["synced"])
    floor = two["step"] - two["waited"] - two["synced"]
    print(f"hidden: {hidden:.1%} of the time of moving (required: {REQUIRED:.0%})")
    print(f"hidden: {of_all:.1%} where the exchange that cannot wait, of rows two batches share, counts as moving too")
    print(f"against nothing ahead: {none['step'] / two['step']:.2f}x as fast")
    print(
        f"against 1 worker: {body['arms']['1 worker']['step'] / two['step']:.2f}x; "
        f"floor, the model alone: {1e3 * floor:.1f} ms"
    )
    if args.out:
        command = "python " + " ".join(sys.argv)
        body |= {
            "name": "parallel",
            "command": command,
            "machine": machine(),
            "hidden": hidden,
            "hidden_of_all": of_all,
            "required": REQUIRED,
        }
        write_document(args.out, "benchmark", 1, body)
    return 0 if hidden >= REQUIRED else 1


if __name__ == "__main__":
    sys.exit(main())
