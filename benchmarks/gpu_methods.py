"""Rows beyond a GPU's memory, and what each method makes of them: the same samples, side by side in one run.

    cpu     rows in main memory, pooled and updated by the CPU, the papers' baseline; bags and gradients are copied
    fetch   a share of the rows on the GPU; what a batch lacks is fetched when its turn comes, least recently used leave
    ahead   the same share; `Prefetch` under the `LookAhead` policy
    hot     the same share; `HotRows` in phases, the hot rows stay (`Static`), each phase read ahead by `Prefetch`
    split   the same share; `SplitBatches`, which computes a batch's popular samples while rows for the others come
    stale   as ahead, and `SkipStale` leaves out the updates of rows that hardly move

All train the same DLRM by row-wise Adagrad on the same samples, from the same rows and weights: first an epoch without
a clock, in which code is compiled and rows begin, then one with it. Rounds are interleaved. hot has another order of
samples, split sums dense gradients in parts, and stale leaves updates out, so that the loss on held-back samples stands
beside each time; cpu, fetch and ahead must agree.

    python benchmarks/gpu_methods.py --out benchmarks/results/gpu_methods.json
    python benchmarks/gpu_methods.py --dry      # the whole script in seconds, on the CPU in place of a GPU
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vitalfew.core.files import write_document
from vitalfew.embeddings import DLRM, EmbeddingBags, Prefetch, RowwiseAdagrad, Table, TieredEmbeddings
from vitalfew.embeddings.hot import HotRows
from vitalfew.embeddings.split import SplitBatches
from vitalfew.embeddings.stale import SkipStale
from vitalfew.meter import machine
from vitalfew.tiers import LRU, Dram, Hbm, LookAhead, Policy, Static

RULE = RowwiseAdagrad(lr=0.02)
DENSE = 13
Batch = dict[str, Tensor]


# -- the samples


class Log:
    """Samples whose ids follow a power law in each table, and whose labels depend on their ids."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.rows = int(args.gib * 2**30) // (4 * args.dim + 4) // args.tables
        rng = np.random.default_rng(1)
        num = args.steps * args.batch + args.batch // 2  # the last batch is a partial one
        held = 4 * args.batch
        power = 1 - args.exponent
        ids = np.empty((num + held, args.tables), np.int64)
        signal = np.zeros(num + held, np.float32)
        step = int(self.rows * 0.618) | 1
        for t in range(args.tables):
            rank = (((self.rows**power - 1) * rng.random(len(ids)) + 1) ** (1 / power)).astype(np.int64) - 1
            ids[:, t] = rank.clip(0, self.rows - 1) * step % self.rows  # popular rows lie far apart
            signal += rng.standard_normal(65_536).astype(np.float32)[ids[:, t] % 65_536]
        label = rng.random(len(ids)) < 1 / (1 + np.exp(1 - 2 * signal / np.sqrt(args.tables)))
        dense = rng.standard_normal((len(ids), DENSE)).astype(np.float32)
        whole = {"ids": ids, "dense": dense, "label": label.astype(np.float32)}
        self.train = {name: torch.from_numpy(array[:num]) for name, array in whole.items()}
        self.held = [
            {name: torch.from_numpy(array[start : start + args.batch]) for name, array in whole.items()}
            for start in range(num, num + held, args.batch)
        ]
        self.batch, self.num = args.batch, num
        gids = (ids[:num] + np.arange(args.tables) * self.rows).reshape(-1)
        self.touched = int(np.count_nonzero(np.bincount(gids, minlength=args.tables * self.rows)))

    def take(self, numbers: np.ndarray) -> Batch:
        return {name: tensor[torch.from_numpy(numbers)] for name, tensor in self.train.items()}

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yield the batches of an epoch, shuffled."""
        order = np.random.default_rng([2, number]).permutation(self.num)
        for start in range(0, self.num, self.batch):
            yield self.take(order[start : start + self.batch])


# -- the arms


class Across(torch.autograd.Function):
    """Copies bags to the device and their gradients back, through page-locked memory."""

    @staticmethod
    def forward(ctx: Any, bags: Tensor, there: Tensor, back: Tensor, device: torch.device) -> Tensor:
        ctx.back = back[: len(bags)]
        return there[: len(bags)].copy_(bags).to(device, non_blocking=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back.copy_(grad), None, None, None


class Pooled:
    """Tables of the CPU, as a model on the device sees them."""

    def __init__(self, tables: EmbeddingBags, batch: int, device: torch.device) -> None:
        self.tables, self.device = tables, device
        self.features, self.dim = tables.features, tables.dim
        shape = (batch, len(tables.features), tables.dim)
        self._buffers = [torch.empty(shape, pin_memory=device.type == "cuda") for _ in range(2)]

    def __call__(self, ids: Tensor, offsets: Tensor | None = None) -> Tensor:
        return Across.apply(self.tables(ids, offsets), *self._buffers, self.device)


class Arm:
    """One method: tables, model, and how it goes through an epoch."""

    policy: Policy = LookAhead()
    update = "backward"
    ahead = 2

    def __init__(self, args: argparse.Namespace, log: Log) -> None:
        self.log, self.device = log, torch.device(args.device)
        self.tables = self.make([Table(f"t{t}", log.rows, args.dim) for t in range(args.tables)], args)
        wide, tall = ((32,), (32,)) if args.dry else ((512, 256), (1024, 1024, 512, 256))
        self.model = DLRM(
            self.seen(args), dense_in=DENSE, bottom=(*wide, args.dim), top=(*tall, 1),
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        for part in self.model.children():
            if part is not self.tables:
                part.to(self.device)
        self.dense = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.05)

    def make(self, tables: list[Table], args: argparse.Namespace) -> EmbeddingBags:
        row = 4 * args.dim + 4 + 8
        rows = (int(args.share * self.log.touched) + 1) * row
        size = min(rows * 32 // 29, rows + 3 * 2**24) + 4 * row  # and the staging, which is a share of it up to a size
        return TieredEmbeddings(
            tables, RULE, tiers=[Hbm(size, args.device), Dram(1.0)], policy=self.policy, ahead=self.ahead,
            update=self.update, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    def seen(self, args: argparse.Namespace) -> Any:
        del args
        return self.tables

    def loss(self, batch: Batch) -> Tensor:
        dense, label = (batch[name].to(self.device, non_blocking=True) for name in ("dense", "label"))
        return functional.binary_cross_entropy_with_logits(self.model(dense, batch["ids"]), label)

    def batches(self, epoch: int) -> Iterable[Batch]:
        return self.log.epoch(epoch)

    def train(self, epoch: int) -> None:
        for batch in self.batches(epoch):
            self.dense.zero_grad()
            self.loss(batch).backward()
            self.dense.step()

    def held_back(self) -> float:
        """Return the loss on samples that were not trained on."""
        with torch.no_grad():
            return float(np.mean([float(self.loss(batch)) for batch in self.log.held]))

    def moved(self) -> int:
        """Return the rows that have come and gone so far."""
        moves = self.tables.moves
        return int(moves.missed + moves.left - moves.clean)

    def about(self) -> str:
        return ""

    def __enter__(self) -> Arm:
        self._stack = ExitStack()
        if isinstance(self.tables, TieredEmbeddings):
            self._stack.enter_context(self.tables)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class OnCpu(Arm):
    """cpu."""

    def make(self, tables: list[Table], args: argparse.Namespace) -> EmbeddingBags:
        return EmbeddingBags(tables, RULE, generator=torch.Generator().manual_seed(0))

    def seen(self, args: argparse.Namespace) -> Pooled:
        return Pooled(self.tables, args.batch, self.device)

    def moved(self) -> int:
        return 0


class Fetch(Arm):
    """fetch."""

    policy = LRU()


class Ahead(Arm):
    """ahead."""

    def batches(self, epoch: int) -> Iterable[Batch]:
        with Prefetch(self.tables, self.log.epoch(epoch)) as batches:
            yield from batches


class Hot(Arm):
    """hot. Half of the fast memory is for hot rows, the rest for the batches that need others."""

    policy = Static()

    def __enter__(self) -> Arm:
        super().__enter__()
        self.hot = self._stack.enter_context(
            HotRows(self.tables, self.log.train["ids"], batch_size=self.log.batch, budget=self.tables.room.slots // 2)
        )
        return self

    def batches(self, epoch: int) -> Iterable[Batch]:
        for phase in self.hot.epoch(epoch):
            with Prefetch(self.tables, map(self.log.take, phase)) as batches:
                yield from batches

    def about(self) -> str:
        return f"{self.hot.share:.0%} of the samples are hot"


class Split(Arm):
    """split."""

    policy, update, ahead = LRU(), "step", 0

    def train(self, epoch: int) -> None:
        with SplitBatches(self.tables, self.log.epoch(epoch), when="always", model=self.model) as split:
            for parts in split:
                self.dense.zero_grad()
                for part in parts:
                    (self.loss(part.batch) * part.share).backward()
                self.tables.step()
                self.dense.step()
            self.popular = split.popular / max(split.samples, 1)

    def about(self) -> str:
        return f"{self.popular:.0%} of the samples are popular"


class Stale(Ahead):
    """stale."""

    def __enter__(self) -> Arm:
        super().__enter__()
        steps = -(-self.log.num // self.log.batch)
        settings = {"every": max(steps // 5, 2), "warm_up": steps // 2, "min_visits": 2}
        self.stale = self._stack.enter_context(SkipStale(self.tables, mode="rows", **settings))
        return self

    def about(self) -> str:
        counts = self.tables.counts
        return f"{counts.rows_frozen / max(counts.rows_frozen + counts.rows_updated, 1):.0%} of the updates left out"


ARMS: dict[str, Callable[[argparse.Namespace, Log], AbstractContextManager[Arm]]] = {
    "cpu": OnCpu, "fetch": Fetch, "ahead": Ahead, "hot": Hot, "split": Split, "stale": Stale,
}  # fmt: skip
SAME = ("cpu", "fetch", "ahead")


# -- the run


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8.0, help="size of all tables and their state")
    parser.add_argument("--share", type=float, default=0.25, help="of the rows that occur, in the GPU's memory")
    parser.add_argument("--tables", type=int, default=26)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--exponent", type=float, default=1.1, help="of the power law, other than 1")
    parser.add_argument("--steps", type=int, default=60, help="per epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", default=",".join(ARMS), help="the first one is what the others are compared with")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dry", action="store_true", help="a trial of the script, without a GPU")
    parser.add_argument("--out")
    if "--dry" in sys.argv:
        parser.set_defaults(
            device="cpu", gib=0.001, share=0.5, tables=4, dim=16, batch=64, steps=12, rounds=1, exponent=1.5
        )
    args = parser.parse_args()
    if unknown := set(args.arms.split(",")) - set(ARMS):
        parser.error(f"there are no arms {sorted(unknown)}; choose among {', '.join(ARMS)}")
    return args


def main() -> int:
    args = options()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("there is no GPU here; nothing was measured (--dry tries the script out)")
        return 0
    torch.set_float32_matmul_precision("high")
    log = Log(args)
    steps = -(-log.num // log.batch)
    print(
        f"{args.tables} tables, {args.tables * log.rows:,} rows of {args.dim}; {log.num:,} samples touch "
        f"{log.touched:,} of them, {args.share:.0%} of these fit the GPU; {steps} steps of {args.batch}"
    )
    names = args.arms.split(",")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, list[float]] = {name: [] for name in names}
    about, moved = dict.fromkeys(names, ""), dict.fromkeys(names, 0.0)
    for _ in range(args.rounds):
        for name in names:
            with ARMS[name](args, log) as arm:
                arm.train(0)
                before = arm.moved()
                wait(arm.device)
                start = time.perf_counter()
                arm.train(1)
                wait(arm.device)
                seconds[name].append(time.perf_counter() - start)
                moved[name] = (arm.moved() - before) / steps
                losses[name].append(arm.held_back())
                about[name] = arm.about()

    median = {name: float(np.median(values)) / steps for name, values in seconds.items()}
    figures, wrong = [], []
    for name in names:
        ratios = {other: median[other] / median[name] for other in names}
        loss = float(np.median(losses[name]))
        figures.append(
            {
                "arm": name,
                "median_ms": 1e3 * median[name],
                "rounds_ms": [1e3 * each / steps for each in seconds[name]],
                "times_faster_than": ratios,
                "rows_moved_per_step": moved[name],
                "held_back_loss": loss,
                "about": about[name],
            }
        )
        print(
            f"{name:6} {1e3 * median[name]:9.2f} ms  "
            + "  ".join(f"{ratio:5.2f}x {other}" for other, ratio in ratios.items())
            + f"  {moved[name]:10,.0f} rows moved  loss {loss:.4f}  {about[name]}"
        )
        reference = float(np.median(losses[names[0]]))
        if not np.isfinite(loss) or (name in SAME and names[0] in SAME and abs(loss / reference - 1) > 1e-3):
            wrong.append(f"{name} has a loss of {loss:.6f}, {names[0]} of {reference:.6f}")
    if args.out:
        write_document(
            args.out,
            "benchmark",
            1,
            {
                "name": "gpu_methods",
                "command": "python " + " ".join(sys.argv),
                "machine": machine(),
                "settings": {name: value for name, value in vars(args).items() if name != "out"},
                "rows": args.tables * log.rows,
                "rows_touched": log.touched,
                "samples": log.num,
                "figures": figures,
            },
        )
    print("\n".join(wrong) or "cpu, fetch and ahead have trained the same")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
