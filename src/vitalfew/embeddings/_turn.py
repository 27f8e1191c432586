"""What one worker has of a batch: the distinct rows its samples need, their values, and gradients on their way back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from vitalfew.embeddings._owner import Given, Local
from vitalfew.embeddings._peers import Message, pack, unpack
from vitalfew.embeddings.rows import Lookups, array_of

__all__ = ["Gradients", "Turn", "given"]

_TYPES = (np.int32, np.int32, np.float32, np.float32)


@njit(nogil=True, cache=True)
def _sum(lines: Any, bag_of: Any, scale_of: Any, grad: Any, out: Any) -> None:
    """Add the gradient of each lookup to its line, in sample order."""
    dim = grad.shape[1]
    for i in range(len(lines)):
        source = grad[bag_of[i] if len(bag_of) else i]
        target = out[lines[i]]
        if len(scale_of):
            for d in range(dim):
                target[d] += scale_of[i] * source[d]
        else:
            for d in range(dim):
                target[d] += source[d]


class Turn:
    """The distinct rows of one worker's share of a batch, owner by owner; a row's place there is its line.

    Parameters
    ----------
    rows
        The row of each lookup, numbered over all tables.
    num_rows, world, dim, dtype
        Of the tables; row r belongs to owner ``r % world``.
    samples
        How many samples the share has.
    """

    def __init__(
        self, rows: NDArray[np.int64], samples: int, *, num_rows: int, world: int, dim: int, dtype: torch.dtype
    ) -> None:
        self.world, self.samples = world, samples
        self._stride = -(-num_rows // world)
        self._keys = np.unique(self._key(rows))
        self._bounds = np.searchsorted(self._keys, np.arange(world + 1) * self._stride)
        self.classes = np.zeros(len(self._keys), np.uint8)
        self._waited = np.zeros(len(self._keys), np.bool_)
        self.values = torch.empty((len(self._keys), dim), dtype=dtype, device="cpu")

    def _key(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return rows % self.world * self._stride + rows // self.world

    @property
    def nbytes(self) -> int:
        """Bytes of the rows and of their values."""
        return 10 * len(self._keys) + self.values.numel() * self.values.element_size()

    def request(self, owner: int) -> Local:
        """Return the rows that this worker needs of one owner, as that one counts them."""
        return self._keys[self._bounds[owner] : self._bounds[owner + 1]] - owner * self._stride

    def lines_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return the line of each row; None if one of them is not there."""
        keys = self._key(rows)
        lines = np.searchsorted(self._keys, keys)
        if len(keys) and (not len(self._keys) or (self._keys[np.minimum(lines, len(self._keys) - 1)] != keys).any()):
            return None
        return lines

    def begin(self, owner: int, message: Message) -> None:
        """Take what the owner says before the turn: classes, which rows are waited for, values of the others."""
        classes, waited, values = unpack(message, np.uint8, np.bool_, array_of(self.values).dtype)
        mine = slice(self._bounds[owner], self._bounds[owner + 1])
        self.classes[mine], self._waited[mine] = classes, waited
        self._put(mine, ~waited, values)

    def complete(self, owner: int, message: Message) -> None:
        """Take the values that were waited for."""
        mine = slice(self._bounds[owner], self._bounds[owner + 1])
        self._put(mine, self._waited[mine], unpack(message, array_of(self.values).dtype)[0])

    def _put(self, mine: slice, which: NDArray[np.bool_], values: NDArray[Any]) -> None:
        array = array_of(self.values)
        array[mine][which] = values.reshape(-1, array.shape[1])

    def owner_of(self, lines: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return whose rows the lines hold."""
        return np.searchsorted(self._bounds, lines, side="right") - 1

    def first_line(self, owner: int) -> int:
        """Return the line where the rows of an owner begin."""
        return int(self._bounds[owner])


class Gradients:
    """The gradients of one turn, sorted by class and owner; sample order is kept.

    Parameters
    ----------
    turn, lookups, grad
        Which lines were looked up, and the gradients of the bags they went into.
    exact
        Whether each lookup's gradient travels, for the owner to add in the order of the samples of all workers; or
        else one sum for each row.
    """

    def __init__(self, turn: Turn, lookups: Lookups, grad: NDArray[np.float32], *, exact: bool) -> None:
        lines, bag_of, scale_of = lookups.in_sample_order(), lookups.bag_of, lookups.scale_of
        if not exact:
            sums = np.zeros((len(turn.classes), grad.shape[1]), np.float32)
            _sum(lines, bag_of, scale_of, grad, sums)
            lines = np.unique(lines)
            grad, bag_of, scale_of = sums[lines], bag_of[:0], scale_of[:0]
        self._turn, self._lines, self._bag_of, self._scale_of, self._grad = turn, lines, bag_of, scale_of, grad
        group = turn.classes[lines] * turn.world + turn.owner_of(lines)
        self._order = np.argsort(group, kind="stable")
        self._ends = np.searchsorted(group[self._order], np.arange(3 * turn.world + 1))

    def part(self, kind: int, owner: int) -> Message:
        """Pack what goes to one owner for its rows of one class."""
        at = kind * self._turn.world + owner
        chosen = self._order[self._ends[at] : self._ends[at + 1]]
        lines = (self._lines[chosen] - self._turn.first_line(owner)).astype(np.int32)
        index = np.empty(0, np.int32)
        if len(self._bag_of):  # a bag goes once, however many of its rows the owner has
            bags = self._bag_of[chosen]
            first = np.diff(bags, prepend=-1) != 0
            index = (np.cumsum(first) - 1).astype(np.int32)
            chosen_grad = self._grad[bags[first]]
        else:
            chosen_grad = self._grad[chosen]
        return pack(lines, index, self._scale_of[chosen] if len(self._scale_of) else self._scale_of, chosen_grad)


def given(message: Message, request: Local, dim: int) -> Given:
    """Unpack what a worker has sent, for the rows it had requested."""
    lines, bags, scales, grad = unpack(message, *_TYPES)
    return request[lines], bags if len(bags) else np.arange(len(lines), dtype=np.int32), scales, grad.reshape(-1, dim)
