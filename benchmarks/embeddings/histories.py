"""Do histories help on a real log? A model that reads them beside two that do not, over seeds.

Games that users reviewed, four drawn ones behind each, the last fifth of each user's held back. The same settings for a
DLRM of user and item, for one that also gets the ten games before as a bag, and for TBSM with these ten as a history.

    python benchmarks/embeddings/histories.py --out benchmarks/results/histories.json
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from logs import HISTORY, MOST, Log, video_games_log

from vitalfew.core.files import write_document
from vitalfew.embeddings.jobs import train_log
from vitalfew.meter import machine


def arms(log: Log) -> dict[str, dict[str, Any]]:
    """Return what each model changes of options and settings."""
    flat = {"lists": (), "ignore": ("history",)}
    tower = {"top": (15, 15), "bottom": (16,)}
    return {
        "dlrm": {"options": flat, "settings": {}},
        "dlrm with a bag": {"options": {}, "settings": {}},
        "tbsm": {"options": {**flat, "by": "user"}, "settings": {"model": "tbsm", "history": HISTORY, **tower}},
    }


def train(log: Log, arm: dict[str, Any], seed: int, folder: Path) -> dict[str, float]:
    """Train one model and return what its receipt says."""
    options = dataclasses.replace(log.options, **arm["options"])
    settings = dataclasses.replace(log.settings, seed=seed, **arm["settings"])
    receipt = train_log(str(log.path), options, settings, folder, pairs=0)
    found = {line.what: float(line.after) for line in receipt.lines if line.after is not None}
    named = {"auc": "AUC", "log loss": "log loss", "rows": "rows trained", "seconds": "time"}
    return {name: found[f"whole run, {what}"] for name, what in named.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a part of the log, one seed: shows that it runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        log = video_games_log(Path(folder), most=20_000 if args.quick else MOST)
        pq.write_table(pq.read_table(log.path).sort_by("time"), log.path)
        for name, arm in arms(log).items():
            runs = []
            for seed in range(1 if args.quick else args.seeds):
                runs.append(train(log, arm, seed, Path(folder) / f"{name}-{seed}".replace(" ", "-")))
                print(name, seed, {k: round(v, 4) for k, v in runs[-1].items()}, time.strftime("%X"), flush=True)
            results[name] = {key: statistics.mean(run[key] for run in runs) for key in runs[0]} | {"runs": runs}
    if args.out:
        command = f"python benchmarks/embeddings/histories.py --out benchmarks/results/{args.out.name}"
        about = {"command": command, "machine": machine(), "quick": args.quick, "history": HISTORY}
        write_document(args.out, "benchmark", 1, {**about, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
