"""Does it pay to skip stale rows, or inputs that consist of them? Speed and quality beside the same loop without; R9.

Each log is trained three ways that take turns, with the same seed and the same order of samples: plain, with stale rows
frozen, and with stale inputs left out. Speed counts samples seen, skipped ones included. A last part freezes given
shares of a Criteo-shaped log and tells the gain of each: where it breaks even.

    python benchmarks/embeddings/stale_rows.py --out benchmarks/results/stale_rows.json
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
sys.path.insert(0, str(Path(__file__).parent.parent / "tiers"))

import numpy as np
import torch
import torch.nn.functional as F
from traces import FOLDER, TRACES

from vitalfew.core.files import write_document
from vitalfew.data.synthetic import CriteoLike
from vitalfew.embeddings import SGD, Adagrad, EmbeddingBags, Optimizer, Table
from vitalfew.embeddings.metrics import BinaryMetrics, binary_metrics
from vitalfew.embeddings.stale import SkipStale
from vitalfew.meter import machine

MODES = ("plain", "rows", "inputs")
TURN = 8
"""Steps of one arm before it is the other's turn."""
SPEEDUP, AUC, LOG_LOSS, CLICKS = 1.02, 0.001, 0.001, 0.01
"""What R9 asks for: faster, beyond what a busy machine makes of two equal runs, and no worse than this."""


@dataclasses.dataclass
class Workload:
    """Samples of one log: row of each field, numbered over all fields, and a click."""

    name: str
    num_rows: int
    ids: np.ndarray
    label: np.ndarray
    test_ids: np.ndarray
    test_label: np.ndarray
    batch: int = 512
    epochs: int = 4
    every: int = 50
    share: float = 0.8

    def epoch(self, seed: int, epoch: int) -> Iterator[dict[str, torch.Tensor]]:
        order = np.random.default_rng([seed, epoch]).permutation(len(self.ids))
        for start in range(0, len(order), self.batch):
            some = order[start : start + self.batch]
            yield {"ids": torch.from_numpy(self.ids[some]), "label": torch.from_numpy(self.label[some])}


def frappe(quick: bool) -> Workload:
    def read(part: str) -> tuple[np.ndarray, np.ndarray]:
        with gzip.open(FOLDER / "frappe" / f"{part}.libfm.gz", "rt") as file:
            rows = [line.split() for line in file]
        ids = np.array([[int(cell.partition(":")[0]) for cell in row[1:]] for row in rows], np.int64)
        return ids, np.array([row[0] == "1" for row in rows], np.float32)

    ids, label = read("validation")
    test = read("test")
    num_rows = int(max(ids.max(), test[0].max())) + 1
    return Workload("frappe", num_rows, ids, label, *test, epochs=2 if quick else 6, every=10 if quick else 40)


def amazon_book(quick: bool, negatives: int = 4) -> Workload:
    """Pairs as they are, and as many uniform draws of items for each; a tenth of all is held back."""
    trace = TRACES["amazon-book"]()
    pairs = trace.ids.reshape(-1, 2)
    num_users = int(pairs[:, 0].max()) + 1
    dice = np.random.default_rng(0)
    if quick:
        pairs = pairs[:20_000]
    users = np.repeat(pairs[:, 0], negatives)
    items = dice.integers(num_users, trace.num_rows, len(users))
    ids = np.concatenate([pairs, np.stack([users, items], axis=1)])
    label = np.concatenate([np.ones(len(pairs)), np.zeros(len(users))]).astype(np.float32)
    order = dice.permutation(len(ids))
    ids, label, cut = ids[order], label[order], len(ids) // 10
    return Workload(
        "amazon-book", trace.num_rows, ids[cut:], label[cut:], ids[:cut], label[:cut], batch=2048,
        epochs=2, every=10 if quick else 200, share=1.0,
    )  # fmt: skip


def criteo_like(quick: bool) -> Workload:
    """Skew as of Criteo, and rows that saturate: few enough that a planted model is learned."""
    cardinalities = tuple([30_000] * 4 + [3_000] * 4 + [100] * 4)
    log = CriteoLike(60_000 if quick else 1_000_000, cardinalities, seed=0)
    rows = log.rows(0, len(log))
    ids = rows.ids + np.cumsum([0, *cardinalities[:-1]])
    cut = len(log) // 10
    return Workload(
        "criteo-like", sum(cardinalities), ids[cut:], rows.label[cut:], ids[:cut], rows.label[:cut], batch=1024,
        epochs=2, every=10 if quick else 150, share=0.8,
    )  # fmt: skip


class Net(torch.nn.Module):
    """The rows side by side under two layers."""

    def __init__(self, work: Workload, rule: Optimizer, dim: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        features = work.ids.shape[1]
        names = tuple(f"field {k}" for k in range(features))
        generator = torch.Generator().manual_seed(seed)
        self.tables = EmbeddingBags([Table("rows", work.num_rows, dim, features=names)], rule, generator=generator)
        self.layers = torch.nn.Sequential(torch.nn.Linear(features * dim, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layers(self.tables(ids).flatten(1)).squeeze(1)

    def metrics(self, work: Workload) -> BinaryMetrics:
        with torch.no_grad():
            parts = [self(torch.from_numpy(part)) for part in np.array_split(work.test_ids, 20)]
        return binary_metrics(work.test_label, torch.cat(parts).numpy())


class Arm:
    """One way to train, some steps at a time."""

    def __init__(self, work: Workload, rule: Optimizer, mode: str, seed: int, **settings: Any) -> None:
        self.work, self.mode = work, mode
        self.model = Net(work, rule, 16, seed)
        self.optimizer = type_of(rule)(self.model.layers.parameters(), lr=rule.lr)
        self.seconds, self.done = 0.0, False
        self.stale = None
        if mode != "plain":
            settings = {"every": work.every, "share": work.share, "seed": seed} | settings
            self.stale = SkipStale(self.model.tables, mode=mode, **settings)  # type: ignore[arg-type]
        self._steps = self._train(seed)

    def _train(self, seed: int) -> Iterator[None]:
        for epoch in range(self.work.epochs):
            batches: Any = self.work.epoch(seed, epoch)
            if self.stale is not None and self.mode == "inputs":
                batches = self.stale.inputs(batches)
            for batch in batches:
                self.step(batch)
                yield

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        self.optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(self.model(batch["ids"]), batch["label"]).backward()
        self.optimizer.step()

    def turn(self) -> None:
        start = time.perf_counter()
        for _ in range(TURN):
            if next(self._steps, self) is self:
                self.done = True
                break
        self.seconds += time.perf_counter() - start


def type_of(rule: Optimizer) -> Any:
    return torch.optim.SGD if isinstance(rule, SGD) else torch.optim.Adagrad


def compare(work: Workload, rule: Optimizer, seed: int) -> dict[str, Any]:
    arms = [Arm(work, rule, mode, seed) for mode in MODES]
    turn = 0
    while not all(arm.done for arm in arms):
        for arm in arms[:: 1 if turn % 2 else -1]:
            if not arm.done:
                arm.turn()
        turn += 1
    base, found = arms[0].model.metrics(work), {}
    samples = len(work.ids) * work.epochs
    for arm in arms:
        metrics = arm.model.metrics(work)
        result: dict[str, Any] = {"samples per second": samples / arm.seconds, **dataclasses.asdict(metrics)}
        if arm.stale is not None:
            if arm.mode == "inputs":
                arm.stale.correct(arm.model.layers[2].bias)
                metrics = arm.model.metrics(work)
                result |= {"skipped": arm.stale.samples_skipped / samples, "shift": arm.stale.logit_shift}
                result |= {"uncorrected log_loss": result["log_loss"], "uncorrected clicks": result["calibration"]}
                result |= dataclasses.asdict(metrics)
            counts = arm.model.tables.counts
            result["frozen"] = counts.rows_frozen / max(counts.rows_frozen + counts.rows_updated, 1)
            result["stale of watched"] = arm.stale.num_stale / max(len(arm.stale.watched), 1)
            result["speed-up"] = arms[0].seconds / arm.seconds
            result["auc lost"] = base.auc - metrics.auc
            result["log loss lost"] = metrics.log_loss - base.log_loss
            result["clicks off"] = abs(metrics.calibration - 1) - abs(base.calibration - 1)
            arm.stale.undo()
        found[arm.mode] = result
    return found


def verdict(runs: list[dict[str, Any]], mode: str) -> str:
    mine = [run[mode] for run in runs]
    mean = {key: statistics.mean(run[key] for run in mine) for key in
            ("speed-up", "auc lost", "log loss lost", "clicks off")}  # fmt: skip
    if not any(run["frozen"] or run.get("skipped") for run in mine):
        return "declined: nothing was skipped"
    lost = mean["auc lost"] > AUC or mean["log loss lost"] > LOG_LOSS or mean["clicks off"] > CLICKS
    if lost:
        return "declined: quality lost"
    return "pays" if min(run["speed-up"] for run in mine) > SPEEDUP else "declined: not faster in every run"


def break_even(quick: bool) -> list[dict[str, float]]:
    """Return the gain for given shares of stale lookups, hottest rows first, whoever might have found them."""
    work = criteo_like(True)
    visits = np.bincount(work.ids.reshape(-1), minlength=work.num_rows)
    order = np.argsort(-visits, kind="stable")
    covered = np.cumsum(visits[order]) / visits.sum()
    table = []
    for share in (0.0, 0.25, 0.5, 0.75, 0.9, 0.97):
        hot = np.sort(order[: int(np.searchsorted(covered, share))])
        arms = [Arm(work, Adagrad(0.02), mode, 0, every=10**9, revisit=1) for mode in MODES]
        rows, inputs = arms[1].stale, arms[2].stale
        assert rows is not None
        assert inputs is not None
        rows.tables.rows.frozen = np.isin(np.arange(work.num_rows), hot).astype(np.uint8)
        inputs._sieve.publish(0, hot)
        for turn in range(4 if quick else 30):
            for arm in arms[:: 1 if turn % 2 else -1]:
                if not arm.done:
                    arm.turn()
        counts = rows.tables.counts
        spent = [arm.seconds / max(arm.model.tables.counts.steps, 1) for arm in arms]
        per_sample = arms[2].seconds / max(inputs.samples_seen, 1)
        table.append(
            {
                "share of lookups": share, "share of rows": len(hot) / work.num_rows,
                "frozen row updates": counts.rows_frozen / max(counts.rows_frozen + counts.rows_updated, 1),
                "speed-up, rows": spent[0] / spent[1], "inputs skipped": inputs.samples_skipped / inputs.samples_seen,
                "speed-up, inputs": spent[0] / work.batch / per_sample,
            }
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="parts of the logs and one seed: shows that it runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    compare(dataclasses.replace(criteo_like(True), epochs=1), Adagrad(0.02), 0)  # kernels compile
    results: list[dict[str, Any]] = []
    for make in (frappe, amazon_book, criteo_like):
        work = make(args.quick)
        for rule in (SGD(0.5), Adagrad(0.05)):
            runs = [compare(work, rule, seed) for seed in range(1 if args.quick else args.seeds)]
            verdicts = {mode: verdict(runs, mode) for mode in MODES[1:]}
            results.append({"log": work.name, "optimizer": rule.name, "runs": runs, "verdicts": verdicts})
            for mode in MODES[1:]:
                mean = {key: statistics.mean(run[mode][key] for run in runs) for key in runs[0][mode]}
                print(
                    f"{work.name}, {rule.name}, {mode}: {mean['speed-up']:.3f}x, frozen {mean['frozen']:.3f}, skipped "
                    f"{mean.get('skipped', 0.0):.3f}, AUC {-mean['auc lost']:+.4f}, log loss "
                    f"{mean['log loss lost']:+.4f}, clicks {mean['calibration']:.3f}: {verdicts[mode]}",
                    flush=True,
                )
    chart = break_even(args.quick)
    for line in chart:
        print({name: round(value, 3) for name, value in line.items()})
    if args.out:
        about = {"command": "python " + " ".join(sys.argv), "machine": machine(), "quick": args.quick}
        write_document(args.out, "benchmark", 1, {**about, "results": results, "break even": chart})


if __name__ == "__main__":
    main()
