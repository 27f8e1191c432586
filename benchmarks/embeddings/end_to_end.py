"""Train a DLRM end to end, the plain PyTorch way and with fused rows, on flights and on a Criteo-shaped log.

Paired runs that take turns, equal work; prints speed, AUC, log loss, calibration and peak memory of both.
The Criteo-shaped log is synthetic: true cardinalities (33.8 M rows), skew fitted to published statistics.

    python benchmarks/embeddings/end_to_end.py --out benchmarks/results/end_to_end.json
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

from vitalfew.core import Receipt, Rule
from vitalfew.core.files import write_document
from vitalfew.data import Batches, EncodedLog
from vitalfew.data.sample import FLIGHTS_CROSSES, flights
from vitalfew.data.synthetic import write_criteo_like
from vitalfew.embeddings.account import gather, make_receipt
from vitalfew.embeddings.fitting import train_step
from vitalfew.embeddings.models import DLRM
from vitalfew.embeddings.options import LogOptions, silent
from vitalfew.embeddings.preparing import prepare
from vitalfew.embeddings.settings import Settings, dense_optimizer
from vitalfew.meter import machine


class Fixed(torch.nn.Module):
    """Tables that cost nothing: the same rows for every batch, with a gradient that nobody uses."""

    def __init__(self, features: tuple[str, ...], dim: int, batch_size: int) -> None:
        super().__init__()
        self.features, self.dim = features, dim
        self.rows = torch.randn(batch_size, len(features), dim, requires_grad=True)

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor | None = None) -> torch.Tensor:
        return self.rows[: len(ids)]


def without_tables(log: EncodedLog, settings: Settings, steps: int = 40) -> float:
    """Return the seconds per step of the dense layers, the pair products and the reading of batches alone."""
    model = DLRM(
        Fixed(log.features, settings.dim, settings.batch_size),
        dense_in=log.num_dense,
        bottom=(*settings.bottom, settings.dim),
        top=(*settings.top, 1),
    )
    optimizers = [dense_optimizer(model, settings)]
    seconds = []
    stream = Batches(log, settings.batch_size).epoch(0)
    for _ in range(min(steps, len(Batches(log, settings.batch_size)))):
        start = time.perf_counter()
        train_step(model, optimizers, next(stream))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def run(name: str, log: Path, options: LogOptions, settings: Settings, pairs: int, steps: int | None) -> Receipt:
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(str(log), options, settings, Path(folder) / "work", silent)
        evidence = gather(job, Rule("equal work", tolerance=0.001), pairs=pairs, max_steps=steps, progress=silent)
        receipt = make_receipt(job, evidence, command=" ".join(sys.argv), title=name)
        least = without_tables(job.train, settings) * len(Batches(job.train, settings.batch_size))
    before = receipt.lines[0].before
    assert before is not None
    bound = f"without any tables an epoch takes {least:.2f} s: no table engine makes it more than {before / least:.2f}x"
    receipt = dataclasses.replace(receipt, notes=(*receipt.notes, bound))
    print(f"{name}: {receipt.verdict}: {receipt.why}")
    for line in receipt.lines:
        print(f"  {line.what}: {line.before} -> {line.after} {line.unit} ({line.how})")
    for quality in receipt.quality:
        print(f"  {quality.metric}: {quality.before:.5f} -> {quality.after:.5f}, {quality.finding}")
    print(f"  {bound}")
    return receipt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=250_000, help="rows of the Criteo-shaped log")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out")
    args = parser.parse_args()
    small = Settings(bottom=(64,), top=(64,), batch_size=1024)
    receipts = [run("flights", flights(), LogOptions("late", "time", crosses=FLIGHTS_CROSSES), small, args.pairs, None)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "criteo_like.parquet"
        write_criteo_like(log, args.rows)
        names = tuple(f"C{i}" for i in range(1, 27))
        numbers = tuple(f"I{i}" for i in range(1, 14))
        options = LogOptions("label", categorical=names, numeric=numbers, direct=names)
        for title, bottom, top in (
            ("criteo-shaped (synthetic), small layers", (64,), (64,)),
            ("criteo-shaped (synthetic), layers of the published Kaggle DLRM", (512, 256, 64), (512, 256)),
        ):
            settings = Settings(bottom=bottom, top=top, batch_size=2048)
            receipts.append(run(title, log, options, settings, args.pairs, None))
    if args.out:
        body = {
            "name": "end_to_end",
            "command": "python " + " ".join(sys.argv),
            "machine": machine(),
            "receipts": [receipt.to_dict() | {"curves": [], "environment": {}} for receipt in receipts],
        }
        write_document(args.out, "benchmark", 1, body)
    return 0


if __name__ == "__main__":
    sys.exit(main())
