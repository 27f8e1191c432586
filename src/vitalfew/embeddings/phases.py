"""Batches of two kinds in turns: how many of one before those of the other, and how far an epoch is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vitalfew.core import InputError

__all__ = ["KINDS", "Kind", "Phase", "Place", "next_rate"]

Kind = Literal["cold", "hot"]
KINDS: tuple[Kind, Kind] = ("cold", "hot")


@dataclass(frozen=True, slots=True)
class Phase:
    """Batches of one kind that are trained one after the other.

    Attributes
    ----------
    kind
        ``"hot"``: all rows they look up are hot. ``"cold"``: every sample looks up another one too.
    batches
        The numbers of the samples of each batch.
    """

    kind: Kind
    batches: tuple[NDArray[np.int64], ...]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return iter(self.batches)


@dataclass(slots=True)
class Place:
    """How far an epoch is."""

    epoch: int
    used: dict[Kind, int] = field(default_factory=lambda: {"cold": 0, "hot": 0})
    """Batches given of each kind."""
    kind: Kind = "hot"
    """Of the phase given last; so cold ones come first."""
    left: int = 0
    """Batches of that phase that come again, after a resume."""
    given: int = 0
    """Batches of that phase."""

    def next(self, total: Mapping[Kind, int], rate: int) -> tuple[Kind, int, int] | None:
        """Return kind and span of the batches that come now, and note that they are given; None at the end."""
        kind, size = self.kind, self.left
        if not size:
            order: tuple[Kind, Kind] = ("cold", "hot") if kind == "hot" else ("hot", "cold")
            remaining = [each for each in order if self.used[each] < total[each]]
            if not remaining:
                return None
            kind = remaining[0]
            size = min(-(-total[kind] * rate // 100), total[kind] - self.used[kind])
        start = self.used[kind]
        self.kind, self.left, self.given = kind, 0, size
        self.used[kind] += size
        return kind, start, start + size

    def back(self, done: int | None) -> Place:
        """Return the place where only so many batches of the phase given last are done; None for all."""
        undone = 0 if done is None else self.given - done
        if not 0 <= undone <= self.given:
            raise InputError(f"{done} batches of a phase of {self.given} cannot be done", hint="count them again")
        return Place(self.epoch, self.used | {self.kind: self.used[self.kind] - undone}, self.kind, self.left + undone)

    def is_over(self, total: Mapping[Kind, int]) -> bool:
        """Say whether all batches were given."""
        return all(self.used[kind] >= total[kind] for kind in KINDS)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, from which the keywords of another one can be taken."""
        return {"epoch": self.epoch, "used": dict(self.used), "kind": self.kind, "left": self.left}


def next_rate(rate: int, losses: Sequence[float]) -> int:
    """Return how many percent of an epoch's batches of a kind come before those of the other kind have their turn.

    When the last loss is above the one before, the rate is halved. When losses have fallen four times in a row, and
    after each four more, it is doubled. It stays within 1 and 100.

    Examples
    --------
    >>> next_rate(50, [0.5, 0.6]), next_rate(50, [5, 4, 3, 2, 1]), next_rate(50, [0.5])
    (25, 100, 50)
    """
    if not 1 <= rate <= 100:
        raise InputError(f"a rate must lie in [1, 100], got {rate}", hint="50 is usual")
    if any(not math.isfinite(loss) for loss in losses):
        raise InputError(f"a loss is {next(x for x in losses if not math.isfinite(x))}", hint="lower the learning rate")
    falls = 0
    for before, after in zip(losses[-2::-1], losses[:0:-1], strict=True):
        if after >= before:
            break
        falls += 1
    if len(losses) > 1 and losses[-1] > losses[-2]:
        return max(rate // 2, 1)
    return min(2 * rate, 100) if falls and falls % 4 == 0 else rate
