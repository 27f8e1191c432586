# mypy: disable-error-code="assignment"
# A variable of a kernel has one machine type, which numba infers; mypy sees the widest of several.

"""Kernels that look at rows for staleness: which samples could be skipped, and how far rows have moved."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def skippable(rows: Any, offsets: Any, width: Any, stale: Any, share: Any, out: Any) -> None:
    """Say of each sample whether a share of its lookups, or more, are of stale rows; one without lookups stays.

    Sample s has the lookups from ``offsets[s * width]`` to ``offsets[(s + 1) * width]``, or, where `offsets` is empty,
    those from ``s * width`` on.
    """
    for s in range(len(out)):
        if len(offsets):
            first, last = offsets[s * width], offsets[(s + 1) * width]
        else:
            first, last = s * width, (s + 1) * width
        found = 0
        for i in range(first, last):
            found += stale[np.uint64(rows[i])] != 0
        out[s] = last > first and found >= share * (last - first)


@njit(nogil=True, cache=True)
def relative_changes(now: Any, before: Any, out: Any) -> None:
    """Write the 2-norm of each row's change over that of the row before."""
    for i in range(len(now)):
        moved, size = 0.0, 0.0
        for d in range(now.shape[1]):
            was = np.float64(before[i, d])
            step = np.float64(now[i, d]) - was
            moved += step * step
            size += was * was
        out[i] = np.sqrt(moved) / (np.sqrt(size) + 1e-12)
