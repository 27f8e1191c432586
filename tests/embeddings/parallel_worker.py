"""One worker of a job that `test_parallel` starts: runs the cases it is told to, and writes what it found.

python parallel_worker.py FOLDER CASE...        with RANK and WORLD_SIZE in the environment, as torchrun sets them
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from vitalfew.core import VitalfewError
from vitalfew.embeddings import DLRM, SGD, Adagrad, EmbeddingBags, LazyAdam, Optimizer, RowwiseAdagrad, Table, _previous
from vitalfew.embeddings.parallel import ShardedEmbeddings, sum_gradients
from vitalfew.embeddings.parallel_ahead import ShardedPrefetch
from vitalfew.tiers import LRU, Chaos, Dram, File

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
FOLDER = Path(sys.argv[1])
DIM = 4
TABLES = [Table("user", 50, DIM), Table("item", 31, DIM)]
JAGGED = [Table("word", 60, DIM, features=("title", "text")), Table("tag", 23, DIM, pooling="mean")]
RULES = [SGD(0.1, weight_decay=0.01), RowwiseAdagrad(0.1), Adagrad(0.1), LazyAdam(0.1)]
SIZES = [9, 7, 9, 1, 9, 8, 9, 9, 2]
"""Samples of the batches: some leave workers with nothing, and the last one is small."""

Batch = dict[str, Tensor]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def share(samples: int, rank: int = RANK) -> range:
    """Return the slice of a batch that a worker trains on."""
    edges = [samples * k // WORLD for k in range(WORLD + 1)]
    return range(edges[rank], edges[rank + 1])


def batches(seed: int = 0) -> list[Tensor]:
    draw = np.random.default_rng(seed)
    return [torch.from_numpy(np.column_stack([draw.zipf(1.3, n) % table.num_rows for table in TABLES])) for n in SIZES]


def bags(seed: int = 0) -> list[list[tuple[list[int], list[float]]]]:
    """Return batches of samples; a sample is its ids by feature, and a weight for each id."""
    draw = np.random.default_rng(seed)
    out = []
    for n in SIZES:
        samples = []
        for _ in range(n):
            parts = [(draw.zipf(1.3, draw.integers(0, 5)) % rows).tolist() for rows in (60, 60, 23)]
            samples.append((parts, draw.normal(size=sum(map(len, parts))).tolist()))
        out.append(samples)
    return out


def jagged(samples: list[Any]) -> Batch:
    parts = [part for sample in samples for part in sample[0]]
    return {
        "ids": torch.tensor([i for part in parts for i in part], dtype=torch.int64),
        "offsets": torch.tensor(np.cumsum([0, *map(len, parts)])),
        "weights": torch.tensor([x for sample in samples for x in sample[1]], dtype=torch.float32),
    }


def loss(out: Tensor, first: int, samples: int) -> Tensor:
    """Depend on each sample alone, so that the gradient of its bags is the same whoever computes it."""
    number = torch.arange(first, first + len(out)).reshape(-1, 1, 1)
    return (out * torch.linspace(-1, 1, DIM) * (number % 3 + 1)).sum() / samples


def alone(tables: list[Table], rule: Optimizer, **settings: Any) -> EmbeddingBags:
    """Make the tables of one process; in this one they may train although there are others."""
    one = EmbeddingBags(tables, rule, generator=generator(), **settings)
    one.rows._check_workers = lambda: None  # type: ignore[method-assign]
    return one


def train(tables: ShardedEmbeddings, whole: list[Tensor], **settings: Any) -> ShardedPrefetch[Batch]:
    loader = [{"ids": batch[list(share(len(batch)))]} for batch in whole]
    with ShardedPrefetch(tables, loader, **settings) as ahead:
        for batch, every in zip(ahead, whole, strict=True):
            assert ahead.samples == len(every)
            loss(tables(batch["ids"]), share(len(every)).start, ahead.samples).backward()
    return ahead


def train_alone(one: EmbeddingBags, whole: list[Tensor]) -> EmbeddingBags:
    for batch in whole:
        loss(one(batch), 0, len(batch)).backward()
    return one


def same(tables: ShardedEmbeddings, one: EmbeddingBags) -> bool:
    found = tables.columns(0, tables.num_rows)
    return all(torch.equal(found[name], t) for name, t in {"weight": one.weight, **one.rows.state}.items())


def difference(tables: ShardedEmbeddings, one: EmbeddingBags) -> float:
    """Return the largest difference over the largest value."""
    found = tables.columns(0, tables.num_rows)["weight"]
    return float((found - one.weight).abs().max() / one.weight.abs().max())


def close_to(value: float) -> bool:
    return value <= 1e-6


def sharded(case: str, tables: list[Table], rule: Optimizer, slots: int = 40, **settings: Any) -> ShardedEmbeddings:
    tiers = settings.pop("tiers", [Dram(slots), File(FOLDER / f"{case}-{RANK}")])
    return ShardedEmbeddings(
        tables, rule, tiers=tiers, generator=settings.pop("generator", generator()), timeout=30, **settings
    )


# -- cases: each yields what it found by name


def rules() -> Iterator[tuple[str, Any]]:
    for rule in RULES:
        one = train_alone(alone(TABLES, rule), batches())
        for overlap in (True, False):
            with sharded(f"{rule.name}-{overlap}", TABLES, rule) as tables:
                train(tables, batches(), overlap=overlap)
                yield f"{rule.name} overlap {overlap}", same(tables, one)
                yield f"{rule.name} overlap {overlap} steps", tables.counts.steps == one.counts.steps
        with sharded(f"{rule.name}-sums", TABLES, rule, exact=False) as tables:
            train(tables, batches())
            yield f"{rule.name} sums", close_to(difference(tables, one))


def places() -> Iterator[tuple[str, Any]]:
    one = train_alone(alone(TABLES, Adagrad(0.1)), batches())
    for name, tiers, policy in (
        ("memory alone", [Dram(1.0)], None),
        ("bytes", [Dram("16 MiB"), File(FOLDER / f"bytes-{RANK}")], None),
        ("two memories", [Dram(24), Dram(10), File(FOLDER / f"two-{RANK}")], LRU()),
        ("chaos", [Dram(24), File(FOLDER / f"chaos-{RANK}")], Chaos(seed=5)),
    ):
        with sharded(name, TABLES, Adagrad(0.1), tiers=tiers, policy=policy) as tables:
            train(tables, batches())
            yield name, same(tables, one)
            tables.owner.store.check()


def half() -> Iterator[tuple[str, Any]]:
    for dtype in (torch.bfloat16, torch.float16):
        one = train_alone(alone(TABLES, RowwiseAdagrad(0.1), dtype=dtype), batches())
        with sharded(f"half-{dtype}", TABLES, RowwiseAdagrad(0.1), dtype=dtype) as tables:
            train(tables, batches())
            yield str(dtype), same(tables, one)


def bag_case() -> Iterator[tuple[str, Any]]:
    one = alone(JAGGED, Adagrad(0.1))
    for samples in bags():
        whole = jagged(samples)
        loss(one(whole["ids"], whole["offsets"], whole["weights"]), 0, len(samples)).backward()
    for exact in (True, False):
        with sharded(f"bags-{exact}", JAGGED, Adagrad(0.1), slots=60, exact=exact) as tables:
            loader = [jagged([samples[i] for i in share(len(samples))]) for samples in bags()]
            with ShardedPrefetch(tables, loader) as ahead:
                for batch, samples in zip(ahead, bags(), strict=True):
                    out = tables(batch["ids"], batch["offsets"], batch["weights"])
                    loss(out, share(len(samples)).start, ahead.samples).backward()
            yield f"exact {exact}", same(tables, one) if exact else close_to(difference(tables, one))


def dlrm() -> Iterator[tuple[str, Any]]:
    def model(tables: EmbeddingBags) -> DLRM:
        return DLRM(tables, dense_in=2, bottom=(8, DIM), top=(8, 1), generator=generator())

    def step(net: DLRM, x: Tensor, ids: Tensor, y: Tensor, samples: int) -> None:
        out = net(x, ids).reshape(-1)
        (torch.nn.functional.binary_cross_entropy_with_logits(out, y, reduction="sum") / samples).backward()

    draw = torch.Generator().manual_seed(1)
    data = [(torch.randn(len(b), 2, generator=draw), b, (b[:, 0] % 2).float()) for b in batches()]
    one = model(alone(TABLES, RowwiseAdagrad(0.05)))
    rule = torch.optim.SGD(one.parameters(), 0.05)
    for x, ids, y in data:
        rule.zero_grad()
        step(one, x, ids, y, len(ids))
        rule.step()
    with sharded("dlrm", TABLES, RowwiseAdagrad(0.05)) as tables:
        net = model(tables)
        rule = torch.optim.SGD(net.parameters(), 0.05)
        loader = [[part[list(share(len(part)))] for part in batch] for batch in data]
        with ShardedPrefetch(tables, loader, ids=lambda batch: batch[1]) as ahead:
            for x, ids, y in ahead:
                rule.zero_grad()
                if len(ids):
                    step(net, x, ids, y, ahead.samples)
                else:
                    ahead.skip()
                sum_gradients(net.parameters())
                rule.step()
        yield "rows", close_to(difference(tables, one.tables))
        dense = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
        reference = torch.cat([p.detach().reshape(-1) for p in one.parameters()])
        yield "dense", close_to(float((dense - reference).abs().max() / reference.abs().max()))
        everyone = [torch.empty_like(dense) for _ in range(WORLD)]
        dist.all_gather(everyone, dense)
        yield "replicas", all(torch.equal(dense, other) for other in everyone)


def versions() -> Iterator[tuple[str, Any]]:
    """Each row has as many updates as batches that needed it; evaluation in the loop sees all of those before it."""
    whole, seen = batches(), np.zeros(81, np.int64)
    one = alone(TABLES, SGD(0.1))
    with sharded("versions", TABLES, SGD(0.1)) as tables:
        loader = [{"ids": batch[list(share(len(batch)))]} for batch in whole]
        with ShardedPrefetch(tables, loader) as ahead:
            right = True
            for batch, every in zip(ahead, whole, strict=True):
                loss(tables(batch["ids"]), share(len(every)).start, ahead.samples).backward()
                train_alone(one, [every])
                seen[np.unique(every.numpy() + np.array([0, 50]))] += 1
                with torch.no_grad():
                    some = whole[0] if RANK else whole[0][:0]
                    right &= torch.equal(tables(some), one(some))
                right &= bool((tables.columns(0, 81)["stats"][:, 0].numpy() == seen).all())
        yield "evaluated", right
        mine = sum(len(np.unique(b.numpy() + np.array([0, 50]))) for b in whole)
        counts = torch.tensor([tables.counts.rows_updated])
        dist.all_reduce(counts)
        yield "updates", int(counts) == mine
        yield "rows_of", torch.equal(tables.rows_of("item", [30, 2, 2]), one.rows_of("item")[[30, 2, 2]])
        yield "no gradients wait", "rank" in str(ahead.receipt().to_dict())
        classes = ahead.wire
        yield "classes", all(getattr(classes, name) > 0 for name in type(classes).__dataclass_fields__)


def leaving() -> Iterator[tuple[str, Any]]:
    """A loop that all leave early, then one that goes on; a schedule of rates; batches without a backward."""
    whole = batches()
    one = alone(TABLES, Adagrad(0.1))
    with sharded("leaving", TABLES, Adagrad(0.1)) as tables:
        for skip in (4, len(whole)):
            loader = [{"ids": batch[list(share(len(batch)))]} for batch in whole]
            with ShardedPrefetch(tables, iter(loader)) as ahead:
                for i, (batch, every) in enumerate(zip(ahead, whole, strict=False)):
                    if i == skip:
                        break
                    one.lr = tables.lr = 0.1 / (i + 1)
                    if i == 2 or not len(batch["ids"]):
                        continue
                    loss(tables(batch["ids"]), share(len(every)).start, ahead.samples).backward()
            for i, every in enumerate(whole[:skip]):
                one.lr = 0.1 / (i + 1)
                if i != 2:
                    train_alone(one, [every])
        yield "same", same(tables, one)
        yield "steps", tables.counts.steps == one.counts.steps


def refuses() -> Iterator[tuple[str, Any]]:
    """What is wrong in one worker is said in all of them; afterwards they can go on."""

    def message(act: Callable[[], Any]) -> str:
        try:
            act()
        except (VitalfewError, ZeroDivisionError) as error:
            return str(error)
        return "nothing"

    with sharded("refuses", TABLES, SGD(0.1)) as tables:
        whole = batches()
        yield "no loop", message(lambda: tables(whole[0]))
        loader = [{"ids": whole[0]}] * (2 if RANK else 3)
        yield "lengths", message(lambda: list(ShardedPrefetch(tables, loader)))

        def breaks() -> Iterator[Batch]:
            yield {"ids": whole[0]}
            if RANK == WORLD - 1:
                raise ZeroDivisionError("of mine")
            yield {"ids": whole[0]}

        yield "loader", message(lambda: list(ShardedPrefetch(tables, breaks())))
        before = tables.columns(0, 81)["weight"]
        with ShardedPrefetch(tables, [{"ids": whole[0]}] * 2) as ahead:
            for i, batch in enumerate(ahead):
                out = tables(batch["ids"])
                factor = float("nan") if RANK == 1 and i == 0 else 0.0
                said = message((out * factor).sum().backward)
                if i == 0:
                    yield "nan", said
                    again = tables(batch["ids"]).sum()
                    yield "twice", message(again.backward)
                    yield "others", message(lambda: tables(torch.tensor([[49, 30]])))
        yield "nothing changed", torch.equal(before, tables.columns(0, 81)["weight"])
    one = EmbeddingBags(TABLES, SGD(0.1))
    yield "plain", message(lambda: one(whole[0]))
    yield "differs", message(lambda: sharded("differs", TABLES, SGD(0.1 * (RANK + 1))))


def small() -> Iterator[tuple[str, Any]]:
    with sharded("small", TABLES, SGD(0.1), slots=4) as tables:
        train(tables, batches())
    yield "trained", True


def resumes() -> Iterator[tuple[str, Any]]:
    """Commit in mid-epoch, close, open again, and go on: as if nothing had been."""
    whole, rule = batches() + batches(1), LazyAdam(0.1)
    with sharded("resumes", TABLES, rule) as tables:
        loader = [{"ids": batch[list(share(len(batch)))]} for batch in whole]
        with ShardedPrefetch(tables, loader) as ahead:
            for i, (batch, every) in enumerate(zip(ahead, whole, strict=False)):
                if i == 5:
                    tables.commit({"batch": i})
                if i == 8:
                    break
                loss(tables(batch["ids"]), share(len(every)).start, ahead.samples).backward()
    with sharded("resumes", TABLES, LazyAdam(7.0), resume=True, generator=None) as tables:
        yield "note", tables.note == {"batch": 5}
        train(tables, whole[5:])
        yield "same", same(tables, train_alone(alone(TABLES, rule), whole))


def torn() -> Iterator[tuple[str, Any]]:
    """The last worker is killed while it commits, after others have done so."""
    tables = sharded("torn", TABLES, Adagrad(0.1))
    train(tables, batches())
    tables.commit({"batches": 9})
    train(tables, batches(1))
    if RANK == WORLD - 1:
        time.sleep(1)
        _previous.keep = lambda folder: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    tables.commit({"batches": 18})
    yield "committed", True


def mended() -> Iterator[tuple[str, Any]]:
    one = train_alone(alone(TABLES, Adagrad(0.1)), batches())
    with sharded("torn", TABLES, Adagrad(0.1), resume=True) as tables:
        yield "note", tables.note == {"batches": 9}
        yield "same", same(tables, one)
        train(tables, batches(1))
        yield "goes on", same(tables, train_alone(one, batches(1)))
        tables.commit()
    with sharded("torn", TABLES, Adagrad(0.1), resume=True) as tables:
        yield "again", same(tables, one)


def killed() -> Iterator[tuple[str, Any]]:
    with sharded("killed", TABLES, SGD(0.1)) as tables:
        loader = [{"ids": batch[list(share(len(batch)))]} for batch in batches() * 20]
        with ShardedPrefetch(tables, loader) as ahead:
            for i, batch in enumerate(ahead):
                if i == 17 and RANK == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                tables(batch["ids"]).sum().backward()
    yield "ended", True


def raises() -> Iterator[tuple[str, Any]]:
    """An error in the loop of one worker."""
    with sharded("raises", TABLES, SGD(0.1)) as tables, ShardedPrefetch(tables, [{"ids": batches()[0]}] * 50) as ahead:
        for i, batch in enumerate(ahead):
            if i == 17 and RANK == 1:
                raise ZeroDivisionError("of mine")
            tables(batch["ids"]).sum().backward()
    yield "ended", True


def hangs() -> Iterator[tuple[str, Any]]:
    """A worker that stops without dying counts as lost after the timeout."""
    tables = ShardedEmbeddings(TABLES, SGD(0.1), tiers=[Dram(81)], timeout=3)
    if RANK == 1:
        time.sleep(8)
        os._exit(0)
    train(tables, batches())
    yield "ended", True


def remote() -> Iterator[tuple[str, Any]]:
    from vitalfew.tiers import Remote

    one = train_alone(alone(TABLES, Adagrad(0.1)), batches())
    tiers = [Dram(24), Remote(shards=1, latency=0.002, folder=FOLDER / f"remote-{RANK}")]
    with sharded("remote", TABLES, Adagrad(0.1), tiers=tiers) as tables:
        train(tables, batches())
        yield "same", same(tables, one)
        tables.commit()
    with sharded("remote", TABLES, Adagrad(0.1), tiers=tiers, resume=True) as tables:
        yield "resumed", same(tables, one)


CASES = {
    case.__name__: case
    for case in (
        rules, places, half, bag_case, dlrm, versions, leaving, refuses, small, resumes, torn, mended, killed, raises,
        hangs, remote,
    )
}  # fmt: skip


def main() -> int:
    torch.set_num_threads(1)
    where = "env://" if "TORCHELASTIC_RUN_ID" in os.environ else f"file://{FOLDER}/store"
    dist.init_process_group("gloo", init_method=where, rank=RANK, world_size=WORLD)
    found: dict[str, Any] = {}
    start = time.perf_counter()
    try:
        for name in sys.argv[2:]:
            for what, value in CASES[name]():
                found[f"{name}: {what}"] = value
            dist.barrier()
    except VitalfewError as error:
        found["error"] = f"{type(error).__name__}: {error}"
    except ZeroDivisionError as error:
        found["error"] = repr(error)
    found["seconds"] = time.perf_counter() - start
    (FOLDER / f"{'-'.join(sys.argv[2:])}-{RANK}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit("error" in found)  # a group that has lost a member cannot be taken down in good order


if __name__ == "__main__":
    main()
