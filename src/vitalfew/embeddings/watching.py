"""The rows that are looked at for staleness: their snapshots, and what became of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitalfew.core import InputError
from vitalfew.embeddings.first import FirstRows
from vitalfew.embeddings.rows import Rows
from vitalfew.embeddings.staleness import RowHistory
from vitalfew.embeddings.tiered_rows import TieredRows

__all__ = ["Watch", "most_visited"]

_CHUNK = 1 << 15
"""Rows that are read and compared at a time."""


def most_visited(visits: NDArray[np.uint32], count: int, keep: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows to watch, in rising order: those to keep, and the most visited of the others.

    Examples
    --------
    >>> most_visited(np.uint32([5, 0, 9, 7, 1]), 2, np.array([4]))
    array([2, 4])
    """
    free = min(max(count - len(keep), 0), int(np.count_nonzero(visits)))
    if not free:
        return np.sort(keep)
    others = visits.copy()
    others[keep] = 0
    cut = max(int(np.partition(others, -free)[-free]), 1)
    above = np.flatnonzero(others > cut)
    ties = np.flatnonzero(others == cut)[: free - len(above)]
    return np.sort(np.concatenate([keep, above, ties]))


class Watch:
    """Some rows of a slab, their snapshots and their history, line by line.

    Parameters
    ----------
    rows
        They count their visits from now on.
    first
        What rows begin with: a row that has moved from there by the time it is watched has begun to learn.
    num_rows
        Of all tables.
    count
        Rows to watch at most, with those that are stale.
    """

    def __init__(self, rows: Rows, first: FirstRows, num_rows: int, count: int) -> None:
        self._rows, self._first, self.most = rows, first, count
        self.visits = np.zeros(num_rows, np.uint32)
        self._set(np.empty(0, np.int64))

    def _set(self, ids: NDArray[np.int64]) -> None:
        n = len(ids)
        self.ids = ids
        self.history = RowHistory.of(n)
        self.stale = np.zeros(n, np.bool_)
        self.probation = np.zeros(n, np.bool_)
        """Stale, and in training all the same until it is looked at again."""
        self._at = np.zeros(n, np.uint32)  # visits when the snapshot was taken
        self._snapshot = torch.empty((n, self._rows.weight.shape[1]), dtype=self._rows.weight.dtype, device="cpu")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of snapshots, history and visits."""
        per_row = 8 + 2 + 4 + sum(getattr(self.history, f.name).itemsize for f in fields(RowHistory))
        return int(self._snapshot.nbytes + per_row * len(self) + self.visits.nbytes)

    def choose(self) -> None:
        """Watch the rows that were visited most by now; what is stale stays, and what is known of a row as well."""
        former, known = self.ids, {name: getattr(self, name) for name in ("stale", "probation", "_at", "_snapshot")}
        history = self.history
        self._set(most_visited(self.visits, self.most, former[self.stale]))
        place = np.searchsorted(former, self.ids)
        place[place == len(former)] = 0
        have = former[place] == self.ids if len(former) else np.zeros(len(self), np.bool_)
        line = place[have]
        for f in fields(RowHistory):
            getattr(self.history, f.name)[have] = getattr(history, f.name)[line]
        self.stale[have], self.probation[have] = known["stale"][line], known["probation"][line]
        self._at[have] = known["_at"][line]
        self._snapshot[torch.from_numpy(have)] = known["_snapshot"][torch.from_numpy(line)]
        new = np.flatnonzero(~have)
        for start in range(0, len(new), _CHUNK):
            some = new[start : start + _CHUNK]
            weights, began = self._weights(self.ids[some]), self._first(self.ids[some], self._snapshot.shape[1])
            self._snapshot[torch.from_numpy(some)] = weights
            self.history.peak[some] = _changes(weights, torch.from_numpy(began))
        self._at[new] = self.visits[self.ids[new]]

    def look(self, min_visits: int) -> NDArray[np.bool_]:
        """Compare the rows that were updated often enough with their snapshots, and renew these; says which."""
        history, now = self.history, self.visits[self.ids]
        history.visits[:] = now
        history.recent[:] = now - self._at
        looked: NDArray[np.bool_] = history.recent >= min_visits
        lines = np.flatnonzero(looked)
        for start in range(0, len(lines), _CHUNK):
            some = lines[start : start + _CHUNK]
            at = torch.from_numpy(some)
            weights = self._weights(self.ids[some])
            history.change[some] = _changes(weights, self._snapshot[at])
            self._snapshot[at] = weights
        history.peak[lines] = np.maximum(history.peak[lines], history.change[lines])
        self._at[lines] = now[lines]
        return looked

    def _weights(self, ids: NDArray[np.int64]) -> Tensor:
        # Wherever they lie: what is in memory at this moment is for the clock to decide.
        if isinstance(self._rows, TieredRows):
            return self._rows.columns(ids)["weight"]
        return self._rows.weight[torch.from_numpy(ids)]

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything as tensors."""
        found = {f.name: torch.from_numpy(getattr(self.history, f.name).copy()) for f in fields(RowHistory)}
        found |= {name: torch.from_numpy(getattr(self, name).copy()) for name in ("ids", "stale", "probation")}
        counts = {"all_visits": self.visits, "at": self._at}
        found |= {name: torch.from_numpy(array.view(np.int32).copy()) for name, array in counts.items()}
        return found | {"snapshot": self._snapshot.clone(), "first": torch.tensor(self._first.seed)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take it all back."""
        if len(state["all_visits"]) != len(self.visits) or state["snapshot"].shape[1:] != self._snapshot.shape[1:]:
            raise InputError(
                f"the state is of {len(state['all_visits']):,} rows x {state['snapshot'].shape[1]}, the tables have "
                f"{len(self.visits):,} x {self._snapshot.shape[1]}",
                hint="load it beside the tables it was made with",
            )
        self._set(state["ids"].numpy().copy())
        for f in fields(RowHistory):
            getattr(self.history, f.name)[:] = state[f.name].numpy()
        self.stale[:], self.probation[:] = state["stale"].numpy(), state["probation"].numpy()
        self.visits[:], self._at[:] = state["all_visits"].numpy().view(np.uint32), state["at"].numpy().view(np.uint32)
        self._snapshot.copy_(state["snapshot"])
        self._first.seed = int(state["first"])


def _changes(now: Tensor, before: Tensor) -> NDArray[np.float32]:
    from vitalfew.embeddings import _kernels_stale as kernels

    out = np.empty(len(now), np.float32)
    kernels.relative_changes(now.float().numpy(), before.float().numpy(), out)
    return out
