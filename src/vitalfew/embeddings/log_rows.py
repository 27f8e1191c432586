"""The rows that the samples of a whole log look up, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitalfew.core import InputError
from vitalfew.data.log import EncodedLog
from vitalfew.embeddings._kernels_choose import count_rows
from vitalfew.embeddings.choosing import flags_of
from vitalfew.embeddings.rows import as_integers, as_offsets
from vitalfew.embeddings.tables import EmbeddingBags
from vitalfew.embeddings.tiered_rows import row_ids

__all__ = ["LogRows"]

_BLOCK = 65_536
_NONE = np.empty(0, np.int64)


class LogRows:
    """All samples of a log: arrays that the user has, which are not copied, or an encoded log, read block by block.

    Parameters
    ----------
    tables
        What the ids are for.
    ids, offsets
        As `EmbeddingBags` takes them; or an `EncodedLog`, and no offsets.
    """

    def __init__(self, tables: EmbeddingBags, ids: Tensor | NDArray[Any] | EncodedLog, offsets: Any = None) -> None:
        if not isinstance(tables, EmbeddingBags):
            raise InputError(f"a {type(tables).__name__} is no EmbeddingBags", hint="pass the tables of the model")
        self._layout, self._num_rows = tables.layout, tables.num_rows
        self.width = len(tables.features)
        self._log: EncodedLog | None = None
        self._ids: NDArray[Any] = _NONE
        self._edges = _NONE
        if isinstance(ids, EncodedLog):
            if ids.features != tables.features or offsets is not None:
                raise InputError(
                    f"the log has the features {', '.join(ids.features)}, the tables {', '.join(tables.features)}",
                    hint="make the tables for this log, and pass it without offsets",
                )
            self._log, self._len = ids, len(ids)
            return
        if isinstance(ids, Tensor):
            as_integers(ids.reshape(-1)[:0], "ids")  # refuses what will not do, and copies nothing
            ids = ids.detach().numpy()
        self._ids = np.asarray(ids)
        if self._ids.dtype.kind not in "iu":
            raise InputError(f"ids must be integers, got {self._ids.dtype}", hint="encode them")
        if offsets is None:
            if self._ids.ndim != 2 or self._ids.shape[1] != self.width:
                raise InputError(
                    f"expected ids of shape (samples, {self.width}), got {self._ids.shape}",
                    hint="one column per feature, or a flat array with offsets",
                )
            self._len = len(self._ids)
            return
        self._ids = self._ids.reshape(-1)
        self._edges = as_offsets(torch.tensor(np.asarray(offsets), device="cpu"), len(self._ids))
        self._len, beside = divmod(len(self._edges) - 1, self.width)
        if beside:
            raise InputError(
                f"{len(self._edges) - 1} bags do not divide among {self.width} features",
                hint="bag = sample * features + feature",
            )

    def __len__(self) -> int:
        return self._len

    def counts(self, share: float = 1.0, seed: int = 0) -> NDArray[np.int64]:
        """Return how often each row is looked up by the samples, or by a share of them drawn at random."""
        if not 0 < share <= 1:
            raise InputError(f"a sample must lie in (0, 1], got {share}", hint="1.0 counts all samples")
        counts = np.zeros(self._num_rows, np.int64)
        rng = np.random.default_rng([seed, 0, 2])  # apart from the streams that shuffle
        for rows, edges in self._blocks():
            if share < 1:
                lengths = np.diff(edges) if len(edges) else np.full(len(rows) // self.width, self.width)
                rows = rows[np.repeat(rng.random(len(lengths)) < share, lengths)]
            count_rows(rows, counts)
        return counts

    def all_hot(self, flags: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Tell for each sample whether all rows it looks up are flagged."""
        found = [flags_of(rows, edges, self.width, flags) for rows, edges in self._blocks()]
        return np.concatenate([np.empty(0, bool), *found])

    def covered(self, flags: NDArray[np.uint8]) -> float:
        """Return the share of the lookups that go to flagged rows."""
        hits = total = 0
        for rows, _ in self._blocks():
            hits, total = hits + int(np.count_nonzero(flags[rows])), total + len(rows)
        return hits / total if total else 0.0

    def _blocks(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield rows over all tables, and where those of each sample begin; nothing there for one row per feature."""
        for start in range(0, self._len, _BLOCK):
            ids, edges = self._block(start, min(start + _BLOCK, self._len))
            try:
                rows = row_ids(self._layout, ids, edges)
            except InputError:
                if self._log is None:  # of all samples, so that the error names the right one
                    row_ids(self._layout, self._ids.astype(np.int64).reshape(-1), self._edges)
                raise
            yield rows, edges[:: self.width]

    def _block(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if self._log is not None:
            block = self._log.block(start, stop)
            return block.ids.reshape(-1), _NONE if block.offsets is None else block.offsets
        if not len(self._edges):
            return self._ids[start:stop].astype(np.int64).reshape(-1), _NONE
        edges = self._edges[start * self.width : stop * self.width + 1]
        return self._ids[edges[0] : edges[-1]].astype(np.int64), edges - edges[0]
