"""Wrap models of other libraries and train them beside their unwrapped twins; run by `nox -s models`.

Prints the largest difference of the losses and of the embedding weights after 20 steps; exit 1 if either is above 1e-5.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from vitalfew.embeddings import Adagrad, wrap

FIELDS, NUMBERS, IDS, BATCH, STEPS = 6, 3, 1000, 256, 20
EPS = 1e-5
"""Large beside the rounding of gradients that should be zero: with 1e-10 their signs alone would move rows by lr."""


def differences(make: Callable[[], nn.Module], batches: Sequence[Any], loss_of: Callable[..., torch.Tensor]) -> bool:
    """Train a model and its wrapped copy on the same batches; return whether they agree."""
    torch.manual_seed(0)
    plain = make()
    ours = copy.deepcopy(plain)
    handle = wrap(ours, Adagrad(lr=0.05, eps=EPS))
    losses: list[list[float]] = []
    for model in (plain, ours):
        torch.manual_seed(1)
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05, eps=EPS)
        losses.append([])
        for batch in batches:
            loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    handle.undo()
    loss = max(abs(a - b) for a, b in zip(*losses, strict=True))
    rows = max(
        float((plain.get_parameter(f"{name}.weight") - ours.get_parameter(f"{name}.weight")).abs().max())
        for name in handle.names
    )
    name = f"{type(plain).__module__.partition('.')[0]} {type(plain).__name__}"
    print(f"{name}: {len(handle.names)} embeddings wrapped, loss within {loss:.1e}, rows within {rows:.1e}")
    return loss <= 1e-5 and rows <= 1e-5


def rechub(rng: np.random.Generator) -> list[bool]:
    from torch_rechub.basic.features import DenseFeature, SparseFeature
    from torch_rechub.models.ranking import DeepFM, WideDeep

    sparse = [SparseFeature(f"c{i}", IDS, embed_dim=8) for i in range(FIELDS)]
    dense = [DenseFeature(f"d{i}") for i in range(NUMBERS)]
    batches = []
    for _ in range(STEPS):
        features = {f"c{i}": torch.from_numpy(rng.integers(0, IDS, BATCH)) for i in range(FIELDS)}
        features |= {f"d{i}": torch.from_numpy(rng.standard_normal(BATCH).astype(np.float32)) for i in range(NUMBERS)}
        batches.append((features, torch.from_numpy(rng.integers(0, 2, BATCH).astype(np.float32))))
    layers = {"dims": [32], "dropout": 0.0}
    makers: list[Callable[[], nn.Module]] = [
        lambda: DeepFM(deep_features=sparse + dense, fm_features=sparse, mlp_params=layers),
        lambda: WideDeep(wide_features=dense, deep_features=sparse, mlp_params=layers),
    ]
    return [
        differences(make, batches, lambda m, b: nn.functional.binary_cross_entropy(m(b[0]), b[1])) for make in makers
    ]


def deepctr(rng: np.random.Generator) -> list[bool]:
    from deepctr_torch.inputs import DenseFeat, SparseFeat
    from deepctr_torch.models import DeepFM

    fields: list[Any] = [SparseFeat(f"c{i}", IDS, embedding_dim=8) for i in range(FIELDS)]
    fields += [DenseFeat(f"d{i}", 1) for i in range(NUMBERS)]
    batches = []
    for _ in range(STEPS):
        columns = np.concatenate([rng.integers(0, IDS, (BATCH, FIELDS)), rng.random((BATCH, NUMBERS))], axis=1)
        batches.append((torch.from_numpy(columns).float(), torch.from_numpy(rng.integers(0, 2, (BATCH, 1))).float()))
    return [
        differences(
            lambda: DeepFM(fields, fields, dnn_hidden_units=(32,), device="cpu"),
            batches,
            lambda m, b: nn.functional.binary_cross_entropy(m(b[0]), b[1]),
        )
    ]


def main() -> int:
    warnings.simplefilter("ignore")
    rng = np.random.default_rng(0)
    return 0 if all([*rechub(rng), *deepctr(rng)]) else 1


if __name__ == "__main__":
    sys.exit(main())
