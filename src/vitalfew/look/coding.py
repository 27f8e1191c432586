"""Bins that the base of a log has learned, and rows sampled as these."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitalfew.data.columns import Values
from vitalfew.data.vocabulary import VocabularyBuilder

__all__ = ["Coder", "Rows"]

MISSING, OTHER = 0, 1
"""Codes that are no bin of one value: there is none; it is an id that shares a bin with all others of its kind."""
_EDGE_SAMPLE = 65_536
_DECILES = np.arange(1, 10) / 10


class Coder:
    """The bins of one column: deciles of numbers, or the most frequent ids, as the base has them.

    Attributes
    ----------
    kind
        numeric, categorical, list or cross.
    num_bins
        All codes are below.
    usual_new
        The share of new values to expect if nothing changes: by Good and Turing, the share of the base's values that
        came up once.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.num_bins = 0
        self.usual_new = 0.0
        self._builder = None if kind == "numeric" else VocabularyBuilder()
        self._seen = Rows(_EDGE_SAMPLE)
        self._low, self._high = np.inf, -np.inf

    def learn(self, values: Values, is_base: NDArray[np.bool_], rng: np.random.Generator) -> None:
        """Take in those rows of a batch that belong to the base."""
        kept = is_base if values.lengths is None else np.repeat(is_base, values.lengths)
        if self._builder is not None:
            self._builder.add(values.values[kept].view(np.uint64), values.valid[kept])
            return
        there = values.values[kept & values.valid].astype(np.float64, copy=False)
        if len(there):
            self._low, self._high = min(self._low, float(there.min())), max(self._high, float(there.max()))
            self._seen.add(there[:, None], rng)

    def finish(self, most_bins: int, min_count: int) -> None:
        """Settle the bins."""
        if self._builder is None:
            seen = self._seen.codes[:, 0] if self._low <= self._high else np.zeros(1)
            # A value that is common enough to be several deciles is one bin.
            self._edges = np.unique(np.quantile(seen, _DECILES, method="inverted_cdf"))
            self.num_bins = len(self._edges) + 2
            return
        self._vocabulary = self._builder.finish()
        counts = self._vocabulary.counts[1:]
        self.usual_new = float((counts == 1).sum() / max(counts.sum(), 1))
        self._frequent = min(int((counts >= min_count).sum()), most_bins)
        self.num_bins = self._frequent + 2

    def codes(self, values: Values) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the code of each value, and which values the base does not have.

        An id that the base does not have shares its code with the rare ones: in a long tail most ids are new at any
        time, and a code of their own would be a drift that is none.
        """
        if self._builder is None:
            numbers = values.values.astype(np.float64, copy=False)
            bins = np.searchsorted(self._edges, numbers) + 1
            outside = (numbers < self._low) | (numbers > self._high)
            return np.where(values.valid, bins, MISSING), outside & values.valid
        row = self._vocabulary.rows(values.values.view(np.uint64), values.valid)
        bins = np.where((row > 0) & (row <= self._frequent), row + OTHER, OTHER)
        return np.where(values.valid, bins, MISSING), values.valid & (row == 0)

    def one_per_row(
        self, codes: NDArray[np.int64], lengths: NDArray[np.int64] | None, rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """Return one code for each row: of a list that of an item drawn by chance, of an empty one that of none."""
        if lengths is None:
            return codes
        at = np.cumsum(lengths) - lengths + (rng.random(len(lengths)) * lengths).astype(np.int64)
        return np.where(lengths > 0, np.append(codes, MISSING)[at], MISSING)


class Rows:
    """A sample of rows that stream by, each as likely as any other.

    Attributes
    ----------
    codes
        The rows that are kept, in no order.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lots = np.zeros(0)
        self.codes: NDArray[Any] = np.zeros((0, 0), np.int64)

    def add(self, rows: NDArray[Any], rng: np.random.Generator) -> None:
        """Draw a lot for each row, and keep those with the lowest of all."""
        lots = rng.random(len(rows))
        if len(self._lots) == self._most:
            hopeful = lots < self._lots.max()
            rows, lots = rows[hopeful], lots[hopeful]
        if not len(rows):
            return
        lots = np.concatenate([self._lots, lots])
        rows = np.concatenate([self.codes, rows]) if len(self._lots) else rows
        if len(lots) > self._most:
            best = np.argpartition(lots, self._most)[: self._most]
            lots, rows = lots[best], rows[best]
        self._lots, self.codes = lots, rows
