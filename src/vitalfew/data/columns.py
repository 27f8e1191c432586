"""The columns of a log as numbers and keys, before any encoding is learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vitalfew.data._features import READ_AS, feature_keys, read_as
from vitalfew.data._values import labels, numbers, times
from vitalfew.data.readers import LogReader
from vitalfew.data.schema import Schema

__all__ = ["Values", "column_values", "read_columns", "time_text"]


class Values(NamedTuple):
    """A column of a batch: numbers (NaN: missing), or keys with which of them are there; lists have lengths."""

    name: str
    values: NDArray[np.float64] | NDArray[np.uint64]
    valid: NDArray[np.bool_]
    lengths: NDArray[np.int64] | None


def read_columns(
    reader: LogReader, schema: Schema, progress: Callable[[float], None]
) -> Iterator[tuple[pa.RecordBatch, NDArray[np.int64], NDArray[np.float32]]]:
    """Yield the batches of a log with their times and labels."""
    assert schema.time is not None
    columns = [schema.label, schema.time, *schema.numeric, *schema.categorical, *schema.lists]
    types = None
    if reader.is_text:
        types = {name: READ_AS[kind] for name, kind in read_as(schema, reader.types, ()).items()}
    row = 0
    for batch in reader.batches(columns, types=types, progress=progress):
        when = times(batch.column(schema.time), schema.time, row)
        yield batch, when, labels(batch.column(schema.label), schema.label, row)
        row += batch.num_rows


def column_values(batch: pa.RecordBatch, schema: Schema, first_row: int = 0) -> Iterator[Values]:
    """Yield the columns of a batch: numeric ones, then the features."""
    for name in schema.numeric:
        values = numbers(batch.column(name), name, first_row)
        yield Values(name, values, ~np.isnan(values), None)
    for name, keys, valid, lengths in feature_keys(batch, schema, ()):
        yield Values(name, keys.view(np.uint64), valid, lengths)


def time_text(value: int, type_: pa.DataType) -> str:
    """Return a time as people read it, from the number that `times` makes of it."""
    if pa.types.is_integer(type_):
        return str(value)
    if pa.types.is_floating(type_) or pa.types.is_decimal(type_):
        return f"{value / 1e6:.15g}"
    return str(np.datetime64(value, "us").astype("datetime64[m]")).replace("T", " ")
