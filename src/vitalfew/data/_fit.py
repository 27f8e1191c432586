"""What an encoder learns from a log in one pass."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vitalfew.core.errors import InputError
from vitalfew.data._features import feature_keys
from vitalfew.data._values import compress
from vitalfew.data.readers import unknown_column
from vitalfew.data.schema import Schema
from vitalfew.data.vocabulary import Direct, Hashed, Vocabulary, VocabularyBuilder

__all__ = ["LabelCounts", "Moments", "Table", "TableCounts"]

Table: TypeAlias = "Vocabulary | Hashed | Direct"


class Moments:
    """Mean and deviation of numeric columns, updated batch by batch (Chan, Golub and LeVeque).

    Examples
    --------
    >>> moments = Moments(1)
    >>> moments.add(0, np.array([1.0, 3.0, np.nan]))
    >>> float(moments.mean[0]), float(moments.deviation[0]), int(moments.num_missing[0])
    (2.0, 1.0, 1)
    """

    def __init__(self, num_columns: int) -> None:
        self.count = np.zeros(num_columns, np.int64)
        self.num_missing = np.zeros(num_columns, np.int64)
        self.mean = np.zeros(num_columns)
        self._squares = np.zeros(num_columns)

    def add(self, column: int, values: npt.NDArray[np.float64]) -> None:
        """Take in some values of a column; NaN is a missing one."""
        present = values[~np.isnan(values)]
        self.num_missing[column] += len(values) - len(present)
        if not len(present):
            return
        count, mean = len(present), float(present.mean())
        total = int(self.count[column]) + count
        step = mean - self.mean[column]
        self._squares[column] += ((present - mean) ** 2).sum() + step**2 * self.count[column] * count / total
        self.mean[column] += step * count / total
        self.count[column] = total

    @property
    def deviation(self) -> npt.NDArray[np.float64]:
        """The standard deviation; 1 where all values are equal, so that one may divide by it."""
        variance = self._squares / np.maximum(self.count, 1)
        return np.where(variance > 1e-24, np.sqrt(variance), 1.0)


class LabelCounts:
    """How often each label occurs, and whether the negative one is 0 or -1."""

    def __init__(self, column: str) -> None:
        self._column = column
        self.counts = {-1: 0, 0: 0, 1: 0}

    def add(self, labels: npt.NDArray[np.float32]) -> None:
        for value in self.counts:
            self.counts[value] += int(np.count_nonzero(labels == value))
        if self.counts[-1] and self.counts[0]:
            raise InputError(
                f"the label `{self._column}` holds -1 and 0", hint="a label is 0 or 1, true or false, or -1 or 1"
            )

    @property
    def negative(self) -> int:
        return -1 if self.counts[-1] else 0


class TableCounts:
    """The table of each feature in the making."""

    def __init__(self, schema: Schema, hash_rows: Mapping[str, int] | int | None, direct: Collection[str], seed: int):
        for name in (*direct, *(hash_rows if isinstance(hash_rows, Mapping) else ())):
            if name not in schema.features:
                raise unknown_column(name, schema.features, "the features")
        self._schema, self._seed = schema, seed
        self._direct = dict.fromkeys(direct, 0)
        if isinstance(hash_rows, Mapping):
            self._hash_rows = dict(hash_rows)
        else:
            names = [name for name in schema.features if name not in direct]
            self._hash_rows = {} if hash_rows is None else dict.fromkeys(names, hash_rows)
        both = [name for name in direct if name in self._hash_rows]
        if both:
            raise InputError(f"`{both[0]}` is to be hashed and direct", hint="name it in one of the two")
        crossed = [name for name in direct if name not in (*schema.categorical, *schema.lists)]
        if crossed:
            raise InputError(f"`{crossed[0]}` is a cross, whose keys are no row numbers", hint="hash it")
        self._hashed = {name: Hashed(num_rows, seed) for name, num_rows in self._hash_rows.items()}
        self._builders = {
            name: VocabularyBuilder()
            for name in schema.features
            if name not in self._hashed and name not in self._direct
        }

    def add(self, batch: pa.RecordBatch, kept: npt.NDArray[np.bool_] | None) -> None:
        """Count the values of the kept rows; ids that are row numbers are measured in all rows."""
        for name, keys, valid, lengths in feature_keys(batch, self._schema, self._direct):
            if name in self._direct:
                needed = Direct.needed(keys.astype(np.int64, copy=False), valid, name)
                self._direct[name] = max(self._direct[name], needed)
            elif name in self._builders:
                if kept is None:
                    self._builders[name].add(keys.view(np.uint64), valid)
                else:
                    mask = kept if lengths is None else np.repeat(kept, lengths)
                    self._builders[name].add(keys[mask].view(np.uint64), valid[mask])

    def finish(self, min_count: int) -> dict[str, Table]:
        """Return the tables in the order of the features."""
        tables: dict[str, Table] = {}
        for name in self._schema.features:
            if name in self._direct:
                tables[name] = Direct(max(self._direct[name], 1))
            elif name in self._hashed:
                tables[name] = self._hashed[name]
            else:
                tables[name] = self._builders.pop(name).finish(min_count)
        return tables


def standardised(values: npt.NDArray[np.float64], mean: float, deviation: float) -> npt.NDArray[np.float32]:
    """Return the compressed values with mean 0 and deviation 1; a missing one becomes 0, the mean."""
    return np.nan_to_num((compress(values) - mean) / deviation, nan=0.0).astype(np.float32)
