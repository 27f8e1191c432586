"""One Parquet file as a stream of record batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vitalfew.core.errors import InputError

__all__ = ["ParquetFile"]

_BUFFER_BYTES = 1 << 20  # a column is read in pieces of this size, not a whole row group at a time


class ParquetFile:
    """Column names, types and batches of one file; only its footer stays in memory."""

    num_bad_rows = 0
    is_text = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = path.stat().st_size
        if self.num_bytes == 0:
            raise InputError(f"`{path}` is empty", hint="check that it was written to its end")
        try:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                self.num_rows: int = file.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from None
        self.columns: tuple[str, ...] = tuple(schema.names)
        self.types: dict[str, pa.DataType] = dict(zip(schema.names, schema.types, strict=True))

    def batches(
        self, columns: Sequence[str], types: Mapping[str, pa.DataType], batch_rows: int
    ) -> Iterator[tuple[pa.RecordBatch, float]]:
        """Yield batches, each with the share of the file read so far."""
        done = 0
        try:
            with pq.ParquetFile(self.path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
                for batch in file.iter_batches(batch_size=batch_rows, columns=list(columns)):
                    done += batch.num_rows
                    arrays = [self._cast(batch, name, types.get(name)) for name in columns]
                    yield pa.RecordBatch.from_arrays(arrays, names=list(columns)), done / self.num_rows
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from None

    def _cast(self, batch: pa.RecordBatch, name: str, kind: pa.DataType | None) -> pa.Array:
        array = batch.column(name)
        if kind is None or array.type == kind:
            return array
        try:
            return array.cast(kind)
        except pa.ArrowException as error:
            raise InputError(
                f"column `{name}` of `{self.path}` is {array.type} and cannot be read as {kind} ({_line(error)})",
                hint="read the column as it is",
            ) from None

    def _unreadable(self, error: Exception) -> InputError:
        return InputError(
            f"`{self.path}` is not a readable Parquet file ({_line(error)})",
            hint="check that it was copied to its end, or name its format",
        )


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
