"""Learn from a log how to turn its rows into numbers, and do it, batch by batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vitalfew.core.errors import InputError
from vitalfew.data._features import READ_AS, check_kind, feature_keys, kinds_of, read_as
from vitalfew.data._fit import LabelCounts, Moments, Table, TableCounts, standardised
from vitalfew.data._store import load_tables, save_tables
from vitalfew.data._values import compress, labels, numbers, times
from vitalfew.data.encoded import Encoded
from vitalfew.data.readers import LogReader, unknown_column
from vitalfew.data.schema import Schema
from vitalfew.data.split import is_test
from vitalfew.data.vocabulary import Direct, Vocabulary

__all__ = ["Encoder"]


class Encoder:
    """Turns rows of a log into what a model reads; made by `fit` or `load`.

    Attributes
    ----------
    schema
        What each column is for.
    tables
        For each feature the `Vocabulary`, `Hashed` or `Direct` that gives its rows.
    label_counts
        Rows with a negative and with a positive label among those it learned from.
    num_missing
        Missing values of each numeric column among the rows it learned from.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from vitalfew.data import infer_schema, open_log
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "log.csv"
    >>> _ = file.write_text("click,user,price" + chr(10) + "1,ann,0.5" + chr(10) + "0,bob,1.5" + chr(10) + "0,ann,")
    >>> log = open_log(file)
    >>> encoder = Encoder.fit(log, infer_schema(log, label="click"))
    >>> rows = encoder.encode(next(encoder.batches(log)))
    >>> rows.ids.tolist(), rows.dense.round(2).tolist()
    ([[1], [2], [1]], [[-1.0], [1.0], [0.0]])

    Notes
    -----
    Cost: one pass over the columns in use; memory for the distinct values of each vocabulary (see `Vocabulary`).
    """

    def __init__(
        self,
        schema: Schema,
        tables: Mapping[str, Table],
        *,
        kinds: Mapping[str, str],
        read: Mapping[str, str],
        mean: npt.NDArray[np.float64],
        deviation: npt.NDArray[np.float64],
        num_missing: Mapping[str, int],
        label_counts: tuple[int, int],
        negative: int,
    ) -> None:
        self.schema = schema
        self.tables = dict(tables)
        self.num_missing = dict(num_missing)
        self.label_counts = label_counts
        self._kinds, self._read = dict(kinds), dict(read)
        self._mean, self._deviation = mean, deviation
        self._negative = negative

    @classmethod
    def fit(
        cls,
        reader: LogReader,
        schema: Schema,
        *,
        hash_rows: Mapping[str, int] | int | None = None,
        direct: Collection[str] = (),
        min_count: int = 1,
        seed: int = 0,
        until: int | None = None,
        test_share: float | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Encoder:
        """Learn vocabularies, the scale of the numeric columns and the labels in one pass.

        Parameters
        ----------
        reader, schema
            The log, and what each column is for.
        hash_rows
            Features to hash, each to that many rows; a number hashes every feature that is not direct.
        direct
            Features whose ids are row numbers already. The largest id of the whole log sets the size of the table.
        min_count
            Values seen less often share row 0 with the missing ones.
        seed
            Chooses the hash, and the rows that `test_share` holds back.
        until
            Learn only from rows whose time is not later, so that nothing leaks from the test slice.
        test_share
            Instead of `until`: leave out the rows that `write_log` with this share and seed holds back at random.
        progress
            Is called with the share done.
        """
        if until is not None and (schema.time is None or test_share is not None):
            why = "no column is the time" if schema.time is None else "test_share splits without one"
            raise InputError(f"until needs a time, and {why}", hint="name the time column, or choose one way to split")
        moments, label_counts = Moments(len(schema.numeric)), LabelCounts(schema.label)
        counts = TableCounts(schema, hash_rows, direct, seed)
        read = read_as(schema, reader.types, direct)
        kinds = kinds_of(schema, reader.types, direct)
        num_rows = 0
        for batch in _batches(reader, _columns(schema), read, progress):
            for name, kind in kinds.items():
                check_kind(name, kind, batch.column(name).type)
            kept = None
            if schema.time is not None:  # checked even where it does not choose
                when = times(batch.column(schema.time), schema.time, num_rows)
                kept = when <= until if until is not None else None
            if test_share is not None:
                kept = ~is_test(np.arange(num_rows, num_rows + batch.num_rows), test_share, seed)
            label = labels(batch.column(schema.label), schema.label, num_rows)
            label_counts.add(label if kept is None else label[kept])
            for j, name in enumerate(schema.numeric):
                values = compress(numbers(batch.column(name), name, num_rows))
                moments.add(j, values if kept is None else values[kept])
            counts.add(batch, kept)
            num_rows += batch.num_rows
        negative = label_counts.negative
        num_labels = label_counts.counts[negative], label_counts.counts[1]
        if not any(num_labels):
            which = "is left to learn from" if until is None else f"has a time up to {until}"
            raise InputError(f"no row of `{reader.name}` {which}", hint="choose another split")
        return cls(
            schema,
            counts.finish(min_count),
            kinds=kinds,
            read=read,
            mean=moments.mean,
            deviation=moments.deviation,
            num_missing=dict(zip(schema.numeric, moments.num_missing.tolist(), strict=True)),
            label_counts=num_labels,
            negative=negative,
        )

    @property
    def num_rows(self) -> dict[str, int]:
        """The rows of each feature's table."""
        return {name: table.num_rows for name, table in self.tables.items()}

    @property
    def counts(self) -> dict[str, npt.NDArray[np.uint64]]:
        """How often each row came up, for features with a vocabulary."""
        return {name: table.counts for name, table in self.tables.items() if isinstance(table, Vocabulary)}

    def batches(
        self,
        reader: LogReader,
        *,
        labels: bool = True,
        batch_rows: int = 131_072,
        progress: Callable[[float], None] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Read from a log the columns that `encode` needs; those of text files with the types it learned."""
        columns = _columns(self.schema, labels=labels)
        for name in columns:
            if name not in reader.types:
                raise unknown_column(name, reader.columns, f"`{reader.name}`")
        return _batches(reader, columns, self._read, progress, batch_rows)

    def encode(self, batch: pa.RecordBatch, *, labels: bool = True, first_row: int = 0) -> Encoded:
        """Return the rows of a batch as numbers.

        Parameters
        ----------
        batch
            Holds every feature column; with `labels` also the label, and the time if the schema has one.
        labels
            Whether to encode label and time; without, as for a prediction, they may be absent.
        first_row
            The number of the first row in the log, for messages.

        Raises
        ------
        InputError
            If a column is absent or of another kind than learned, or a value cannot be used.
        """
        for name in _columns(self.schema, labels=labels):
            if name not in batch.schema.names:
                raise unknown_column(name, batch.schema.names, "the rows")
        for name, kind in self._kinds.items():
            check_kind(name, kind, batch.column(name).type)
        when = self.schema.time if labels else None
        return Encoded(
            self._dense(batch, first_row),
            *self._ids(batch),
            label=self._label(batch, first_row) if labels else None,
            time=None if when is None else times(batch.column(when), when, first_row),
        )

    def _dense(self, batch: pa.RecordBatch, first_row: int) -> npt.NDArray[np.float32]:
        dense = np.empty((batch.num_rows, len(self.schema.numeric)), np.float32)
        for j, name in enumerate(self.schema.numeric):
            values = numbers(batch.column(name), name, first_row)
            dense[:, j] = standardised(values, self._mean[j], self._deviation[j])
        return dense

    def _label(self, batch: pa.RecordBatch, first_row: int) -> npt.NDArray[np.float32]:
        name = self.schema.label
        label = labels(batch.column(name), name, first_row)
        other = label == (0 if self._negative == -1 else -1)
        if other.any():
            row = first_row + int(np.argmax(other)) + 1
            raise InputError(
                f"the label `{name}` holds {label[other][0]:g} in row {row}",
                hint=f"the encoder learned the labels {self._negative} and 1",
            )
        return np.maximum(label, 0)

    def _ids(self, batch: pa.RecordBatch) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
        shape = batch.num_rows, len(self.tables)
        rows: list[npt.NDArray[np.int64]] = []
        lengths = np.ones(shape, np.int64)
        direct = [name for name, table in self.tables.items() if isinstance(table, Direct)]
        for j, (name, keys, valid, length) in enumerate(feature_keys(batch, self.schema, direct)):
            table = self.tables[name]
            if isinstance(table, Direct):
                rows.append(table.rows(keys.view(np.int64), valid, name))
            else:
                rows.append(table.rows(keys.view(np.uint64), valid))
            if length is not None:
                lengths[:, j] = length
        if not self.schema.lists:
            ids = np.empty(shape, np.int64)
            for j, column in enumerate(rows):
                ids[:, j] = column
            return ids, None
        offsets = np.zeros(lengths.size + 1, np.int64)
        np.cumsum(lengths.ravel(), out=offsets[1:])
        flat = np.empty(offsets[-1], np.int64)
        starts = offsets[:-1].reshape(shape)
        for j, column in enumerate(rows):
            # Value k of a list goes k places behind the start of its bag.
            length = lengths[:, j]
            before = np.repeat(np.cumsum(length) - length, length)
            flat[np.repeat(starts[:, j], length) + np.arange(len(column)) - before] = column
        return flat, offsets

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `encoder.json` and `encoder.npz` into a folder; plain numbers and text, no pickle."""
        body = {
            "data_schema": self.schema.to_dict(),
            "kinds": self._kinds,
            "read": self._read,
            "mean": self._mean.tolist(),
            "deviation": self._deviation.tolist(),
            "num_missing": self.num_missing,
            "label_counts": list(self.label_counts),
            "negative": self._negative,
        }
        save_tables(Path(folder), body, self.tables)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Encoder:
        """Read what `save` wrote."""
        body, tables = load_tables(Path(folder))
        return cls(
            Schema.from_dict(body["data_schema"]),
            tables,
            kinds=body["kinds"],
            read=body["read"],
            mean=np.array(body["mean"], np.float64),
            deviation=np.array(body["deviation"], np.float64),
            num_missing=body["num_missing"],
            label_counts=(body["label_counts"][0], body["label_counts"][1]),
            negative=body["negative"],
        )


def _columns(schema: Schema, *, labels: bool = True) -> list[str]:
    extra = [schema.label, *((schema.time,) if schema.time else ())] if labels else []
    return [*extra, *schema.numeric, *schema.categorical, *schema.lists]


def _batches(
    reader: LogReader,
    columns: list[str],
    read: Mapping[str, str],
    progress: Callable[[float], None] | None,
    batch_rows: int = 131_072,
) -> Iterator[pa.RecordBatch]:
    types = {name: READ_AS[read[name]] for name in columns if name in read} if reader.is_text else None
    return reader.batches(columns, types=types, batch_rows=batch_rows, progress=progress)
