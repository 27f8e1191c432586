"""A batch of encoded rows: what a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["Encoded"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Rows as arrays; ids are rows of the embedding tables.

    Parameters
    ----------
    dense
        Numeric features, standardised: float32 of shape (n, number of numeric columns).
    ids
        One id for each row and feature: int64 of shape (n, F). With list features it is flat, and `offsets` cuts it.
    offsets
        None, or int64 of shape (n * F + 1): bag number row * F + feature is ids[offsets[bag]:offsets[bag + 1]].
    label
        0 or 1 for each row as float32, or None.
    time
        int64 for each row (microseconds for time stamps), or None.

    Examples
    --------
    >>> rows = Encoded(np.zeros((2, 0), np.float32), np.array([[1, 4], [2, 5]]))
    >>> rows.take(np.array([1])).ids
    array([[2, 5]])
    """

    dense: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64] | None = None
    label: npt.NDArray[np.float32] | None = None
    time: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.dense)

    @property
    def num_features(self) -> int:
        """The number of table features F."""
        if self.offsets is None:
            return int(self.ids.shape[1])
        return (len(self.offsets) - 1) // len(self) if len(self) else 0

    def take(self, rows: npt.NDArray[np.int64]) -> Encoded:
        """Return some rows, in the order named."""
        ids, offsets = self.ids, self.offsets
        if offsets is None:
            ids = np.take(ids, rows, axis=0)
        else:
            ids, offsets = _take_bags(ids, offsets, rows, self.num_features)
        return Encoded(
            np.take(self.dense, rows, axis=0),
            ids,
            offsets,
            None if self.label is None else self.label[rows],
            None if self.time is None else self.time[rows],
        )

    @staticmethod
    def concat(parts: Sequence[Encoded]) -> Encoded:
        """Return the rows of all parts, one after the other.

        Examples
        --------
        >>> row = Encoded(np.zeros((1, 0), np.float32), np.array([7, 8]), np.array([0, 2]))
        >>> Encoded.concat([row, row]).offsets
        array([0, 2, 4])
        """
        first = parts[0]
        if len(parts) == 1:
            return first
        offsets = None
        if first.offsets is not None:
            lengths = [np.diff(part.offsets) for part in parts if part.offsets is not None]
            offsets = np.concatenate(([0], np.cumsum(np.concatenate(lengths)))).astype(np.int64)
        return Encoded(
            np.concatenate([part.dense for part in parts]),
            np.concatenate([part.ids for part in parts]),
            offsets,
            None if first.label is None else np.concatenate([p.label for p in parts if p.label is not None]),
            None if first.time is None else np.concatenate([p.time for p in parts if p.time is not None]),
        )


@njit(cache=True, nogil=True)
def _take_bags(
    ids: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], num_features: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Gather the bags of some rows; those of one row lie next to each other."""
    out_offsets = np.zeros(rows.size * num_features + 1, np.int64)
    for i in range(rows.size):
        for j in range(num_features):
            bag, out = rows[i] * num_features + j, i * num_features + j
            out_offsets[out + 1] = out_offsets[out] + offsets[bag + 1] - offsets[bag]
    out_ids = np.empty(out_offsets[-1], np.int64)
    for i in range(rows.size):
        start, at = offsets[rows[i] * num_features], out_offsets[i * num_features]
        for k in range(out_offsets[(i + 1) * num_features] - at):
            out_ids[at + k] = ids[start + k]
    return out_ids, out_offsets
