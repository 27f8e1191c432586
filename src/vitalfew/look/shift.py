"""How far two sets of rows are apart: three measures, as functions of counts or codes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitalfew.core import InputError
from vitalfew.core.intervals import Interval, mean_interval
from vitalfew.embeddings.metrics import auc

__all__ = ["chance_psi", "domain_auc", "new_id_share", "psi"]

_RIDGE = 1.0
_NEWTON_STEPS = 8
_CONFIDENCE = 0.95


def psi(before: ArrayLike, now: ArrayLike, *, smoothing: float = 0.5) -> float:
    """Return the population stability index of two sets of counts, ``sum (p - q) ln(p / q)``.

    Parameters
    ----------
    before, now
        How many fell into each bin, the same bins in both.
    smoothing
        Is added to every count, so that a bin that is empty on one side has a finite part.

    Examples
    --------
    >>> psi([50, 50], [50, 50]), round(psi([50, 50], [80, 20]), 2)
    (0.0, 0.41)

    Notes
    -----
    A rule of thumb calls 0.1 a shift and 0.25 a large one. Chance alone gives `chance_psi`.
    """
    first, last = _counts(before, now)
    p, q = first + smoothing, last + smoothing
    if not (p > 0).all() or not (q > 0).all():
        raise InputError("a bin is empty, and without smoothing its part is infinite", hint="use smoothing=0.5")
    p, q = p / p.sum(), q / q.sum()
    return float(((p - q) * np.log(p / q)).sum())


def chance_psi(num_bins: int, before_rows: int, now_rows: int) -> float:
    """Return about what `psi` is between two draws from the same distribution.

    Examples
    --------
    >>> round(chance_psi(101, 10_000, 10_000), 6)
    0.02
    """
    return (num_bins - 1) * (1 / before_rows + 1 / now_rows)


def new_id_share(before: ArrayLike, now: ArrayLike) -> float:
    """Return which share of the later rows is in bins that were empty before; 0 where there are no later rows.

    Examples
    --------
    >>> new_id_share([4, 0, 2], [1, 2, 1])
    0.5
    """
    first, last = _counts(before, now)
    return float(last[first == 0].sum() / max(last.sum(), 1.0))


def domain_auc(before: ArrayLike, now: ArrayLike, *, folds: int = 5, seed: int = 0) -> Interval:
    """Return how well a small classifier tells later rows from earlier ones: 0.5 not at all, 1 always.

    Parameters
    ----------
    before, now
        Codes, whole numbers of shape (rows, columns): the bin or id of each row in each column.
    folds
        The rows are dealt into so many parts, and each part is scored by a model that did not see it.
    seed
        Of that deal.

    Returns
    -------
    Interval
        The mean over the folds and its 95 % interval. Without drift it lies around 0.5.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> same = domain_auc(rng.integers(0, 5, (500, 2)), rng.integers(0, 5, (500, 2)))
    >>> same.low < 0.5 < same.high
    True
    >>> domain_auc(rng.integers(0, 5, (500, 2)), rng.integers(2, 7, (500, 2))).low > 0.8
    True

    Notes
    -----
    Each code becomes the logarithm of how much more often it is later (smoothed), and a logistic regression weighs
    the columns. A model's part of the counts and its part of the regression are different folds: the frequency of a
    rare code would otherwise look like knowledge. Cost: ``folds`` passes over the rows, some Newton steps.
    """
    first, last = (np.asarray(codes).reshape(len(np.asarray(codes)), -1) for codes in (before, now))
    if folds < 3:
        raise InputError(f"folds must be at least 3, got {folds}", hint="5 is usual")
    if min(len(first), len(last)) < 2 * folds or first.shape[1] != last.shape[1] or not first.shape[1]:
        raise InputError(
            f"rows of shape {first.shape} cannot be told from {last.shape} in {folds} folds",
            hint=f"pass the same columns, and at least {2 * folds} rows of both",
        )
    codes = np.concatenate([first, last])
    codes = np.stack([np.unique(column, return_inverse=True)[1] for column in codes.T], axis=1)
    is_later = np.repeat([0.0, 1.0], [len(first), len(last)])
    rng = np.random.default_rng(seed)
    fold = np.concatenate([rng.permutation(len(side)) % folds for side in (first, last)])
    found = []
    for held in range(folds):
        weighing = (held + 1) % folds
        values = _leanings(codes, is_later, (fold != held) & (fold != weighing))
        weights = _regression(values[fold == weighing], is_later[fold == weighing])
        scores = values[fold == held] @ weights[1:]
        found.append(auc(is_later[fold == held].astype(np.float32), scores.astype(np.float32)))
    around = mean_interval(found, _CONFIDENCE)
    # The folds share most of what their models learn from (Nadeau and Bengio 2003); without this the interval of two
    # draws from one distribution misses 0.5 twice as often as it should.
    wider = math.sqrt(1 + folds / (folds - 1))
    low, high = (around.mean + wider * (end - around.mean) for end in (around.low, around.high))
    return Interval(around.mean, max(low, 0.0), min(high, 1.0))


def _counts(before: ArrayLike, now: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, last = np.asarray(before, np.float64), np.asarray(now, np.float64)
    if first.ndim != 1 or first.shape != last.shape or not len(first):
        raise InputError(f"counts of shape {first.shape} and {last.shape} have not the same bins", hint="one per bin")
    if not (np.isfinite(first).all() and np.isfinite(last).all()) or min(first.min(), last.min()) < 0:
        raise InputError("a count is negative or not finite", hint="pass how many fell into each bin")
    return first, last


def _leanings(
    codes: NDArray[np.int64], is_later: NDArray[np.float64], counted: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return for each code how much it leans to the later side, learned from the counted rows."""
    values = np.empty(codes.shape)
    for j, column in enumerate(codes.T):
        size = int(column.max()) + 1
        later = np.bincount(column[counted], is_later[counted], size) + 0.5
        earlier = np.bincount(column[counted], 1 - is_later[counted], size) + 0.5
        leaning = np.log(later / later.sum()) - np.log(earlier / earlier.sum())
        values[:, j] = leaning[column]
    return values


def _regression(values: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return bias and weights of a logistic regression with a small ridge, by Newton's method."""
    x = np.column_stack([np.ones(len(values)), values])
    ridge = np.full(x.shape[1], _RIDGE)
    ridge[0] = 1e-6
    weights = np.zeros(x.shape[1])
    weights[0] = math.log(max(target.mean(), 1e-9) / max(1 - target.mean(), 1e-9))
    for _ in range(_NEWTON_STEPS):
        chance = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        slope = x.T @ (chance - target) + ridge * weights
        curvature = (x * (chance * (1 - chance))[:, None]).T @ x + np.diag(ridge)
        step = np.linalg.solve(curvature, slope)
        weights -= step / max(1.0, float(np.abs(step).max()) / 4)  # far off, Newton overshoots
    return weights
