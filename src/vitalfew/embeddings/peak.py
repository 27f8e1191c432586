"""Peak memory of a way to train, measured in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping

from vitalfew.embeddings.settings import Settings

__all__ = ["peak_memory"]

_STEPS = 12


def _train_and_tell(folder: str, num_rows: Mapping[str, int], settings: Settings, plain: bool) -> int:
    from vitalfew.data.batches import Batches
    from vitalfew.data.log import EncodedLog
    from vitalfew.embeddings.fitting import train_step
    from vitalfew.embeddings.settings import build, dense_optimizer
    from vitalfew.meter import peak_rss

    log = EncodedLog.open(folder)
    model = build(num_rows, log.num_dense, settings, plain=plain)
    optimizers = [dense_optimizer(model, settings)]
    if plain:
        optimizers.append(model.tables.optimizer(settings.rule()))  # type: ignore[attr-defined]
    for _, batch in zip(range(_STEPS), Batches(log, settings.batch_size, seed=settings.seed).epoch(0), strict=False):
        train_step(model, optimizers, batch)
    return int(peak_rss().value)


def peak_memory(folder: str | os.PathLike[str], num_rows: Mapping[str, int], settings: Settings, *, plain: bool) -> int:
    """Return the peak resident bytes of a fresh process that builds the model and trains a few steps.

    Parameters
    ----------
    folder
        The encoded train slice.
    plain
        Train the plain PyTorch way instead of ours.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_train_and_tell, (os.fspath(folder), dict(num_rows), settings, plain))
