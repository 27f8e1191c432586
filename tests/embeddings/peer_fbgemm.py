"""Five steps of row-wise Adagrad on 26 tables against FBGEMM's; run as a script where fbgemm_gpu is installed.

Prints the largest difference of weights and of state; exits with 1 if it is above 1e-6.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from vitalfew.embeddings import EmbeddingBags, RowwiseAdagrad, Table

TABLES, ROWS, DIM, SAMPLES, STEPS = 26, 2000, 16, 512, 5
LIMIT = 1e-6


def main() -> int:
    rule = RowwiseAdagrad(0.05, eps=1e-8)
    ours = EmbeddingBags(
        [Table(f"t{i}", ROWS, DIM) for i in range(TABLES)], rule, generator=torch.Generator().manual_seed(0)
    )
    peer = SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU)] * TABLES,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=rule.lr,
        eps=rule.eps,
    )
    for i, weight in enumerate(peer.split_embedding_weights()):
        weight.copy_(ours.rows_of(f"t{i}"))
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        sizes = rng.integers(0, 4, (SAMPLES, TABLES))
        ids = rng.zipf(1.2, sizes.sum()) % ROWS
        offsets = np.concatenate([[0], np.cumsum(sizes.reshape(-1))])
        target = torch.from_numpy(rng.standard_normal((SAMPLES, TABLES, DIM)).astype(np.float32))
        ours(torch.from_numpy(ids), torch.from_numpy(offsets)).backward(target)
        owner = np.repeat(np.tile(np.arange(TABLES), SAMPLES), sizes.reshape(-1))
        by_table = np.concatenate([ids[owner == t] for t in range(TABLES)])  # FBGEMM: table by table
        edges = np.concatenate([[0], np.cumsum(sizes.T.reshape(-1))])
        out = peer(torch.from_numpy(by_table), torch.from_numpy(edges))
        out.backward(target.reshape(SAMPLES, -1))
    weights = torch.cat(list(peer.split_embedding_weights()))
    sums = torch.cat([state[0].reshape(-1) for state in peer.split_optimizer_states()])
    apart = float((weights - ours.weight).abs().max())
    state = ours.rows.state["narrow0"].reshape(-1)
    state_apart = float(((sums - state).abs() / state.clamp(min=1)).max())
    print(f"{STEPS} steps, {TABLES} tables x {ROWS} x {DIM}: weights differ by {apart:.2e}, state by {state_apart:.2e}")
    return int(apart > LIMIT or state_apart > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
