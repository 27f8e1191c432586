"""Who stays in the fast memory: plain values that name a rule; the rule runs in the kernels of `residency`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitalfew.core import InputError

__all__ = ["LFU", "LRU", "Belady", "Chaos", "LookAhead", "Policy", "Static", "policy_named"]


@dataclass(frozen=True, slots=True)
class Policy:
    """What all the policies share: each puts a row that is no longer needed into a bucket.

    When more rows are retained than there is room for, the lowest bucket gives up its rows first, and inside a bucket
    the one that has been there longest.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[int] = -1
    counts_visits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("decay_every", "depth"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}", hint="leave it out for the default")


@dataclass(frozen=True, slots=True)
class LRU(Policy):
    """Keep the rows used last."""

    name: ClassVar[str] = "lru"
    kind: ClassVar[int] = 0


@dataclass(frozen=True, slots=True)
class LFU(Policy):
    """Keep the rows that most batches have used, counted up to 255.

    Attributes
    ----------
    decay_every
        All counts are halved every so many batches, so that what was popular once makes room.
    """

    decay_every: int = 1000

    name: ClassVar[str] = "lfu"
    kind: ClassVar[int] = 1
    counts_visits: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class Static(Policy):
    """Keep a set of rows chosen beforehand; what room is left goes to others as in `LRU`.

    Attributes
    ----------
    hot
        Ids of the rows to keep, over all tables.
    """

    hot: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    name: ClassVar[str] = "static"
    kind: ClassVar[int] = 2

    @classmethod
    def of(cls, ids: ArrayLike) -> Static:
        """Make one from anything that numpy turns into ids."""
        return cls(np.asarray(ids, np.int64))


@dataclass(frozen=True, slots=True)
class LookAhead(Policy):
    """Keep the rows that the coming batches need soonest; among those with no known need, the most used.

    That is Belady's rule at the grain of batches, as far as the window sees.

    Attributes
    ----------
    depth
        Batches the window holds beyond the one that is done. More are of no use once the rows they need fill the
        memory.
    decay_every
        As in `LFU`.
    """

    depth: int = 200
    decay_every: int = 1000

    name: ClassVar[str] = "lookahead"
    kind: ClassVar[int] = 3
    counts_visits: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class Belady(Policy):
    """As `LookAhead` with the whole pass in view: no rule moves fewer rows.

    A `Prefetch` reads its loader once beforehand, which must then give the same batches again.

    Attributes
    ----------
    decay_every
        As in `LFU`, for what is kept from one pass to the next.
    """

    decay_every: int = 1000

    name: ClassVar[str] = "belady"
    kind: ClassVar[int] = 3
    counts_visits: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class Chaos(Policy):
    """Evict at random, and more than necessary. For tests: where rows lie must never change what they become.

    Attributes
    ----------
    seed
        Of the choices.
    """

    seed: int = 0

    name: ClassVar[str] = "chaos"
    kind: ClassVar[int] = 4


def policy_named(name: str, *, hot: Sequence[int] | NDArray[np.int64] | None = None, depth: int = 200) -> Policy:
    """Return the policy of that name: ``static``, ``lru``, ``lfu``, ``lookahead``, or ``belady``, which sees all.

    Examples
    --------
    >>> policy_named("lookahead", depth=50)
    LookAhead(depth=50, decay_every=1000)
    """
    if name == "belady":
        return Belady()
    if name == "lookahead":
        return LookAhead(depth=depth)
    if name == "static":
        return Static.of(np.empty(0, np.int64) if hot is None else hot)
    if name in ("lru", "lfu"):
        return LRU() if name == "lru" else LFU()
    raise InputError(f"there is no policy {name!r}", hint="choose static, lru, lfu, lookahead or belady")
