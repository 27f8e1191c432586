"""On a real log (Frappe) the wrapped model learns what the plain one learns."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitalfew.embeddings import Adagrad, wrap
from vitalfew.embeddings.metrics import binary_metrics

DATA = Path(os.environ.get("VITALFEW_DATA", Path(__file__).parents[3] / "shared" / "data")) / "recsys" / "frappe"


def read_libfm(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return labels 0/1 and the ids of the ten fields; the files have CRLF line ends."""
    with gzip.open(path, "rt") as file:
        rows = [line.split() for line in file]
    label = np.array([row[0] == "1" for row in rows], np.float32)
    return label, np.array([[int(cell.partition(":")[0]) for cell in row[1:]] for row in rows], np.int64)


class Net(nn.Module):
    """A plain model as users have it: one embedding over all fields, and two layers."""

    def __init__(self, num_ids: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_ids, 16)
        nn.init.normal_(self.embedding.weight, std=0.01)
        self.layers = nn.Sequential(nn.Linear(160, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layers(self.embedding(ids).flatten(1)).squeeze(1)


def train(seed: int, *, wrapped: bool) -> float:
    label, ids = read_libfm(DATA / "validation.libfm.gz")
    test_label, test_ids = read_libfm(DATA / "test.libfm.gz")
    torch.manual_seed(seed)
    model = Net(int(max(ids.max(), test_ids.max())) + 1)
    handle = wrap(model, Adagrad(lr=0.05)) if wrapped else None
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    order = torch.Generator().manual_seed(seed)
    y, x = torch.from_numpy(label), torch.from_numpy(ids)
    for _ in range(3):
        for batch in torch.randperm(len(y), generator=order).split(512):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(x[batch]), y[batch]).backward()
            optimizer.step()
    if handle is not None:
        handle.undo()
    with torch.no_grad():
        return binary_metrics(test_label, model(torch.from_numpy(test_ids)).numpy()).auc


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_wrapped_model_reaches_the_auc_of_dense_adagrad(seed: int) -> None:
    if not DATA.is_dir():
        pytest.skip(f"no Frappe log at {DATA}: set VITALFEW_DATA")
    plain, ours = train(seed, wrapped=False), train(seed, wrapped=True)
    print(f"Frappe, seed {seed}: AUC plain {plain:.4f}, wrapped {ours:.4f}, difference {ours - plain:+.5f}")
    assert plain > 0.93
    assert abs(ours - plain) <= 0.002
