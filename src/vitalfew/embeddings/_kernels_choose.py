"""One pass over the rows of many samples: how often each is looked up, and which samples look up flagged rows only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

__all__ = ["all_flagged", "count_rows"]


@njit(nogil=True, cache=True)
def _by_width(rows: Any, width: Any, flags: Any, out: Any) -> None:
    for sample in range(len(out)):
        flagged = True
        for i in range(sample * width, (sample + 1) * width):
            if flags[rows[i]] == 0:
                flagged = False
                break
        out[sample] = flagged


@njit(nogil=True, cache=True)
def _by_offsets(rows: Any, offsets: Any, flags: Any, out: Any) -> None:
    for sample in range(len(out)):
        flagged = True
        for i in range(offsets[sample], offsets[sample + 1]):
            if flags[rows[i]] == 0:
                flagged = False
                break
        out[sample] = flagged


@njit(nogil=True, cache=True)
def all_flagged(rows: Any, offsets: Any, width: Any, flags: Any) -> Any:
    """Tell for each sample whether all of its rows are flagged; a sample without rows is.

    Rows count over all tables and are not checked: they must lie in ``[0, len(flags))``.
    """
    samples = len(offsets) - 1 if len(offsets) else len(rows) // width
    out = np.empty(samples, np.bool_)
    if len(offsets):
        _by_offsets(rows, offsets, flags, out)
    else:
        _by_width(rows, width, flags, out)
    return out


@njit(nogil=True, cache=True)
def count_rows(rows: Any, counts: Any) -> None:
    """Add one to the count of each row, as often as it is named; rows are not checked."""
    for row in rows:
        counts[row] += 1
