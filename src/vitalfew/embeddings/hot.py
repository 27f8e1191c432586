"""Train in turns on samples whose rows are all hot, and on the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitalfew.core import Budget, Comparison, InputError, Line, Receipt
from vitalfew.data.log import EncodedLog
from vitalfew.embeddings.choosing import HotSet, hot_rows
from vitalfew.embeddings.log_rows import LogRows
from vitalfew.embeddings.phases import KINDS, Kind, Phase, Place, next_rate
from vitalfew.embeddings.tables import EmbeddingBags
from vitalfew.embeddings.tiered import TieredEmbeddings
from vitalfew.tiers.policies import Static

__all__ = ["HotRows"]


@dataclass(slots=True)
class _Seen:
    """What the phases of one kind have been through."""

    phases: int = 0
    batches: int = 0
    moved: int = 0


class HotRows:
    """The samples of a log in batches that are hot throughout, or not, in phases of either kind.

    The rows of the hot samples fit a budget of fast memory, so that hot phases move no rows. An epoch has every sample
    once, the last partial batch of each kind included. Only the order differs from plain shuffling: results are, bit
    for bit, those of plain training on the same batches.

    Parameters
    ----------
    tables
        Their rows and optimizer state are what the budget is for. Over tiers, with the policy `Static`, the hot rows
        stay in the fast memory as long as there is room.
    ids, offsets
        Of all samples, as `EmbeddingBags` takes them; or an `EncodedLog`, which is read block by block.
    batch_size
        Samples in a batch.
    budget
        For the hot rows: a size, a share of the rows, or a number of rows; see `hot_rows`.
    hot
        A set chosen before; `budget` is then not used.
    sample
        Share of the samples that are counted to choose the rows.
    rate
        Percent of an epoch's batches of a kind in a phase, to begin with; see `report`.
    seed
        With the number of the epoch it gives the order.

    Examples
    --------
    >>> import torch
    >>> from vitalfew.embeddings import SGD, EmbeddingBags, HotRows, Table
    >>> tables = EmbeddingBags([Table("user", 100, 4)], SGD(lr=0.5))
    >>> ids = torch.arange(40).reshape(-1, 1) % 10 * (torch.arange(40).reshape(-1, 1) % 3)
    >>> hot = HotRows(tables, ids, batch_size=8, budget=5)
    >>> for phase in hot.epoch(0):
    ...     for numbers in phase:
    ...         tables(ids[numbers]).sum().backward()
    ...     print(phase.kind, len(phase))
    cold 1
    hot 2
    cold 1
    hot 2

    Notes
    -----
    Cost: two passes over the ids to begin with, one byte per sample and per row, and eight per sample while an epoch
    runs.

    References
    ----------
    Adnan et al., Accelerating Recommendation System Training by Leveraging Popular Choices, VLDB 2021.
    """

    def __init__(
        self,
        tables: EmbeddingBags,
        ids: Tensor | NDArray[Any] | EncodedLog,
        offsets: Tensor | NDArray[Any] | None = None,
        *,
        batch_size: int,
        budget: Budget | float | int | str = "256 MiB",
        hot: HotSet | None = None,
        sample: float = 1.0,
        rate: int = 50,
        seed: int = 0,
    ) -> None:
        if batch_size < 1 or seed < 0:
            raise InputError(f"batch_size {batch_size} and seed {seed} will not do", hint="1 or more, and 0 or more")
        self.tables, self.batch_size, self.seed = tables, batch_size, seed
        self.rate = next_rate(rate, [])
        """Percent of an epoch's batches of a kind in each phase that comes."""
        self.losses: list[float] = []
        """What was reported."""
        self._budget: Budget | float | int | str = budget if hot is None else max(len(hot), 1)
        self._sample = sample
        self._place: Place | None = None
        self._resumed: Place | None = None
        self._seen: dict[Kind, _Seen] = {kind: _Seen() for kind in KINDS}
        self._switches = 0
        self._samples = LogRows(tables, ids, offsets)
        if not len(self._samples):
            raise InputError("there are no samples", hint="pass the ids of the whole log")
        self._take(self._choose() if hot is None else hot)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row with its optimizer state, and where it moves, its statistics."""
        if isinstance(self.tables, TieredEmbeddings):
            return self.tables.store.record.nbytes
        return self.tables.rows.nbytes // self.tables.num_rows

    @property
    def share(self) -> float:
        """Share of the samples whose rows are all hot."""
        return int(np.count_nonzero(self._is_hot)) / len(self._is_hot)

    def _choose(self) -> HotSet:
        counts = self._samples.counts(self._sample, self.seed)
        rows = [table.num_rows for table in self.tables.tables]
        return hot_rows(counts, rows, self._budget, row_bytes=self.row_bytes)

    def _take(self, hot: HotSet) -> None:
        """Use a hot set from now on."""
        if hot.num_rows != self.tables.num_rows:
            raise InputError(
                f"the hot rows are of {hot.num_rows:,} rows, the tables have {self.tables.num_rows:,}",
                hint="choose them for these tables",
            )
        if isinstance(self.tables, TieredEmbeddings) and len(hot) > self.tables.room.slots:
            raise InputError(
                f"{len(hot):,} hot rows do not fit the fast memory, which holds {self.tables.room.slots:,}",
                hint="lower budget, or give the tables more memory",
            )
        self.hot = hot
        """The hot rows."""
        self._is_hot = self._samples.all_hot(hot.mask())
        num_hot = int(np.count_nonzero(self._is_hot))
        num = {"hot": num_hot, "cold": len(self._is_hot) - num_hot}
        self._total = {kind: -(-num[kind] // self.batch_size) for kind in KINDS}
        self._keep(hot.ids)

    def _keep(self, ids: NDArray[np.int64]) -> None:
        """Let the fast memory keep these rows, where that is its policy."""
        if isinstance(self.tables, TieredEmbeddings) and isinstance(self.tables.policy, Static):
            with self.tables.store.lock:
                self.tables.store.residency.keep(ids)

    # -- the order

    def __len__(self) -> int:
        """Batches of an epoch."""
        return sum(self._total.values())

    def epoch(self, number: int) -> Iterator[Phase]:
        """Yield the phases of an epoch, cold and hot in turns, until all batches of both kinds are used up.

        After `load_state_dict` the epoch that was broken off goes on from there.
        """
        if number < 0:
            raise InputError(f"there is no epoch {number}", hint="they count from 0")
        resumed, self._resumed = self._resumed, None
        place = resumed if resumed is not None and resumed.epoch == number else Place(number)
        self._place = place
        return self._run(place)

    def _run(self, place: Place) -> Iterator[Phase]:
        if self._place is not place:
            raise InputError("another epoch has begun, or the hot rows have changed", hint="finish the epoch first")
        batches = self._shuffled(place.epoch)
        last: Kind | None = None
        while (span := place.next(self._total, self.rate)) is not None:
            kind, start, stop = span
            before = self._rows_moved()
            yield Phase(kind, batches[kind][start:stop])
            if self._place is not place:
                raise InputError("another epoch has begun, or the hot rows have changed", hint="finish the epoch first")
            seen = self._seen[kind]
            seen.phases, seen.batches = seen.phases + 1, seen.batches + stop - start
            seen.moved += self._rows_moved() - before
            self._switches += last not in (None, kind)
            last = kind

    def order(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return all batches of an epoch in their order, as long as the rate stays what it is."""
        batches, place = self._shuffled(epoch), Place(epoch)
        order: list[NDArray[np.int64]] = []
        while (span := place.next(self._total, self.rate)) is not None:
            kind, start, stop = span
            order.extend(batches[kind][start:stop])
        return order

    def _shuffled(self, epoch: int) -> dict[Kind, tuple[NDArray[np.int64], ...]]:
        found: dict[Kind, tuple[NDArray[np.int64], ...]] = {}
        for k, kind in enumerate(KINDS):
            numbers = np.flatnonzero(self._is_hot == (kind == "hot"))
            numbers = np.random.default_rng([self.seed, epoch, k]).permutation(numbers)
            starts = range(0, len(numbers), self.batch_size)
            found[kind] = tuple(numbers[start : start + self.batch_size] for start in starts)
        return found

    def report(self, loss: float) -> int:
        """Tell the loss on held-back samples after a phase; returns the rate of the phases that come.

        A loss that rises halves the rate, so that the kinds alternate more often; see `next_rate`.
        """
        self.rate = next_rate(self.rate, [*self.losses, loss])
        self.losses.append(float(loss))
        return self.rate

    # -- change

    def drift(self, ids: Tensor | NDArray[Any] | EncodedLog, offsets: Tensor | NDArray[Any] | None = None) -> float:
        """Return by how much these samples look up the hot rows less than those they were chosen for.

        That is a difference of shares of lookups: 0 is the same, 0.1 is ten percent of the lookups.
        """
        return self._drift(LogRows(self.tables, ids, offsets))

    def _drift(self, samples: LogRows) -> float:
        return self.hot.coverage - samples.covered(self.hot.mask())

    def refresh(
        self,
        ids: Tensor | NDArray[Any] | EncodedLog,
        offsets: Tensor | NDArray[Any] | None = None,
        *,
        max_drift: float = 0.1,
    ) -> bool:
        """Go on with other samples, such as those of the next day; between epochs.

        Where the drift is larger than `max_drift`, the hot rows are chosen anew for them.

        Returns
        -------
        bool
            Whether they were.
        """
        place = self._place or self._resumed
        if place is not None and not place.is_over(self._total):
            raise InputError(f"epoch {place.epoch} is not finished", hint="finish it first, or undo()")
        samples = LogRows(self.tables, ids, offsets)
        if not len(samples):
            raise InputError("there are no samples", hint="pass the ids of a log")
        drifted = self._drift(samples) > max_drift
        self._samples, self._place, self._resumed = samples, None, None
        self._take(self._choose() if drifted else self.hot)
        return drifted

    # -- the handle

    def __enter__(self) -> HotRows:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Break off the epoch, and let the tables' own policy say again which rows stay."""
        self._place = self._resumed = None
        if isinstance(self.tables, TieredEmbeddings) and isinstance(self.tables.policy, Static):
            self._keep(self.tables.policy.hot)

    def state_dict(self, done: int | None = None) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on in the middle of an epoch.

        Parameters
        ----------
        done
            Batches of the phase given last that were trained; by default all.
        """
        place = self._place or self._resumed
        return {
            "samples": len(self._is_hot), "batch_size": self.batch_size, "seed": self.seed, "rate": self.rate,
            "losses": list(self.losses), "hot": torch.from_numpy(self.hot.ids.copy()),
            "threshold": self.hot.threshold, "coverage": self.hot.coverage,
            "place": None if place is None else place.back(done).to_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one was that was made for the same samples: call `epoch` with the same number."""
        mine = {"samples": len(self._is_hot), "batch_size": self.batch_size, "seed": self.seed}
        if wrong := [name for name, value in mine.items() if state[name] != value]:
            raise InputError(
                f"the state is of {wrong[0]} {state[wrong[0]]}, not {mine[wrong[0]]}", hint="make it as it was"
            )
        ids = state["hot"].numpy().astype(np.int64)
        nbytes, rows = len(ids) * self.row_bytes, self.tables.num_rows
        self._take(HotSet(ids, state["threshold"], state["coverage"], nbytes, rows))
        self.rate, self.losses = next_rate(state["rate"], []), list(state["losses"])
        place = state["place"]
        self._place = None
        self._resumed = None if place is None else Place(**(place | {"used": dict(place["used"])}))

    def _rows_moved(self) -> int:
        if not isinstance(self.tables, TieredEmbeddings):
            return 0
        moves = self.tables.moves
        return int(moves.missed - moves.fresh + moves.left - moves.clean)

    def receipt(self, comparison: Comparison | None = None) -> Receipt:
        """Return how much of the log is hot, and what moved in phases of either kind.

        Parameters
        ----------
        comparison
            Of paired runs with and without this; without it the verdict is open.
        """
        hot, cold = self._seen["hot"], self._seen["cold"]
        all_bytes = self.tables.num_rows * self.row_bytes
        lines = [
            Line("samples whose rows are all hot", "share", None, self.share, "counted"),
            Line("batches whose rows are all hot", "share", None, self._total["hot"] / len(self), "counted"),
            Line("rows and state to keep", "B", all_bytes, self.hot.nbytes, "counted", note="before: all rows"),
            Line("lookups that find a hot row", "share", None, self.hot.coverage, "counted", note="when chosen"),
            Line("phases", "", None, hot.phases + cold.phases, "counted"),
            Line("switches between kinds", "", None, self._switches, "counted"),
        ]
        if isinstance(self.tables, TieredEmbeddings):
            per = {kind: seen.moved * self.row_bytes / max(seen.batches, 1) for kind, seen in self._seen.items()}
            lines.append(
                Line("row bytes moved per hot batch", "B", per["cold"], per["hot"], "counted", note="before: per cold")
            )
        method = f"hot rows, {len(self.hot):,} of {self.hot.num_rows:,}"
        if comparison is None:
            why = "no paired run was made: counts alone do not show the time or the quality"
            return Receipt("batches of hot rows", method, tuple(lines), "undecided", why)
        return Receipt(
            "batches of hot rows", method, tuple(lines), comparison.verdict, comparison.why, str(comparison.rule),
            quality=(comparison.quality,), pairs=comparison.pairs, pairs_needed=comparison.pairs_needed,
        )  # fmt: skip
