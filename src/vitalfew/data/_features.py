"""From a record batch to the keys of each table feature: categorical columns, lists, crosses."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vitalfew.core.errors import InputError
from vitalfew.data.keys import cross, keys, kind_of, whole_numbers
from vitalfew.data.schema import Schema, cross_name

__all__ = ["READ_AS", "FeatureKeys", "check_kind", "feature_keys", "kinds_of", "read_as"]

READ_AS: dict[str, pa.DataType] = {
    "integer": pa.int64(),
    "number": pa.float64(),
    "truth": pa.bool_(),
    "text": pa.string(),
    "time": pa.timestamp("ns"),
    "time in a zone": pa.timestamp("ns", "UTC"),
}


class FeatureKeys(NamedTuple):
    """What one feature holds in each row.

    `keys` are row numbers for a direct feature. `lengths` is None for one value a row, else the length of each list.
    """

    name: str
    keys: npt.NDArray[np.uint64] | npt.NDArray[np.int64]
    valid: npt.NDArray[np.bool_]
    lengths: npt.NDArray[np.int64] | None


def feature_keys(batch: pa.RecordBatch, schema: Schema, direct: Collection[str]) -> Iterator[FeatureKeys]:
    """Yield the keys of each feature in the order of `schema.features`."""
    in_crosses = {name for parts in schema.crosses for name in parts}
    kept = {}
    for name in schema.categorical:
        array = batch.column(name)
        if name in direct:
            yield FeatureKeys(name, *whole_numbers(array, name), None)
        if name in in_crosses or name not in direct:
            found = keys(array, column=name)
            if name in in_crosses:
                kept[name] = found
            if name not in direct:
                yield FeatureKeys(name, *found, None)
    for name in schema.lists:
        values, lengths = _flat(batch.column(name))
        if name in direct:
            yield FeatureKeys(name, *whole_numbers(values, name), lengths)
        else:
            yield FeatureKeys(name, *keys(values, column=name), lengths)
    for parts in schema.crosses:
        valid = np.logical_and.reduce([kept[name][1] for name in parts])
        yield FeatureKeys(cross_name(parts), cross([kept[name][0] for name in parts]), valid, None)


def kinds_of(schema: Schema, types: Mapping[str, pa.DataType], direct: Collection[str]) -> dict[str, str]:
    """Return whether each categorical or list column holds "integer" or "text"; direct ones must be integers."""
    kinds = {name: _kind(types[name]) for name in (*schema.categorical, *schema.lists)}
    for name in direct:
        if kinds.get(name, "integer") != "integer":
            raise InputError(
                f"column `{name}` is {types[name]}, so its values are no row numbers",
                hint="drop --direct to build a vocabulary, or hash it",
            )
    return kinds


def check_kind(name: str, expected: str, type_: pa.DataType) -> None:
    """Refuse text where the encoder learned numbers, and the reverse: none of the values would be known."""
    if not pa.types.is_null(type_) and _kind(type_) != expected:
        raise InputError(
            f"column `{name}` is {type_}, but the encoder learned it as {expected}",
            hint=f"store the column as {expected}, as in the training log",
        )


def read_as(schema: Schema, types: Mapping[str, pa.DataType], direct: Collection[str]) -> dict[str, str]:
    """Return how to read each column of a text file, whose types are only inferred from its beginning."""
    chosen = {}
    for name in (schema.label, *((schema.time,) if schema.time else ()), *schema.numeric, *schema.categorical):
        type_ = types[name]
        is_number = pa.types.is_integer(type_) or pa.types.is_floating(type_)
        if name in schema.numeric or (name == schema.label and is_number):
            chosen[name] = "number"
        elif name in direct or pa.types.is_integer(type_):
            chosen[name] = "integer"
        elif pa.types.is_boolean(type_):
            chosen[name] = "truth"
        elif pa.types.is_floating(type_):
            chosen[name] = "number"
        elif pa.types.is_timestamp(type_) or pa.types.is_date(type_):
            chosen[name] = "time in a zone" if pa.types.is_timestamp(type_) and type_.tz else "time"
        else:
            chosen[name] = "text"
    return chosen


def _kind(type_: pa.DataType) -> str:
    is_list = pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)
    return kind_of(type_.value_type if is_list else type_)


def _flat(array: pa.Array) -> tuple[pa.Array, npt.NDArray[np.int64]]:
    """Return the values of a list column in one piece, and the length of each list (0 for a missing one)."""
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if pa.types.is_fixed_size_list(array.type):
        array = array.cast(pa.list_(array.type.value_type))
    lengths = pc.list_value_length(array).fill_null(0).cast(pa.int64())
    return array.flatten(), lengths.to_numpy(zero_copy_only=False)
