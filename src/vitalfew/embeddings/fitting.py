"""One training step, one pass of predictions: the loops every job shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitalfew.data.batches import Batches
from vitalfew.data.encoded import Encoded
from vitalfew.data.log import EncodedLog
from vitalfew.embeddings.metrics import BinaryMetrics, binary_metrics
from vitalfew.embeddings.models import ClickModel
from vitalfew.embeddings.split import Part
from vitalfew.embeddings.tables import EmbeddingBags

__all__ = ["evaluate", "predict", "stream", "train_parts", "train_step", "validation_loss"]

_ROWS = 8192


def _inputs(batch: Encoded) -> tuple[Tensor | None, Tensor, Tensor | None]:
    dense = torch.from_numpy(batch.dense) if batch.dense.shape[1] else None
    return dense, torch.from_numpy(batch.ids), None if batch.offsets is None else torch.from_numpy(batch.offsets)


def stream(batches: Batches, done: int, total: int) -> Iterator[Encoded]:
    """Yield the batches of a run from step `done` to step `total`, over all epochs."""
    while done < total:
        epoch, first = divmod(done, len(batches))
        for batch in islice(batches.epoch(epoch, first), total - done):
            yield batch
            done += 1


def train_step(model: ClickModel, optimizers: Iterable[torch.optim.Optimizer], batch: Encoded) -> Tensor:
    """Do one step on one batch and return its mean loss, a scalar without history."""
    assert batch.label is not None
    # Plain tables make sparse gradients, and torch warns until the check of these is chosen or declined.
    with torch.sparse.check_sparse_tensor_invariants(enable=False):  # type: ignore[no-untyped-call]
        loss = F.binary_cross_entropy_with_logits(model(*_inputs(batch)), torch.from_numpy(batch.label))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
    return loss.detach()


def train_parts(model: ClickModel, optimizers: Iterable[torch.optim.Optimizer], parts: Iterable[Part[Encoded]]) -> int:
    """Do one step on a batch that comes in parts, with one update of each row; return its samples."""
    assert isinstance(model.tables, EmbeddingBags)
    for optimizer in optimizers:
        optimizer.zero_grad()
    samples = 0
    for part in parts:
        assert part.batch.label is not None
        logits, labels = model(*_inputs(part.batch)), torch.from_numpy(part.batch.label)
        (F.binary_cross_entropy_with_logits(logits, labels) * part.share).backward()  # type: ignore[no-untyped-call]
        samples += len(part.samples)
    model.tables.step()
    for optimizer in optimizers:
        optimizer.step()
    return samples


def predict(model: ClickModel, batches: Iterable[Encoded]) -> NDArray[np.float32]:
    """Return the logits of all rows, in order."""
    model.eval()
    with torch.no_grad():
        logits = [model(*_inputs(batch)).numpy() for batch in batches]
    model.train()
    return np.concatenate(logits) if logits else np.empty(0, np.float32)


def validation_loss(model: ClickModel, samples: Encoded, batch_rows: int = _ROWS) -> float:
    """Return the mean log loss on samples in memory; one label alone is no error here."""
    assert samples.label is not None
    cuts = range(0, len(samples), batch_rows)
    logits = predict(model, (samples.take(np.arange(at, min(at + batch_rows, len(samples)))) for at in cuts))
    return float(F.binary_cross_entropy_with_logits(torch.from_numpy(logits), torch.from_numpy(samples.label)))


def evaluate(
    model: ClickModel, log: EncodedLog, *, progress: Callable[[float], None] | None = None, batch_rows: int = _ROWS
) -> BinaryMetrics:
    """Measure the model on all rows of a log, read batch by batch; `progress` is called with the share done."""
    labels: list[NDArray[np.float32]] = []
    seen = 0

    def rows() -> Iterator[Encoded]:
        nonlocal seen
        for batch in Batches(log, min(batch_rows, _ROWS), shuffle=False).epoch(0):
            assert batch.label is not None
            labels.append(batch.label)
            yield batch
            seen += len(batch)
            if progress:
                progress(seen / len(log))

    logits = predict(model, rows())
    return binary_metrics(np.concatenate(labels), logits)
