"""Random small trainings, run once with all rows in memory and once over tiers: the bits must be the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.tiers.shelf import Shelf
from vitalfew.embeddings import (
    SGD,
    Adagrad,
    EmbeddingBags,
    LazyAdam,
    Optimizer,
    RowwiseAdagrad,
    Table,
    TieredEmbeddings,
    clip_grad_norm,
)
from vitalfew.tiers import LFU, LRU, Belady, Chaos, Dram, File, LookAhead, Policy, Static

Batch = dict[str, Any]
KINDS = ("memory", "file", "ring file", "shelf", "ring shelf", "ring ring shelf")


@dataclass
class Case:
    """One training, drawn from a seed."""

    tables: list[Table]
    optimizer: Optimizer
    dtype: torch.dtype
    update: str
    policy: Policy
    ahead: int
    kind: str
    batches: list[Batch]
    every: int
    slots: int
    rings: list[int]
    seed: int
    shelf: Shelf = field(default_factory=Shelf)

    @classmethod
    def drawn(cls, seed: int, **fixed: Any) -> Case:
        dice = random.Random(seed)
        dim, names = dice.randint(1, 20), "abcd"[: dice.randint(1, 4)]
        tables = [
            Table(
                name, dice.randint(1, 30), dim, dice.choice(["sum", "mean"]),
                (name + "1", name + "2") if dice.random() < 0.3 else (),
            )
            for name in names
        ]  # fmt: skip
        decay = dice.choice([0.0, 0.01])
        rule = dice.choice([SGD, Adagrad, RowwiseAdagrad, LazyAdam])
        update, jagged, weighted = dice.choice(["backward", "step"]), dice.random() < 0.5, dice.random() < 0.3
        num_rows = sum(table.num_rows for table in tables)
        some = Static.of(dice.sample(range(num_rows), dice.randint(0, num_rows)))
        policies = [LRU(), LFU(dice.randint(1, 5)), LookAhead(dice.randint(1, 9), 3), LookAhead(), Belady(), some]
        case = cls(
            tables, rule(0.1, weight_decay=decay), dice.choice([torch.float32, torch.bfloat16, torch.float16]),
            update, dice.choice([*policies, Chaos(seed)]), dice.randint(0, 3), dice.choice(KINDS),
            [_batch(tables, dice, jagged, weighted) for _ in range(dice.randint(1, 12))],
            dice.randint(1, 3) if update == "step" else 1, 0, [], seed, Shelf(wanders=random.Random(seed)),
        )  # fmt: skip
        for name, value in fixed.items():
            assert hasattr(case, name)
            setattr(case, name, value)
        case.slots = max(1, case.least() + dice.choice([0, 0, 1, 5, num_rows]))
        case.rings = [dice.randint(1, 12) for _ in range(case.kind.count("ring"))]
        if case.kind == "memory" and isinstance(case.policy, Chaos):  # it would send rows to where there is nothing
            case.policy = LRU()
        return case

    def least(self) -> int:
        """Return the rows that one update needs at once: those of all batches between two steps."""
        rows = [self.rows_of(batch) for batch in self.batches]
        groups = [rows[k : k + self.every] for k in range(0, len(rows), self.every)]
        return max((len(set().union(*group)) for group in groups), default=0)

    def rows_of(self, batch: Batch) -> set[int]:
        return set(batch["rows"])

    @property
    def num_rows(self) -> int:
        return sum(table.num_rows for table in self.tables)

    def settings(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype, "update": self.update, "seed": 3,
            "generator": torch.Generator().manual_seed(self.seed),
        }  # fmt: skip

    def plain(self) -> EmbeddingBags:
        return EmbeddingBags(self.tables, self.optimizer, **self.settings())

    def tiered(self, folder: Path, **more: Any) -> TieredEmbeddings:
        last = {"memory": [], "file": [File(folder)], "shelf": [self.shelf]}[self.kind.split()[-1]]
        memory = Dram(self.num_rows if self.kind == "memory" else self.slots)
        return TieredEmbeddings(
            self.tables, self.optimizer, tiers=[memory, *map(Dram, self.rings), *last], policy=self.policy,
            ahead=self.ahead, **self.settings(), **more,
        )  # fmt: skip


def _batch(tables: list[Table], dice: random.Random, jagged: bool, weighted: bool) -> Batch:
    samples = dice.randint(0 if jagged else 1, 5)
    starts = [sum(t.num_rows for t in tables[:k]) for k in range(len(tables))]
    owners = [(start, t) for start, t in zip(starts, tables, strict=True) for _ in t.features or (t.name,)]
    ids, ends, rows = [], [0], []
    for _ in range(samples):
        for start, table in owners:
            for _ in range(dice.randint(0, 4) if jagged else 1):
                ids.append(int(dice.random() ** 3 * table.num_rows))
                rows.append(start + ids[-1])
            ends.append(len(ids))
    flat = torch.tensor(ids, dtype=torch.int64)
    return {
        "ids": flat if jagged else flat.reshape(-1, len(owners)),
        "offsets": torch.tensor(ends) if jagged else None,
        "weights": [dice.uniform(-1, 1) for _ in ids] if weighted else None,
        "rows": rows,
    }


def train(
    case: Case,
    tables: EmbeddingBags,
    loader: Iterable[Batch],
    *,
    first: int = 0,
    after: Callable[[int], None] = lambda k: None,
) -> list[torch.Tensor]:
    """Train on the batches of a loader, of which the first has the number `first`; return all that a user can see."""
    seen = []
    for k, batch in enumerate(loader, first):
        weights = None
        if batch["weights"] is not None:
            weights = torch.tensor(batch["weights"], requires_grad=k % 2 == 0)
        out = tables(batch["ids"], batch["offsets"], weights)
        (torch.sin(out + k) * torch.linspace(-1, 2, out.numel()).to(out).reshape(out.shape)).sum().backward()
        seen.append(out.detach().to("cpu", copy=True))
        if weights is not None and weights.grad is not None:
            seen.append(weights.grad)
        if case.update == "step" and ((k + 1) % case.every == 0 or k + 1 == len(case.batches)):
            if k % 2:
                seen.append(torch.tensor(clip_grad_norm([], tables, 0.5)))
            tables.step()
            tables.zero_grad()
        if k % 3 == 0:
            with torch.no_grad():
                other = case.batches[(7 * k + 3) % len(case.batches)]
                seen.append(tables(other["ids"], other["offsets"]).cpu())
        if isinstance(tables, TieredEmbeddings):
            with tables.store.lock:
                tables.store.check()
        after(k)
    return seen


def same(plain: EmbeddingBags, tiered: TieredEmbeddings) -> None:
    """Compare weights, optimizer state and counts, bit for bit."""
    found = tiered.columns(0, plain.num_rows)
    for name, column in {"weight": plain.rows.weight, **plain.rows.state}.items():
        assert torch.equal(column, found[name]), name
    for table in plain.tables:
        assert torch.equal(plain.rows_of(table.name), tiered.rows_of(table.name))
    assert plain.rows.counts.steps == tiered.rows.counts.steps
    tiered.store.check()


def same_seen(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs)
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a, b), k
