"""Forward + backward + update of 26 tables x 200,000 rows x 16 (workload W3), side by side in one run.

Arms: ours, nn.EmbeddingBag(sparse=True) with torch.optim, and FBGEMM's table-batched embeddings where installed
(`nox -s fbgemm` makes an environment with it). The arms take turns on the same batches; medians and ratios are
printed, and the ratio to a floor of memory traffic that is measured in the same process.

    python benchmarks/embeddings/optimizer.py --out benchmarks/results/optimizer.json
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
import warnings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch

from vitalfew.embeddings import SGD, Adagrad, EmbeddingBags, LazyAdam, RowwiseAdagrad, Table, TorchBags
from vitalfew.meter import machine

TABLES, ROWS, DIM, BATCH, UNIQUE = 26, 200_000, 16, 2048, 32_700
RULES = {
    "sgd": SGD(lr=0.01),
    "adagrad": Adagrad(lr=0.01),
    "rowwise_adagrad": RowwiseAdagrad(lr=0.01),
    "adam": LazyAdam(lr=0.001),
}


def draw(num: int, seed: int) -> list[np.ndarray]:
    """Draw batches by a power law whose exponent gives about the spec's number of distinct rows per batch."""
    rng = np.random.default_rng(seed)
    low, high = 0.3, 2.0
    for _ in range(20):
        s = (low + high) / 2
        cumulative = np.cumsum(np.arange(1.0, ROWS + 1) ** -s)
        cumulative /= cumulative[-1]
        trial = np.searchsorted(cumulative, rng.random((BATCH, 4)))
        distinct = sum(len(np.unique(trial[:, f])) for f in range(4)) * TABLES / 4
        low, high = (s, high) if distinct > UNIQUE else (low, s)
    scatter = [rng.permutation(ROWS) for _ in range(TABLES)]
    draws = (np.minimum(np.searchsorted(cumulative, rng.random((BATCH, TABLES))), ROWS - 1) for _ in range(num))
    return [np.stack([scatter[f][d[:, f]] for f in range(TABLES)], axis=1) for d in draws]


def traffic_floor(distinct: int, lookups: int, state: int) -> float:
    """Seconds to move the least bytes once, at the speeds measured here: random rows, and a stream copy.

    Forward: read each distinct row, write every output. Backward: read every gradient, and read and write each row and
    its state, counted once each. A row and a state take a 64-byte line at a random place; the rest streams.
    """
    rng = np.random.default_rng(0)
    source = torch.from_numpy(rng.random((TABLES * ROWS, DIM), dtype=np.float32))
    out = torch.empty(distinct, DIM)
    a, b = torch.empty(2_000_000), torch.empty(2_000_000)
    random_row, stream = [], []
    for _ in range(30):
        places = torch.from_numpy(rng.integers(0, len(source), distinct))  # new ones: not in any cache
        start = time.perf_counter()
        torch.index_select(source, 0, places, out=out)
        random_row.append((time.perf_counter() - start) / distinct)
        start = time.perf_counter()
        b.copy_(a)
        stream.append((time.perf_counter() - start) / (2 * 4 * len(a)))
    row, byte = min(random_row), min(stream)
    return distinct * (2 + state) * row + 2 * lookups * DIM * 4 * byte


def torch_arm(rule: str, tables: list[Table]):
    model = TorchBags(tables)
    optimizer = model.optimizer(RULES[rule])

    def step(ids, _indices, _offsets, grad):
        optimizer.zero_grad()
        model(ids).backward(grad)
        optimizer.step()

    return step, None


def our_arm(rule: str, tables: list[Table]):
    model = EmbeddingBags(tables, RULES[rule])

    def step(ids, _indices, _offsets, grad):
        model(ids).backward(grad)

    return step, model


def fbgemm_arm(rule: str, tables: list[Table]):
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    kind = {
        "sgd": EmbOptimType.EXACT_SGD,
        "adagrad": EmbOptimType.EXACT_ADAGRAD,
        "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    }[rule]
    settings = RULES[rule]
    model = SplitTableBatchedEmbeddingBagsCodegen(
        [(t.num_rows, t.dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for t in tables],
        optimizer=kind, learning_rate=settings.lr, eps=getattr(settings, "eps", 1e-8), pooling_mode=PoolingMode.SUM,
    )  # fmt: skip

    def step(_ids, indices, offsets, grad):
        model(indices, offsets).backward(grad.reshape(grad.shape[0], -1))

    return step, model


def agreement(tables: list[Table], inputs: list, grad: torch.Tensor) -> dict[str, float]:
    """Return how far five steps of ours end from FBGEMM's, and from plain float64 arithmetic."""
    step, theirs = fbgemm_arm("rowwise_adagrad", tables)
    mine_step, mine = our_arm("rowwise_adagrad", tables)
    weights = theirs.split_embedding_weights()
    for t, weight in zip(tables, weights, strict=True):
        weight.data.copy_(mine.rows_of(t.name))
    wide = [mine.rows_of(t.name).double().clone() for t in tables]
    sums = [torch.zeros(ROWS, dtype=torch.float64) for _ in tables]
    for ids, indices, offsets in inputs[:5]:
        step(ids, indices, offsets, grad)
        mine_step(ids, indices, offsets, grad)
        for f in range(TABLES):
            g = torch.zeros(ROWS, DIM, dtype=torch.float64).index_add_(0, ids[:, f], grad[:, f].double())
            sums[f] += (g * g).mean(1)
            touched = g.abs().sum(1) > 0
            wide[f][touched] -= 0.01 * g[touched] / (sums[f][touched].sqrt().unsqueeze(1) + 1e-8)
    ours = [mine.rows_of(t.name) for t in tables]
    return {
        "to_fbgemm": max(float((a - b).abs().max()) for a, b in zip(ours, weights, strict=True)),
        "to_float64": max(float((a.double() - b).abs().max()) for a, b in zip(ours, wide, strict=True)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    has_fbgemm = importlib.util.find_spec("fbgemm_gpu") is not None
    if has_fbgemm:
        import fbgemm_gpu  # noqa: F401

    tables = [Table(f"t{f}", ROWS, DIM) for f in range(TABLES)]
    batches = draw(10, seed=1)
    inputs = []
    for ids in batches:
        features_first = torch.from_numpy(np.ascontiguousarray(ids.T).reshape(-1))
        inputs.append((torch.from_numpy(ids), features_first, torch.arange(TABLES * BATCH + 1)))
    distinct = int(np.mean([sum(len(np.unique(ids[:, f])) for f in range(TABLES)) for ids in batches]))
    grad = torch.randn(BATCH, TABLES, DIM) * 0.01
    state = {"sgd": 0, "rowwise_adagrad": 1, "adagrad": 1, "adam": 2}  # cache lines per row, 64 bytes like the row
    print(f"W3: {TABLES} x {ROWS:,} x {DIM}, batch {BATCH}: {TABLES * BATCH:,} lookups, {distinct:,} distinct rows")
    waiting = {name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    print(f"{torch.get_num_threads()} threads, {waiting}")

    figures = []
    agree = None
    for rule in RULES:
        arms = {"ours": our_arm(rule, tables)[0]}
        if rule != "rowwise_adagrad":
            arms["torch sparse"] = torch_arm(rule, tables)[0]
        if has_fbgemm and rule != "adam":
            arms["fbgemm"] = fbgemm_arm(rule, tables)[0]
        times: dict[str, list[float]] = {name: [] for name in arms}
        slow = {"torch sparse": 4} if rule in ("adagrad", "adam") else {}
        for turn in range(args.steps):
            for name, step in arms.items():
                if turn % slow.get(name, 1):
                    continue
                ids, indices, offsets = inputs[turn % len(inputs)]
                start = time.perf_counter()
                step(ids, indices, offsets, grad)
                if turn >= 2:
                    times[name].append(time.perf_counter() - start)
        floor = traffic_floor(distinct, TABLES * BATCH, state[rule])
        median = {name: float(np.median(values)) for name, values in times.items()}
        least = {name: float(np.min(values)) for name, values in times.items()}
        for name in arms:
            ratio = median[name] / median["ours"]
            figures.append(
                {
                    "rule": rule,
                    "arm": name,
                    "median_ms": median[name] * 1e3,
                    "min_ms": least[name] * 1e3,
                    "times_ours": ratio,
                    "times_floor": least[name] / floor,
                    "floor_ms": floor * 1e3,
                }
            )
            print(
                f"{rule:16} {name:13} median {median[name] * 1e3:8.2f} ms  min {least[name] * 1e3:8.2f} ms  "
                f"{ratio:6.1f}x ours  {least[name] / floor:6.1f}x floor of {floor * 1e3:.2f} ms"
            )

    if has_fbgemm:
        agree = agreement(tables, inputs, grad)
        print(
            f"weights after 5 steps of rowwise Adagrad: max difference to FBGEMM {agree['to_fbgemm']:.1e}, "
            f"to float64 {agree['to_float64']:.1e}"
        )

    if args.out:
        from vitalfew.core.files import write_document

        write_document(
            args.out,
            "benchmark",
            1,
            {
                "name": "optimizer",
                "command": "python " + " ".join(sys.argv),
                "machine": machine(),
                "distinct_rows": distinct,
                "figures": figures,
                "agreement": agree,
            },
        )
    want = {("sgd", "torch sparse"): 10, ("adagrad", "torch sparse"): 50, ("rowwise_adagrad", "fbgemm"): 5}
    missed = [
        f"{f['rule']} against {f['arm']}: {f['times_ours']:.1f}x, wanted {want[f['rule'], f['arm']]}x"
        for f in figures
        if f["times_ours"] < want.get((f["rule"], f["arm"]), 0)
    ]
    print("\n".join(missed) or "every wanted ratio is met")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
