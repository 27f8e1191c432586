"""Samples that did not happen, to learn from those that did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitalfew.core.errors import InputError

__all__ = ["Samples", "negatives"]

Ids = NDArray[np.int64]


class Samples(NamedTuple):
    """Columns of a log: each positive (label 1), followed by its negatives (label 0)."""

    user: Ids
    item: Ids
    label: NDArray[np.int8]


def negatives(
    positives: Sequence[ArrayLike],
    num_items: int,
    *,
    per_positive: int = 4,
    seed: int = 0,
    by: Literal["uniform", "popularity"] = "uniform",
    known: Sequence[ArrayLike] | None = None,
) -> Samples:
    """Return positive pairs and, behind each, items that its user is not known to have touched.

    Parameters
    ----------
    positives
        Users and items, such as `Pairs`: the first two entries are used.
    num_items
        Items there are; their ids are below it.
    per_positive
        Negatives behind each positive. They are drawn with replacement: one may come twice.
    seed
        The same seed gives the same negatives on every machine.
    by
        "uniform", or "popularity": in proportion to how often an item is among the positives, and never an item that is
        not.
    known
        Users and items that are no negatives either, in the same form.

    Raises
    ------
    InputError
        If a user has all items there are to draw from. A user who lacks a single one gets that one each time.

    Examples
    --------
    >>> samples = negatives(([0, 0, 1], [2, 3, 2]), 5, per_positive=2)
    >>> samples.user.tolist(), samples.label.tolist()
    ([0, 0, 0, 0, 0, 0, 1, 1, 1], [1, 0, 0, 1, 0, 0, 1, 0, 0])
    >>> set(samples.item[(samples.user == 0) & (samples.label == 0)].tolist()) <= {0, 1, 4}
    True

    Notes
    -----
    Cost: a sort of the known pairs and two binary searches for each negative, a few million negatives a second.
    Nothing is drawn and thrown away, so users with nearly all items cost no more than others.
    """
    users, items = _pairs(positives, num_items)
    if per_positive < 1:
        raise InputError(f"per_positive must be 1 or more, got {per_positive}", hint="4 is usual")
    if by not in ("uniform", "popularity"):
        raise InputError(f"there is no way to draw {by!r}", hint="use 'uniform' or 'popularity'")
    weights = np.ones(num_items, np.int64) if by == "uniform" else np.bincount(items, minlength=num_items)
    others = _pairs(known, num_items) if known is not None else (users[:0], items[:0])
    drawn = _draw_others(
        np.repeat(users, per_positive),
        np.concatenate([users, others[0]]),
        np.concatenate([items, others[1]]),
        np.append(0, np.cumsum(weights)),
        np.random.default_rng(seed),
    )
    label = np.zeros((len(users), 1 + per_positive), np.int8)
    label[:, 0] = 1
    item = np.column_stack([items, drawn.reshape(-1, per_positive)])
    return Samples(np.repeat(users, 1 + per_positive), item.ravel(), label.ravel())


def _draw_others(wanted: Ids, users: Ids, items: Ids, ends: Ids, rng: np.random.Generator) -> Ids:
    """Return an item for each wanted user, none of the pairs given, in proportion to the items' weights.

    The weights of all items lie side by side on a line, item i from ``ends[i]`` to ``ends[i + 1]``. Take the items of
    one user out and push the rest together: a place on what is left is drawn, and then moved right again by the weight
    of the items taken out before it.
    """
    total, num_items = int(ends[-1]), len(ends) - 1
    names, slot = np.unique(users, return_inverse=True)
    assert len(names) * (max(total, num_items) + 1) < 2**63
    slot, item = np.divmod(np.unique(slot * num_items + items), num_items)
    taken = np.append(0, np.cumsum(np.diff(ends)[item]))  # over all users; less what is before its first, a user's own
    first = np.searchsorted(slot, np.arange(len(names) + 1))
    left = total - np.diff(taken[first])
    mine = np.searchsorted(names, wanted)
    if (left[mine] < 1).any():
        user = wanted[left[mine].argmin()]
        raise InputError(f"user {user} has every item there is to draw from", hint="leave this user out")
    # Where on its user's shortened line each item is missing; the lines of all users lie one behind the other.
    gaps = slot * (total + 1) + ends[item] - (taken[:-1] - taken[first[slot]])
    place = rng.integers(0, left[mine])
    before = np.searchsorted(gaps, mine * (total + 1) + place, "right")
    return np.asarray(np.searchsorted(ends, place + taken[before] - taken[first[mine]], "right") - 1)


def _pairs(pairs: Sequence[ArrayLike], num_items: int) -> tuple[Ids, Ids]:
    users, items = (np.asarray(pairs[i]) for i in (0, 1))
    for name, ids in (("users", users), ("items", items)):
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or len(ids) != len(users):
            raise InputError(
                f"{name} are {ids.dtype} of shape {ids.shape}", hint="pass two columns of whole numbers, equally long"
            )
    if len(items) and not 0 <= items.min() <= items.max() < num_items:
        raise InputError(
            f"items go from {items.min()} to {items.max()}, and num_items is {num_items}", hint="ids are below it"
        )
    if len(users) and int(users.max()) >= 2**63:
        raise InputError(
            f"a user is {users.max()}, which no int64 holds",
            hint="number the users first: numpy.unique(users, return_inverse=True)",
        )
    return users.astype(np.int64), items.astype(np.int64)
