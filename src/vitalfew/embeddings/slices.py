"""How well a model does as time goes on: its quality in each later slice of a log."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitalfew.core import InputError
from vitalfew.data.batches import Batches
from vitalfew.data.encoded import Encoded
from vitalfew.data.log import EncodedLog
from vitalfew.data.readers import open_log
from vitalfew.data.split import time_slices
from vitalfew.embeddings.fitting import predict, stream, train_step
from vitalfew.embeddings.metrics import binary_metrics
from vitalfew.embeddings.models import MODELS, ClickModel
from vitalfew.embeddings.options import LogOptions, Progress, silent
from vitalfew.embeddings.preparing import prepare
from vitalfew.embeddings.settings import Settings, build, dense_optimizer

__all__ = ["SliceQuality", "auc_by_slice", "check_models", "models_by_slice", "quality_by_slice"]

_NORMAL_95 = 1.959964
_SCORED = 8192


@dataclass(frozen=True, slots=True)
class SliceQuality:
    """How good the predictions for one slice are.

    Attributes
    ----------
    rows
        Of the slice.
    auc, low, high
        With its 95 % interval; None where all rows have one label.
    log_loss
        In nats; None likewise.
    """

    rows: int
    auc: float | None = None
    low: float | None = None
    high: float | None = None
    log_loss: float | None = None


def auc_by_slice(label: ArrayLike, logit: ArrayLike, place: ArrayLike, num_slices: int) -> tuple[SliceQuality, ...]:
    """Measure predictions slice by slice.

    Parameters
    ----------
    label, logit
        One of each per row.
    place
        The slice of each row, from 0 to `num_slices` - 1.

    Examples
    --------
    >>> first, last = auc_by_slice([0, 1, 1, 1], [-1.0, 2.0, 1.0, 0.5], [0, 0, 1, 1], 2)
    >>> first.auc, last.rows, last.auc
    (1.0, 2, None)

    Notes
    -----
    The interval is that of Hanley and McNeil (1982), which takes the rows as independent.
    """
    y, z, at = np.asarray(label), np.asarray(logit), np.asarray(place)
    if not len(y) == len(z) == len(at):
        raise InputError(f"{len(y)} labels, {len(z)} logits and {len(at)} places", hint="one of each per row")
    if len(at) and not 0 <= at.min() <= at.max() < num_slices:
        raise InputError(
            f"the places {at.min()} to {at.max()} are not all within 0 to {num_slices - 1}", hint="leave such rows out"
        )
    found = []
    for k in range(num_slices):
        mine = at == k
        positive, rows = int((y[mine] > 0).sum()), int(mine.sum())
        if positive in (0, rows):
            found.append(SliceQuality(rows))
            continue
        measured = binary_metrics(y[mine], z[mine])
        half = _NORMAL_95 * _auc_error(measured.auc, positive, rows - positive)
        low, high = max(measured.auc - half, 0.0), min(measured.auc + half, 1.0)
        found.append(SliceQuality(rows, measured.auc, low, high, measured.log_loss))
    return tuple(found)


def _auc_error(auc: float, positive: int, negative: int) -> float:
    """Return the standard error of an AUC."""
    both_above, both_below = auc / (2 - auc), 2 * auc * auc / (1 + auc)
    spread = auc * (1 - auc) + (positive - 1) * (both_above - auc**2) + (negative - 1) * (both_below - auc**2)
    return math.sqrt(max(spread, 0.0) / (positive * negative))


def quality_by_slice(model: ClickModel, log: EncodedLog, cuts: NDArray[np.int64]) -> tuple[SliceQuality, ...]:
    """Measure a model on each slice of a log that has times.

    Parameters
    ----------
    cuts
        The last time of each slice but the last.

    Raises
    ------
    InputError
        If the log has no times.
    """
    if not log.has_time:
        raise InputError("the log has no times", hint="encode it with a schema that names the time column")
    labels, places = [], []

    def seen(batch: Encoded) -> Encoded:
        assert batch.label is not None
        assert batch.time is not None
        labels.append(batch.label)
        places.append(np.searchsorted(cuts, batch.time))
        return batch

    logits = predict(model, map(seen, Batches(log, _SCORED, shuffle=False).epoch(0)))
    return auc_by_slice(np.concatenate(labels), logits, np.concatenate(places), len(cuts) + 1)


def check_models(models: Sequence[str]) -> None:
    """Refuse names that are not of `MODELS`, or none at all."""
    if unknown := [name for name in models if name not in MODELS]:
        raise InputError(f"there is no model {unknown[0]!r}", hint=f"choose from {', '.join(MODELS)}")
    if not models:
        raise InputError("there is no model to train", hint=f"choose from {', '.join(MODELS)}")


def models_by_slice(
    path: str | Sequence[str],
    options: LogOptions,
    models: Sequence[str],
    slices: int = 8,
    *,
    reference: float | None = None,
    settings: Settings | None = None,
    progress: Progress = silent,
) -> dict[str, tuple[SliceQuality, ...]]:
    """Train each model on the first slice of a log, and measure it on every later one.

    Parameters
    ----------
    path, options
        The log, with its time.
    models
        Names of `MODELS`.
    slices, reference
        As for `look_at_drift`.
    settings
        Of all models; those without bottom layers leave these out.

    Notes
    -----
    Cost: a training run per model, disk space for the encoded log meanwhile.
    """
    if options.time is None:
        raise InputError("later slices are a matter of time, and no column is the time", hint="name it with --time")
    check_models(models)
    path = path if isinstance(path, str) else list(path)
    reader = open_log(path, format=options.format, bad_rows=options.bad_rows)  # type: ignore[arg-type]
    cuts, _ = time_slices(reader, options.time, slices, reference)
    options = dataclasses.replace(options, test_share=1 - (1 / slices if reference is None else reference))
    with tempfile.TemporaryDirectory(prefix=".vitalfew-slices-") as work:
        job = prepare(path, options, settings or Settings(), Path(work), progress)
        found = {}
        for name in models:
            chosen = _with_model(job.settings, name)
            model = build(job.num_rows, job.train.num_dense, chosen)
            optimizers = [dense_optimizer(model, chosen)]
            batches = Batches(job.train, chosen.batch_size, seed=chosen.seed)
            total = len(batches) * chosen.epochs
            for n, batch in enumerate(stream(batches, 0, total)):
                train_step(model, optimizers, batch)
                progress(f"train {name}", (n + 1) / total)
            found[name] = quality_by_slice(model, job.test, cuts[1:-1])
            del model, optimizers  # or its rows would be in memory beside those of the next
        return found


def _with_model(settings: Settings, name: str) -> Settings:
    """Return the settings for another model; bottom layers are left out where it has none."""
    plain = dataclasses.replace(settings, model=name, bottom=Settings().bottom)
    return dataclasses.replace(plain, bottom=settings.bottom) if plain.has_bottom else plain
