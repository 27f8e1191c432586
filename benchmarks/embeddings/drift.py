"""Train on the first half of a year of flights and follow each model through the rest, which drifts away.

Masked attention (none, triangular, learned) against dot products (DLRM), cross layers (DCN-v2) and an AutoInt-like
model: attention between all fields, one layer for the dense inputs, and a linear output, so no deep layers anywhere.
Each model gets the learning rate that does best on the last fifth of its training part; then AUC and log loss per
later slice over the seeds, parameters and step time side by side, and the drift of each column. The time of a step is
the median of steps that all models take in turns.

    python benchmarks/embeddings/drift.py --out benchmarks/results/drift.json
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import pyarrow.parquet as pq
import torch

from vitalfew.core.files import write_document
from vitalfew.core.intervals import mean_interval
from vitalfew.data import Encoded
from vitalfew.data.readers import open_log
from vitalfew.data.sample import flights
from vitalfew.data.split import time_slices
from vitalfew.embeddings import EmbeddingBags, Table
from vitalfew.embeddings.fitting import predict, train_step
from vitalfew.embeddings.models import DLRM, ClickModel, DCNv2
from vitalfew.embeddings.models.adrec import AdRec
from vitalfew.embeddings.options import LogOptions, silent
from vitalfew.embeddings.preparing import Job, prepare
from vitalfew.embeddings.settings import Settings, dense_optimizer
from vitalfew.embeddings.slices import SliceQuality, auc_by_slice
from vitalfew.look.drift import look_at_drift
from vitalfew.meter import machine

OPTIONS = LogOptions("late", "time")
SETTINGS = Settings(dim=16, bottom=(64,), top=(64,), batch_size=1024)
RATES = (0.003, 0.01, 0.03, 0.1)
SLICES, REFERENCE = 7, 0.5

DIM, BOTTOM, TOP = SETTINGS.dim, (*SETTINGS.bottom, SETTINGS.dim), (*SETTINGS.top, 1)
ARMS: dict[str, Callable[..., ClickModel]] = {
    "dot (DLRM)": lambda bags, **kw: DLRM(bags, bottom=BOTTOM, top=TOP, **kw),
    "crosses (DCN-v2)": lambda bags, **kw: DCNv2(bags, top=TOP, **kw),
    "attention (AutoInt-like)": lambda bags, **kw: AdRec(bags, bottom=(DIM,), top=(1,), mask="none", **kw),
    "AdRec, no mask": lambda bags, **kw: AdRec(bags, bottom=BOTTOM, top=TOP, mask="none", **kw),
    "AdRec, triangular": lambda bags, **kw: AdRec(bags, bottom=BOTTOM, top=TOP, mask="triangular", **kw),
    "AdRec, learned half": lambda bags, **kw: AdRec(bags, bottom=BOTTOM, top=TOP, mask="learned", **kw),
}

Made = tuple[ClickModel, list[torch.optim.Optimizer]]


def make(arm: str, job: Job, rate: float, seed: int) -> Made:
    settings = dataclasses.replace(SETTINGS, lr=rate, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tables = [Table(name, rows, DIM) for name, rows in job.num_rows.items()]
    bags = EmbeddingBags(tables, settings.rule(), generator=generator, seed=seed)
    model = ARMS[arm](bags, dense_in=job.train.num_dense, generator=generator)
    return model, [dense_optimizer(model, settings)]


def batches(rows: Encoded, seed: int) -> list[np.ndarray]:
    order, size = np.random.default_rng(seed).permutation(len(rows)), SETTINGS.batch_size
    return [order[at : at + size] for at in range(0, len(rows), size)]


def train(made: Made, rows: Encoded, seed: int) -> ClickModel:
    for chosen in batches(rows, seed):
        train_step(*made, rows.take(chosen))
    return made[0]


def scores(model: ClickModel, rows: Encoded) -> np.ndarray:
    parts = (np.arange(at, min(at + 8192, len(rows))) for at in range(0, len(rows), 8192))
    return predict(model, (rows.take(part) for part in parts))


def loss(model: ClickModel, rows: Encoded) -> float:
    (found,) = auc_by_slice(rows.label, scores(model, rows), np.zeros(len(rows)), 1)
    return math.inf if found.log_loss is None else found.log_loss


def step_seconds(job: Job, rows: Encoded, steps: int) -> dict[str, float]:
    """Return the median seconds of a step of each arm; the arms take turns, so that a busy machine hits them alike."""
    made = {arm: make(arm, job, 0.01, 0) for arm in ARMS}
    taken: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for chosen in batches(rows, 0)[: steps + 3]:
        batch = rows.take(chosen)
        for arm, each in made.items():
            start = time.perf_counter()
            train_step(*each, batch)
            taken[arm].append(time.perf_counter() - start)
    return {arm: statistics.median(seconds[3:]) for arm, seconds in taken.items()}


def run(job: Job, cuts: np.ndarray, seeds: int, rates: tuple[float, ...], steps: int) -> dict[str, Any]:
    rows, later = (log.block(0, len(log)) for log in (job.train, job.test))
    order = np.argsort(rows.time, kind="stable")
    fit, check = (rows.take(part) for part in np.split(order, [len(order) * 4 // 5]))
    place = np.searchsorted(cuts[1:-1], later.time)
    seconds = step_seconds(job, rows, steps)
    quality: dict[str, list[tuple[SliceQuality, ...]]] = {}
    about: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        losses = {rate: loss(train(make(arm, job, rate, 99), fit, 99), check) for rate in rates}
        rate = min(losses, key=lambda rate: losses[rate])
        quality[arm], pruned = [], []
        for seed in range(seeds):
            model = train(make(arm, job, rate, seed), rows, seed)
            quality[arm].append(auc_by_slice(later.label, scores(model, later), place, len(cuts) - 1))
            pruned.append(model.pruned_pairs() if isinstance(model, AdRec) else [])
        about[arm] = {
            "dense_parameters": sum(p.numel() for n, p in model.named_parameters() if not n.startswith("tables.")),
            "step_seconds": seconds[arm],
            "lr": rate,
            "losses_by_lr": losses,
            "pruned_pairs": pruned,
        }
    return {arm: about[arm] | {"slices": _summary(quality[arm], quality["dot (DLRM)"])} for arm in ARMS}


def _summary(mine: list[tuple[SliceQuality, ...]], dot: list[tuple[SliceQuality, ...]]) -> list[dict[str, Any]]:
    """Return mean and 95 % interval over the seeds of each slice, and of the difference from dot products."""
    slices = []
    for k in range(len(mine[0])):
        values = {
            "auc": [each[k].auc for each in mine],
            "log_loss": [each[k].log_loss for each in mine],
            "auc_over_dot": [each[k].auc - other[k].auc for each, other in zip(mine, dot, strict=True)],
        }
        slices.append({name: dataclasses.asdict(mean_interval(found, 0.95)) for name, found in values.items()})
    return slices


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="every eighth flight, two seeds, one learning rate")
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        log = str(flights())
        if args.quick:
            table = pq.read_table(log)
            log = str(Path(folder) / "flights.parquet")
            pq.write_table(table.take(np.arange(0, len(table), 8)), log)
        cuts, _ = time_slices(open_log(log), "time", SLICES, REFERENCE)
        drift = look_at_drift(log, OPTIONS, SLICES, reference=REFERENCE)
        options = dataclasses.replace(OPTIONS, test_share=1 - REFERENCE)
        job = prepare(log, options, SETTINGS, Path(folder) / "work", silent)
        seeds, rates, steps = (2, (0.01,), 10) if args.quick else (args.seeds, RATES, 100)
        found = run(job, cuts, seeds, rates, steps)
    for each in drift.slices:
        told = "-" if each.auc is None else f"{each.auc.mean:.3f}"
        print(f"{each.start} to {each.stop}: {each.rows:,} rows, {each.click_rate:.1%} late, told apart {told}")
    for column in drift.columns:
        print(f"  {column.name}: {column.finding}, PSI {' '.join(f'{psi:.2f}' for psi in column.psi)}")
    for arm, result in found.items():
        cost = f"{result['dense_parameters']:,} parameters, {1e3 * result['step_seconds']:.2f} ms per step"
        print(f"{arm}: {cost}, lr {result['lr']}")
        for name in ("auc", "log_loss", "auc_over_dot"):
            cells = [
                f"{each[name]['mean']:.4f} ({each[name]['low']:.4f} to {each[name]['high']:.4f})"
                for each in result["slices"]
            ]
            print(f"  {name}: {', '.join(cells)}")
    if args.out:
        body = {
            "name": "drift",
            "command": "python " + " ".join(sys.argv),
            "machine": machine(),
            "quick": args.quick,
            "seeds": seeds,
            "models": found,
            "drift": drift.to_dict(),
        }
        write_document(args.out, "benchmark", 1, body)
    return 0


if __name__ == "__main__":
    sys.exit(main())
