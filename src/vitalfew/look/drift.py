"""Look at a log over time: which columns drift, by how much, and whether rows of later slices can be told apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vitalfew.core import InputError
from vitalfew.core.intervals import Interval
from vitalfew.data import Schema
from vitalfew.data.columns import Values, column_values, read_columns, time_text
from vitalfew.data.split import time_slices
from vitalfew.embeddings.options import LogOptions, Progress, open_with, silent
from vitalfew.look.coding import MISSING, Coder, Rows
from vitalfew.look.shift import chance_psi, domain_auc, new_id_share, psi

__all__ = ["ColumnDrift", "DriftLook", "SliceLook", "look_at_drift"]

SHIFT, LARGE = 0.1, 0.25
"""A rule of thumb for the population stability index."""
_CHANCE = 0.01
"""Columns have as many bins as keep what chance alone adds to the index below this."""
_LEAST_BINS, _MOST_BINS = 10, 1000
_SAMPLE = 4096
"""Rows of each slice that the classifier sees."""
_FEWEST = 50


@dataclass(frozen=True, slots=True)
class SliceLook:
    """A stretch of time.

    Attributes
    ----------
    start, stop
        Its first and last time.
    rows, click_rate
        How many rows it has, and the share of these with label 1.
    auc
        How well a classifier tells its rows from those of the base, over all columns; None for the base, and where
        there are too few rows.
    """

    start: str
    stop: str
    rows: int
    click_rate: float
    auc: Interval | None


@dataclass(frozen=True, slots=True)
class ColumnDrift:
    """What one column does over time, a number for each slice after the base.

    Attributes
    ----------
    kind
        numeric, categorical, list or cross.
    bins
        Of the stability index.
    chance
        What chance alone adds to the index of each slice.
    psi
        Population stability index against the base.
    new, usual_new
        Share of the values that the base does not have (of numbers, those outside its range), and the share to expect
        if nothing changes.
    missing
        Share of the rows without a value, or with an empty list.
    auc
        As `SliceLook.auc`, of this column alone; None where there are too few rows.
    """

    name: str
    kind: str
    bins: int
    chance: tuple[float, ...]
    psi: tuple[float, ...]
    new: tuple[float, ...]
    usual_new: float
    missing: tuple[float, ...]
    auc: tuple[float | None, ...]

    @property
    def finding(self) -> str:
        """The largest index of a slice, each less what chance adds, in a word: steady, shifted or far."""
        # Twice: that ids are the frequent ones of the base is chance too, and adds about as much again.
        most = max(psi - 2 * chance for psi, chance in zip(self.psi, self.chance, strict=True))
        return "steady" if most < SHIFT else "shifted" if most < LARGE else "far"


@dataclass(frozen=True, slots=True)
class DriftLook:
    """How a log changes over time.

    Attributes
    ----------
    time
        The column that has it.
    base, slices
        The stretch that all others are compared with, and those.
    columns
        The features, in the order of the schema.
    exact
        Whether the slices were cut at exact shares; beyond 50 million rows a sample says where.
    """

    time: str
    base: SliceLook
    slices: tuple[SliceLook, ...]
    columns: tuple[ColumnDrift, ...]
    exact: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        columns = [dataclasses.asdict(column) | {"finding": column.finding} for column in self.columns]
        return {**dataclasses.asdict(self), "columns": columns, "how": {"psi": "counted", "auc": "measured"}}


def look_at_drift(
    path: str | Sequence[str],
    options: LogOptions,
    slices: int = 8,
    *,
    reference: float | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> DriftLook:
    """Cut a log into slices of time, and measure how far each column is from the first of them.

    Parameters
    ----------
    path, options
        The log, with its time. Ids are taken as they are: `hash_rows` and `direct` change nothing.
    slices
        Of about equal numbers of rows; the first is the base.
    reference
        The share of the rows that makes the base instead; the other slices divide the rest.
    seed
        Of the rows that the classifier sees.

    Raises
    ------
    InputError
        If there is no time, or all rows have the same.

    Notes
    -----
    Numbers fall into the deciles of the base. Of ids, the most frequent of the base have bins of their own, as many
    as keep what chance adds to the index at 0.01 (10 to 1,000). All others share one: rarer ones, those below
    `min_count`, and those that the base does not have, for in a long tail some ids are new at any time. Missing values
    have a bin too. Of a list each item counts; the classifier sees one item, drawn by chance.

    Cost: three passes over the log, memory for the distinct values of the base and some thousand rows of each slice.
    """
    if options.time is None:
        raise InputError("drift is a matter of time, and no column is the time", hint="name it with --time")
    reader, schema = open_with(path if isinstance(path, str) else list(path), options)
    cuts, exact = time_slices(reader, options.time, slices, reference, lambda share: progress("slices", share))
    coders = {name: Coder(kind) for name, kind in _kinds(schema)}
    total = base_rows = 0
    rng = np.random.default_rng(seed)
    for batch, when, _ in read_columns(reader, schema, lambda share: progress("learn the base", share)):
        is_base = when <= cuts[0]
        for values in column_values(batch, schema, total):
            coders[values.name].learn(values, is_base, rng)
        total, base_rows = total + len(when), base_rows + int(is_base.sum())
    smallest = max((total - base_rows) // max(len(cuts) - 1, 1), 1)
    bins = 1 + _CHANCE / (1 / base_rows + 1 / smallest)
    for coder in coders.values():
        coder.finish(int(np.clip(bins, _LEAST_BINS, _MOST_BINS)), options.min_count)
    tally = _Tally(len(cuts), coders, rng)
    for batch, when, label in read_columns(reader, schema, lambda share: progress("count", share)):
        place = np.minimum(np.searchsorted(cuts, when), len(cuts) - 1)
        tally.add(place, when, label, column_values(batch, schema))
    type_ = reader.types[options.time]
    return DriftLook(options.time, *tally.slices(type_), tuple(tally.columns(progress)), exact)


def _kinds(schema: Schema) -> Iterator[tuple[str, str]]:
    for kind, names in (("numeric", schema.numeric), ("categorical", schema.categorical), ("list", schema.lists)):
        yield from ((name, kind) for name in names)
    plain = (*schema.categorical, *schema.lists)
    yield from ((name, "cross") for name in schema.features if name not in plain)


class _Tally:
    """Counts of every column and slice, and a sample of rows of each slice."""

    def __init__(self, num_slices: int, coders: dict[str, Coder], rng: np.random.Generator) -> None:
        self._coders, self._rng = coders, rng
        self._counts = {name: np.zeros((num_slices, coder.num_bins), np.int64) for name, coder in coders.items()}
        self._rows, self._clicks = np.zeros(num_slices, np.int64), np.zeros(num_slices, np.int64)
        self._new, self._empty = ({name: np.zeros(num_slices, np.int64) for name in coders} for _ in range(2))
        self._first = np.full(num_slices, np.iinfo(np.int64).max)
        self._last = np.full(num_slices, np.iinfo(np.int64).min)
        self._samples = [Rows(_SAMPLE) for _ in range(num_slices)]

    def add(
        self, place: NDArray[np.int64], when: NDArray[np.int64], label: NDArray[np.float32], columns: Iterator[Values]
    ) -> None:
        """Count the rows of a batch, each in its slice."""
        size = len(self._rows)
        self._rows += np.bincount(place, minlength=size)
        self._clicks += np.bincount(place[label > 0], minlength=size)
        np.minimum.at(self._first, place, when)
        np.maximum.at(self._last, place, when)
        drawn = []
        for values in columns:
            coder, counts = self._coders[values.name], self._counts[values.name]
            codes, is_new = coder.codes(values)
            where = place if values.lengths is None else np.repeat(place, values.lengths)
            counts += np.bincount(where * coder.num_bins + codes, minlength=counts.size).reshape(counts.shape)
            there = values.valid
            if values.lengths is not None:
                counts[:, MISSING] += np.bincount(place[values.lengths == 0], minlength=size)
                row = np.repeat(np.arange(len(place)), values.lengths)
                there = np.bincount(row[values.valid], minlength=len(place)) > 0
            self._new[values.name] += np.bincount(where[is_new], minlength=size)
            self._empty[values.name] += np.bincount(place[~there], minlength=size)
            drawn.append(coder.one_per_row(codes, values.lengths, self._rng))
        rows = np.stack(drawn, axis=1)
        for k, sample in enumerate(self._samples):
            sample.add(rows[place == k], self._rng)

    def slices(self, type_: pa.DataType) -> tuple[SliceLook, tuple[SliceLook, ...]]:
        """Return the base, and the others with what tells them from it."""
        found = []
        for k, rows in enumerate(self._rows.tolist()):
            start, stop = (time_text(int(each[k]), type_) for each in (self._first, self._last))
            told = self._told(k, slice(None)) if k else None
            found.append(SliceLook(start, stop, rows, float(self._clicks[k] / rows), told))
        return found[0], tuple(found[1:])

    def columns(self, progress: Progress) -> Iterator[ColumnDrift]:
        """Yield what each column does."""
        for j, (name, coder) in enumerate(self._coders.items()):
            counts, later = self._counts[name], range(1, len(self._rows))
            sums = [max(int(rows), 1) for rows in counts.sum(axis=1)]
            # Bins that are empty throughout say nothing, and smoothing would let them.
            used = counts.sum(axis=0) > 0
            told = [self._told(k, slice(j, j + 1)) for k in later]
            yield ColumnDrift(
                name,
                coder.kind,
                int(used.sum()),
                tuple(chance_psi(int(used.sum()), sums[0], sums[k]) for k in later),
                tuple(psi(counts[0][used], counts[k][used]) for k in later),
                tuple(new_id_share([1, 0], self._known_and_new(name, k)) for k in later),
                coder.usual_new,
                tuple(float(self._empty[name][k] / self._rows[k]) for k in later),
                tuple(None if each is None else each.mean for each in told),
            )
            progress("tell apart", (j + 1) / len(self._coders))

    def _known_and_new(self, name: str, k: int) -> tuple[int, int]:
        there, new = int(self._counts[name][k][1:].sum()), int(self._new[name][k])
        return there - new, new

    def _told(self, k: int, columns: slice) -> Interval | None:
        first, last = self._samples[0].codes[:, columns], self._samples[k].codes[:, columns]
        return domain_auc(first, last) if min(len(first), len(last)) >= _FEWEST else None
