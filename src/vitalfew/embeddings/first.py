"""The values that rows begin with: a function of seed, row and column, so that a row can begin when it is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["FirstRows"]

_CHUNK = 1 << 16
_GOLD = np.uint64(0x9E3779B97F4A7C15)


@njit(nogil=True, cache=True)
def _uniform(ids: Any, lines: Any, starts: Any, bounds: Any, seed: Any, out: Any) -> None:
    dim = out.shape[1]
    for i in range(len(ids)):
        bound = bounds[np.searchsorted(starts, ids[i], side="right") - 1]
        key = (np.uint64(ids[i]) * _GOLD) ^ seed
        row = out[lines[i]]
        for d in range(dim):
            x = key + np.uint64(d + 1) * np.uint64(0xD1342543DE82EF95)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
            row[d] = bound * (np.float32(np.int64(x >> np.uint64(40)) - 2**23) / np.float32(2**23))


class FirstRows:
    """First weights, uniform in ``+-1/sqrt(num_rows)`` of the table as in the DLRM reference code.

    Parameters
    ----------
    num_rows
        Rows of each table; ids run over all of them.
    seed
        The same seed gives the same rows, whatever order they are asked for in.

    Examples
    --------
    >>> first = FirstRows([4, 9], seed=0)
    >>> first(np.array([12]), 2).shape, bool((first(np.array([12]), 2) == first(np.arange(13), 2)[12]).all())
    ((1, 2), True)
    """

    def __init__(self, num_rows: Sequence[int], seed: int) -> None:
        self._starts = np.cumsum([0, *num_rows[:-1]])
        self._bounds = np.array([1 / math.sqrt(n) for n in num_rows], np.float32)
        self.seed = seed

    @classmethod
    def drawn(cls, num_rows: Sequence[int], generator: torch.Generator | None) -> FirstRows:
        """Take the seed from a generator, or from torch's own."""
        return cls(num_rows, int(torch.randint(2**62, (), generator=generator, device="cpu")))

    def __call__(self, ids: NDArray[np.int64], dim: int) -> NDArray[np.float32]:
        """Return the first weights of rows, shape (ids, dim)."""
        out = np.empty((len(ids), dim), np.float32)
        self.into(out, np.arange(len(ids), dtype=np.int32), ids)
        return out

    def into(self, out: NDArray[np.float32], lines: NDArray[np.int32], ids: NDArray[np.int64]) -> None:
        """Write the first weights of rows into lines of an array."""
        _uniform(ids, lines, self._starts, self._bounds, np.uint64(self.seed), out)

    def fill(self, weight: Tensor, start: int = 0) -> None:
        """Write the first weights of the rows from `start` on into a tensor of any kind of float."""
        for first in range(0, len(weight), _CHUNK):
            part = weight[first : first + _CHUNK]
            ids = np.arange(start + first, start + first + len(part))
            part.copy_(torch.from_numpy(self(ids, part.shape[1])))
