"""When it pays to compute the popular part of a batch while the rows of the rest come; the sign that was foretold.

Each point of a grid (where rows lie, dense layers, popular share) trains one model in three ways, in turns: whole
batches whose rows are gathered first, split batches, and whole batches with the next one's rows gathered meanwhile.
The first steps of another run, in which `SplitBatches` measures for itself, foretell which of the first two is faster.

    python benchmarks/embeddings/split.py --folder /nvme/scratch --out benchmarks/results/split.json
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch

from vitalfew.core.files import write_document
from vitalfew.embeddings import RowwiseAdagrad, Table, TieredEmbeddings
from vitalfew.embeddings.split import SplitBatches
from vitalfew.embeddings.splitting import split_batch
from vitalfew.meter import machine
from vitalfew.tiers import LRU, Dram, File, Remote

DIM, FIELDS, BATCH = 32, 4, 512
HOT, COLD = 2_000, 200_000
TIE = 0.03
"""Ways whose medians differ by less than this share are as fast as each other, whichever was foretold."""
Batch = dict[str, torch.Tensor]


def batches_of(count: int, popular: float) -> list[Batch]:
    """Draw samples of hot rows, of which a share has a cold row in its first field."""
    dice = np.random.default_rng(0)
    out = []
    for _ in range(count):
        ids = dice.integers(0, HOT, (BATCH, FIELDS))
        rest = dice.random(BATCH) >= popular
        ids[rest, 0] = HOT + dice.integers(0, COLD, int(rest.sum()))
        out.append({"ids": torch.from_numpy(ids), "label": torch.from_numpy((dice.random(BATCH) < 0.3).astype("f4"))})
    return out


class Way:
    """One way to train, some steps at a time."""

    def __init__(self, tier: Any, batches: list[Batch], width: int, *, ahead: int, when: str) -> None:
        self.tables = TieredEmbeddings(
            [Table("rows", HOT + COLD, DIM, features=tuple("abcd"[:FIELDS]))], RowwiseAdagrad(0.02),
            tiers=[Dram(HOT + 4 * BATCH), tier], policy=LRU(), ahead=ahead, update="step",
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        # The cold rows lie below, as a run before would have left them.
        for part in np.array_split(np.arange(HOT, HOT + COLD), 64):
            weight = torch.zeros(len(part), DIM)
            self.tables.fill(int(part[0]), {"weight": weight})
        torch.manual_seed(0)
        sizes = (FIELDS * DIM, width, width, 1)
        layers: list[torch.nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
        self.top = torch.nn.Sequential(*layers[:-1])
        self.dense = torch.optim.SGD(self.top.parameters(), 0.01)
        self.split = SplitBatches(self.tables, batches, when=when, model=self.top)  # type: ignore[arg-type]
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._steps = self._train()

    def _train(self) -> Iterator[None]:
        start = time.perf_counter()
        for parts in self.split:
            total = 0.0
            for part in parts:
                out = self.top(self.tables(part.batch["ids"]).flatten(1))[:, 0]
                loss = torch.nn.functional.binary_cross_entropy_with_logits(out, part.batch["label"]) * part.share
                loss.backward()
                total += loss.item()
            self.tables.step()
            self.dense.step()
            self.dense.zero_grad()
            self.losses.append(total)
            self.seconds.append(time.perf_counter() - start)
            yield
            start = time.perf_counter()

    def turn(self, steps: int) -> bool:
        return sum(1 for _ in itertools.islice(self._steps, steps)) == steps

    def close(self) -> None:
        self._steps.close()
        self.tables.close()


def point(where: str, folder: Path, width: int, popular: float, steps: int) -> dict[str, Any]:
    latency = None if where == "file" else float(where.split()[1]) / 1e3

    def tier(name: str) -> Any:
        return File(folder / name) if latency is None else Remote(shards=1, latency=latency)

    batches = batches_of(steps, popular)
    auto = Way(tier("auto"), batches_of(max(steps, 30), popular), width, ahead=0, when="auto")
    while auto.turn(10):
        pass
    measured, pays = auto.split._choice.measured, auto.split._choice.pays
    auto.close()
    assert measured, "a trial is over after less than thirty batches"
    ways = {
        "base": Way(tier("base"), batches, width, ahead=0, when="never"),
        "split": Way(tier("split"), batches, width, ahead=0, when="always"),
        "prefetch": Way(tier("prefetch"), batches, width, ahead=1, when="never"),
    }
    turn = 0
    while all([way.turn(5) for way in list(ways.values())[:: 1 if turn % 2 else -1]]):  # noqa: C419  all take turns
        turn += 1
    assert ways["base"].losses == ways["prefetch"].losses
    np.testing.assert_allclose(ways["base"].losses, ways["split"].losses, rtol=1e-3)
    step = {name: statistics.median(way.seconds[5:]) for name, way in ways.items()}
    split = ways["split"].split
    hidden = 1 - split.waited / split.gathered if split.gathered else 0.0
    for way in ways.values():
        way.close()
    gain = step["base"] / step["split"]
    return {
        "rows below": where, "width": width, "popular share": measured["popular"],
        **{f"{name} ms": 1e3 * value for name, value in step.items()},
        **{f"{name} ms, in the trial": 1e3 * measured[name] for name in ("whole", "split", "gather")},
        "split over base": gain, "split over prefetch": step["prefetch"] / step["split"], "gathering hidden": hidden,
        "sign as foretold": bool(pays == (gain > 1) or abs(gain - 1) < TIE), "a tie": abs(gain - 1) < TIE,
    }  # fmt: skip


def dispatcher() -> float:
    """Return millions of ids per second that one core sorts into popular and rest; all samples are looked through."""
    rows = np.random.default_rng(0).integers(0, 1 << 25, 26 * 2048)
    flags = np.ones(1 << 25, np.uint8)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        split_batch(rows, None, 26, flags)
        times.append(time.perf_counter() - start)
    return len(rows) / statistics.median(times) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--quick", action="store_true", help="few points, on disk alone: whether it runs")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    wheres = ["file"] if args.quick else ["file", "remote 1", "remote 5", "remote 20"]
    widths, shares = ([64, 512], [0.5]) if args.quick else ([64, 512, 1536], [0.1, 0.5, 0.9])
    rate = dispatcher()
    print(f"dispatcher: {rate:.0f} M ids/s")
    points = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for k, (where, width, popular) in enumerate(itertools.product(wheres, widths, shares)):
            found = point(where, Path(folder) / str(k), width, popular, 30 if args.quick else args.steps)
            points.append(found)
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}, flush=True)
    right = statistics.mean(found["sign as foretold"] for found in points)
    print(f"the sign was as foretold in {right:.0%} of {len(points)} points")
    if args.out:
        results = {"points": points, "sign as foretold": right, "dispatcher, M ids/s": rate}
        about = {"command": "python " + " ".join(sys.argv), "machine": machine()}
        write_document(args.out, "benchmark", 1, {**about, "results": results})
    if not args.quick and (right < 0.9 or rate < 20):
        sys.exit(1)


if __name__ == "__main__":
    main()
