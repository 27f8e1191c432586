"""How good click predictions are: ranking, likelihood, calibration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitalfew.core import InputError

__all__ = ["BinaryMetrics", "auc", "binary_metrics"]


@dataclass(frozen=True, slots=True)
class BinaryMetrics:
    """AUC, log loss (nats), and calibration: predicted clicks over actual clicks, 1 is right."""

    auc: float
    log_loss: float
    calibration: float
    num_rows: int


def auc(label: NDArray[np.float32], score: NDArray[np.float32]) -> float:
    """Return the area under the ROC curve; ties count half.

    Examples
    --------
    >>> import numpy as np
    >>> auc(np.array([0, 1, 1]), np.array([0.1, 0.1, 0.9]))
    0.75
    """
    positives = int((label > 0.5).sum())
    if positives in (0, len(label)):
        raise InputError(
            f"all {len(label)} labels are {int(positives > 0)}: the AUC is undefined", hint="evaluate on more rows"
        )
    order = np.argsort(score, kind="stable")
    ranked = score[order]
    edges = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1], [True]]))
    middle = (edges[:-1] + edges[1:] + 1) / 2
    ranks = np.repeat(middle, np.diff(edges))
    positive = label[order] > 0.5
    below = ranks[positive].sum() - positives * (positives + 1) / 2
    return float(below / (positives * (len(label) - positives)))


def binary_metrics(label: ArrayLike, logit: ArrayLike) -> BinaryMetrics:
    """Measure predictions given as logits.

    Raises
    ------
    InputError
        If all labels are equal (the AUC is undefined), a label is neither 0 nor 1, or a logit is NaN or infinite.

    Examples
    --------
    >>> m = binary_metrics([0, 1, 0, 1], [-2.0, 2.0, -1.0, 1.0])
    >>> m.auc, round(m.log_loss, 3), round(m.calibration, 6)
    (1.0, 0.22, 1.0)
    """
    y = np.asarray(label, np.float32).reshape(-1)
    z = np.asarray(logit, np.float32).reshape(-1)
    if len(y) != len(z) or not len(y):
        raise InputError(f"{len(y)} labels came with {len(z)} logits", hint="pass one logit per label, at least one")
    click = (y == 0) | (y == 1)
    if not click.all():
        wrong = int(click.argmin())
        raise InputError(f"label {wrong} is {y[wrong]}", hint="a label is 0 or 1")
    if not np.isfinite(z).all():
        wrong = int(np.isfinite(z).argmin())
        shown = "NaN" if np.isnan(z[wrong]) else str(z[wrong])
        raise InputError(f"logit {wrong} is {shown}: the training has diverged", hint="lower the learning rate")
    ranking = auc(y, z)
    wide = z.astype(np.float64)
    loss = np.maximum(wide, 0) - wide * y + np.log1p(np.exp(-np.abs(wide)))
    chance = np.exp(-np.logaddexp(0, -wide))
    return BinaryMetrics(ranking, float(loss.mean()), float(chance.sum() / y.sum(dtype=np.float64)), len(y))
