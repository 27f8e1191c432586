"""Every method on every real log: speed, bytes moved, and what the model learned; one epoch of a DLRM each.

Each seed trains every way once, in an order that shifts from seed to seed. Ways over tiers keep a tenth of the rows in
memory, or the next of 20 %, 40 %, 80 % where the rows of a batch need more. Ratios are of one seed's runs.

    python benchmarks/embeddings/methods.py --folder /nvme/scratch --out benchmarks/results/methods.json
    python benchmarks/embeddings/methods.py --out benchmarks/results/methods.json --resume    # logs still missing
    python benchmarks/embeddings/methods.py --quick
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
from logs import LOGS, MOST

from vitalfew.core import InputError, Rule
from vitalfew.core.files import read_document, write_document
from vitalfew.data.encoded import Encoded
from vitalfew.embeddings.auto import choose_way
from vitalfew.embeddings.options import silent
from vitalfew.embeddings.preparing import Job, prepare
from vitalfew.embeddings.tiering import Tiering
from vitalfew.embeddings.way import way_named
from vitalfew.embeddings.ways import WayRun, run_way
from vitalfew.meter import machine

TOLERANCE = 0.001  # of AUC
SHARES = ("10%", "20%", "40%", "80%")


class Arm(NamedTuple):
    """Which methods act, and where the rows are."""

    methods: str
    over_tiers: bool = True
    policy: str = "lookahead"
    reads_ahead: bool = True


ARMS: dict[str, Arm] = {
    "plain": Arm("plain", over_tiers=False),
    "in memory": Arm("fused", over_tiers=False),
    "prefetch": Arm("fused"),
    "on demand": Arm("fused", policy="lru", reads_ahead=False),
    "hot rows": Arm("hot-rows"),
    "split batches": Arm("split-batches"),
    "skip rows": Arm("skip-rows"),
    "skip inputs": Arm("skip-inputs"),
    "hot + skip": Arm("hot-rows+skip-rows"),
    "auto": Arm("auto"),  # what a short trial chooses
}
MEASURES: dict[str, Callable[[WayRun], float]] = {
    "samples per s": lambda run: run.samples / run.seconds,
    "row bytes per sample": lambda run: run.row_bytes / run.samples,
    "device bytes per sample": lambda run: run.device_bytes / run.samples,
    "AUC": lambda run: run.metrics.auc,
    "log loss": lambda run: run.metrics.log_loss,
    "calibration": lambda run: run.metrics.calibration,
}


def tiering_for(job: Job, arm: Arm) -> Tiering:
    """Return the smallest memory of some that holds the rows of the batches under way."""
    train, settings = job.train.block(0, len(job.train)), job.settings
    order = np.random.default_rng(0).permutation(len(train))
    some = [train.take(order[at : at + settings.batch_size]) for at in range(0, len(order), settings.batch_size)][:50]
    for share in SHARES:
        tiering = Tiering(share, policy=arm.policy)
        try:
            tiering.check(job.num_rows, settings)
            tiering.check_batches(job.num_rows, settings, iter(some), jagged=job.train.is_jagged)
        except InputError:
            if share == SHARES[-1]:
                raise
            continue
        break
    return tiering


def train_once(arm: Arm, job: Job, train: Encoded, test: Encoded, seed: int, folder: Path, tiers: Tiering) -> WayRun:
    """Train one epoch in one way, without a pause."""
    with tempfile.TemporaryDirectory(dir=folder) as store:
        run = run_way(
            way_named(arm.methods), train, test, job.num_rows, job.settings, seed=seed,
            tiers=tiers if arm.over_tiers else None, store=Path(store) / "rows", reads_ahead=arm.reads_ahead,
            turn=sys.maxsize,
        )  # fmt: skip
        return finished(run)


def choice(job: Job, tiers: Tiering, folder: Path) -> tuple[Arm, dict[str, Any]]:
    """Return the way that short trials choose, how long they took, and why the others were left."""
    start = time.perf_counter()
    rule = Rule("equal work", tolerance=TOLERANCE)
    with tempfile.TemporaryDirectory(dir=folder) as store:
        found = choose_way(job.train, job.num_rows, job.settings, rule, tiers=tiers, store=Path(store) / "rows")
    seconds = time.perf_counter() - start
    declined = {each.method: each.reason for each in found.declined}
    return Arm(found.way.name), {"way": found.way.name, "seconds": seconds, "declined": declined}


def finished(run: Generator[None, None, WayRun]) -> WayRun:
    """Return what a run gives at its end."""
    while True:
        try:
            next(run)
        except StopIteration as end:
            result: WayRun = end.value
            return result


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summary(runs: Mapping[str, Sequence[WayRun]]) -> dict[str, dict[str, Any]]:
    """Return each way's figures over the seeds, its speed in times of two others' and its AUC less that in memory."""
    figures = {way: {name: [of(run) for run in each] for name, of in MEASURES.items()} for way, each in runs.items()}
    for figure in figures.values():
        for base in ("in memory", "prefetch"):
            pairs = zip(figure["samples per s"], figures[base]["samples per s"], strict=True)
            figure[f"times {base}"] = [mine / theirs for mine, theirs in pairs]
        both = zip(figure["AUC"], figures["in memory"]["AUC"], strict=True)
        figure["AUC difference"] = [mine - theirs for mine, theirs in both]
    verdicts = {way: [r.verdict for run in each for r in run.receipts.values()] for way, each in runs.items()}
    return {
        way: {name: spread(values) for name, values in figure.items()} | {"verdicts": verdicts[way]}
        for way, figure in figures.items()
    }


def compare(name: str, ways: Sequence[str], seeds: int, most: int, folder: Path) -> dict[str, Any]:
    """Train every way on a log, once a seed."""
    log = LOGS[name](folder, most=most)
    job = prepare(str(log.path), log.options, log.settings, folder / "work", silent)
    train, test = job.train.block(0, len(job.train)), job.test.block(0, len(job.test))
    tiers = {way: tiering_for(job, ARMS[way]) for way in ways}
    memory = max((each.memory for each in tiers.values()), key=SHARES.index)  # one budget for all
    tiers = {way: dataclasses.replace(each, memory=memory) for way, each in tiers.items()}
    few = train.take(np.arange(min(len(train), 20 * log.settings.batch_size)))
    for way in ways:  # kernels are compiled before the clock runs
        if way != "auto":
            train_once(ARMS[way], job, few, test, 0, folder, tiers[way])
    arms, chosen = dict(ARMS), {}
    if "auto" in ways:
        arms["auto"], chosen = choice(job, tiers["auto"], folder)
    runs: dict[str, list[WayRun]] = {way: [] for way in ways}
    for seed in range(seeds):
        for i in range(len(ways)):
            way = ways[(seed + i) % len(ways)]
            run = train_once(arms[way], job, train, test, seed, folder, tiers[way])
            runs[way].append(run)
            speed = run.samples / run.seconds
            print(f"{name}, seed {seed}, {way}: {speed:,.0f} samples/s, AUC {run.metrics.auc:.4f}", flush=True)
    return {
        "log": name, "samples": len(train), "test samples": len(test), "table rows": sum(job.num_rows.values()),
        "memory": memory, "dim": log.settings.dim, "ways": summary(runs), "auto": chosen,
    }  # fmt: skip


def show(result: Mapping[str, Any]) -> None:
    """Print a line for each way."""
    print(f"\n{result['log']}: {result['samples']:,} samples, {result['memory']} of the rows in memory")
    for way, figures in result["ways"].items():
        cells = (f"{what} {figures[what]['median']:.4g}" for what in figures if what != "verdicts")
        print(f"  {way}: {', '.join(cells)}{', ' if figures['verdicts'] else ''}{', '.join(figures['verdicts'])}")
    for what, why in result["auto"].get("declined", {}).items():
        print(f"  auto left {what}: {why}")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs")
    parser.add_argument("--ways", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--most", type=int, help="samples of each log")
    parser.add_argument("--folder", type=Path, help="for logs and rows on disk")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true", help="leave out the logs that --out has")
    parser.add_argument("--quick", action="store_true", help="one seed, two logs, 30,000 samples")
    args = parser.parse_args()
    logs, seeds, most = ("frappe,kosarak", 1, 30_000) if args.quick else (",".join(LOGS), 3, MOST)
    args.logs, args.seeds, args.most = args.logs or logs, args.seeds or seeds, args.most or most
    for wrong in {*args.logs.split(",")} - {*LOGS} | {*args.ways.split(",")} - {*ARMS}:
        parser.error(f"there is no {wrong!r}; logs: {', '.join(LOGS)}; ways: {', '.join(ARMS)}")
    if not {"in memory", "prefetch"} <= {*args.ways.split(",")}:
        parser.error("ratios need `in memory` and `prefetch` among the ways")
    asked = {"most": args.most, "seeds": args.seeds, "ways asked": args.ways.split(",")}
    results: list[dict[str, Any]] = []
    if args.resume and args.out and args.out.exists():
        before = read_document(args.out, "benchmark", 1)
        if any(before[name] != value for name, value in asked.items()):
            parser.error(f"{args.out} is of other --most, --seeds or --ways")
        results = before["results"]
    for name in args.logs.split(","):
        if any(result["log"] == name for result in results):
            continue
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            results.append(compare(name, args.ways.split(","), args.seeds, args.most, Path(folder)))
        show(results[-1])
        if args.out:
            about = {"name": "methods", "command": "python benchmarks/embeddings/methods.py", "machine": machine()}
            write_document(args.out, "benchmark", 1, {**about, "tolerance": TOLERANCE, **asked, "results": results})


if __name__ == "__main__":
    main()
