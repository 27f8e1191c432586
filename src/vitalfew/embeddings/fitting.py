"""One training step, one pass of predictions: the loops every job shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitalfew.data.encoded import Encoded
from vitalfew.embeddings.models import DLRM

__all__ = ["predict", "train_step"]


def _inputs(batch: Encoded) -> tuple[Tensor | None, Tensor, Tensor | None]:
    dense = torch.from_numpy(batch.dense) if batch.dense.shape[1] else None
    return dense, torch.from_numpy(batch.ids), None if batch.offsets is None else torch.from_numpy(batch.offsets)


def train_step(model: DLRM, optimizers: Iterable[torch.optim.Optimizer], batch: Encoded) -> Tensor:
    """Do one step on one batch and return its mean loss, a scalar without history."""
    assert batch.label is not None
    loss = F.binary_cross_entropy_with_logits(model(*_inputs(batch)), torch.from_numpy(batch.label))
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach()


def predict(
    model: DLRM, batches: Iterable[Encoded], *, progress: Callable[[int], None] | None = None
) -> NDArray[np.float32]:
    """Return the logits of all rows, in order."""
    model.eval()
    logits = []
    with torch.no_grad():
        for batch in batches:
            logits.append(model(*_inputs(batch)).numpy())
            if progress:
                progress(len(batch))
    model.train()
    return np.concatenate(logits) if logits else np.empty(0, np.float32)
