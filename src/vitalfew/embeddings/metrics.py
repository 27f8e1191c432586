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
    order = np.argsort(score, kind="stable")
    ranked = score[order]
    edges = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1], [True]]))
    middle = (edges[:-1] + edges[1:] + 1) / 2
    ranks = np.repeat(middle, np.diff(edges))
    positive = label[order] > 0.5
    p = int(positive.sum())
    n = len(label) - p
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * n))


def binary_metrics(label: ArrayLike, logit: ArrayLike) -> BinaryMetrics:
    """Measure predictions given as logits.

    Raises
    ------
    InputError
        If all labels are equal (the AUC is undefined) or a logit is NaN.

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
    clicks = int((y > 0.5).sum())
    if clicks in (0, len(y)):
        raise InputError(
            f"all {len(y)} labels are {int(clicks > 0)}: the AUC is undefined", hint="evaluate on more rows"
        )
    if np.isnan(z).any():
        raise InputError(
            f"logit {int(np.isnan(z).argmax())} is NaN: the training has diverged", hint="lower the learning rate"
        )
    wide = z.astype(np.float64)
    loss = np.maximum(wide, 0) - wide * y + np.log1p(np.exp(-np.abs(wide)))
    chance = np.exp(-np.logaddexp(0, -wide))
    return BinaryMetrics(auc(y, z), float(loss.mean()), float(chance.sum() / clicks), len(y))
