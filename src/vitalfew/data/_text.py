"""One delimited text file (CSV, TSV, Criteo; plain or gzip) as a stream of record batches."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc_csv

from vitalfew.core.errors import InputError
from vitalfew.data._criteo import criteo_types, whole_rows

__all__ = ["TextFile"]

_BLOCK_BYTES = 1 << 20  # types are inferred from the first block; Arrow reads some 32 ahead
_GZIP_MAGIC = b"\x1f\x8b"
_BAD_VALUE = re.compile(r"In CSV column #(\d+).* conversion error to ([^:]+): invalid value '(.*)'", re.DOTALL)
_NOUN = {"int64": "whole number", "double": "number", "bool": "truth value (true or false)"}
_EXACT_FLOAT = 2.0**53  # beyond it a float no longer holds every whole number


class TextFile:
    """Column names, inferred types and batches of one file, read block by block."""

    num_rows: int | None = None
    is_text = True

    def __init__(self, path: Path, format: str, *, skip_bad_rows: bool, text: Collection[str]) -> None:  # noqa: A002
        self.path = path
        self.num_bytes = path.stat().st_size
        self.num_bad_rows = 0
        self._criteo = format == "criteo"
        self._delimiter = "," if format == "csv" else "\t"
        self._skip = skip_bad_rows
        if self.num_bytes == 0:
            raise InputError(f"`{path}` is empty", hint="check that it was written to its end")
        self.columns: tuple[str, ...] = ()
        self.types: dict[str, pa.DataType] = {}
        self.types, self.has_rows = self._peek()
        self.types |= {name: pa.string() for name in text if name in self.types}
        self.columns = tuple(self.types)
        self.num_bad_rows = 0

    def batches(
        self, columns: Sequence[str], types: Mapping[str, pa.DataType], batch_rows: int
    ) -> Iterator[tuple[pa.RecordBatch, float]]:
        """Yield batches, each with the share of the file read so far."""
        self.num_bad_rows = 0
        kinds = {name: types.get(name, self.types[name]) for name in columns}
        with self._open() as (raw, stream):
            for piece in self._pieces(stream):
                for block in self._parse(piece, kinds):
                    share = min(raw.tell() / self.num_bytes, 1.0)
                    for start in range(0, block.num_rows, batch_rows):
                        yield block.slice(start, batch_rows), share

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[pa.NativeFile, pa.NativeFile]]:
        """Open the file twice: as it lies on the disk, which tells the progress, and as text."""
        with pa.OSFile(str(self.path)) as raw:
            magic = raw.read(len(_GZIP_MAGIC))
            raw.seek(0)
            if magic != _GZIP_MAGIC:
                yield raw, raw
                return
            with pa.CompressedInputStream(raw, "gzip") as stream:
                yield raw, stream

    def _pieces(self, stream: pa.NativeFile) -> Iterator[pa.NativeFile]:
        """Return what is parsed in one go: the whole text, or blocks whose ragged rows are filled up."""
        if not self._criteo:
            yield stream
            return
        try:
            for block in whole_rows(stream, len(self.types), _BLOCK_BYTES):
                yield pa.BufferReader(block)
        except (pa.ArrowException, OSError) as error:
            raise self._explain(error, None) from None

    def _parse(
        self, stream: pa.NativeFile, kinds: Mapping[str, pa.DataType] | None
    ) -> Generator[pa.RecordBatch, None, None]:
        """Parse text into batches of the columns in `kinds`; without it, of all columns with inferred types."""
        bad_row: list[pc_csv.InvalidRow] = []

        def on_bad_row(row: pc_csv.InvalidRow) -> str:
            if self._skip:
                self.num_bad_rows += 1
                return "skip"
            bad_row.append(row)
            return "error"

        try:
            reader = pc_csv.open_csv(
                stream,
                # One thread reads 250 MB/s, and only then are the lines numbered for the messages.
                read_options=pc_csv.ReadOptions(
                    use_threads=False, block_size=_BLOCK_BYTES, column_names=list(self.types) if self._criteo else None
                ),
                parse_options=pc_csv.ParseOptions(
                    delimiter=self._delimiter,
                    quote_char=False if self._criteo else '"',
                    newlines_in_values=not self._criteo,
                    invalid_row_handler=on_bad_row,
                ),
                convert_options=pc_csv.ConvertOptions(
                    column_types=kinds, include_columns=None if kinds is None else list(kinds)
                ),
            )
            with reader:
                yield from reader
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise self._explain(error, bad_row[0] if bad_row else None) from None

    def _peek(self) -> tuple[dict[str, pa.DataType], bool]:
        """Infer names and types from the first block."""
        try:
            with self._open() as (_, stream):
                if self._criteo:
                    head = stream.read(_BLOCK_BYTES)
                    return criteo_types(head), bool(head.strip())
                with contextlib.closing(self._parse(stream, None)) as blocks:
                    block = next(blocks, None)
            if block is None:
                return {}, False
            names = block.schema.names
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise self._explain(error, None) from None
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(f"`{self.path}` has two columns named `{twice[0]}`", hint="give each column its own name")
        return {name: self._type(name, block.column(name)) for name in names}, block.num_rows > 0

    def _type(self, name: str, array: pa.Array) -> pa.DataType:
        kind = array.type
        if pa.types.is_binary(kind):
            raise self._not_utf8(f"column `{name}` of `{self.path}`")
        if pa.types.is_floating(kind):
            values = array.drop_null().to_numpy(zero_copy_only=False)
            values = values[np.isfinite(values)]
            # Identifiers of 64 bits overflow whole numbers; as floats they would lose their last digits.
            if values.size and np.abs(values).max() >= _EXACT_FLOAT and np.all(values == np.floor(values)):
                return pa.string()
        if pa.types.is_null(kind) or pa.types.is_time(kind):
            return pa.string()
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            # Later values may have fractions of a second, or a time of the day at all.
            return pa.timestamp("ns", kind.tz if pa.types.is_timestamp(kind) else None)
        return kind

    def _explain(self, error: Exception, bad_row: pc_csv.InvalidRow | None) -> InputError:
        """Turn an error of the parser into one that names the file, the column and the value."""
        message = str(error).strip()
        if bad_row is not None:
            where = "a row" if bad_row.number is None or self._criteo else f"row {bad_row.number}"
            return InputError(
                f"{where} of `{self.path}` has {_fields(bad_row.actual_columns)}, "
                f"expected {bad_row.expected_columns}: {bad_row.text[:60]!r}",
                hint="repair it, or leave such rows out with --bad-rows skip",
            )
        if isinstance(error, UnicodeDecodeError) or "UTF8" in message or "UTF-8" in message:
            return self._not_utf8(f"`{self.path}`")
        if value := _BAD_VALUE.search(message):
            # A value of the first block fails before the names are known.
            name = self.columns[int(value[1])] if self.columns else f"number {int(value[1]) + 1}"
            return InputError(
                f"column `{name}` of `{self.path}` holds {value[3]!r}, which is no {_noun(value[2])}",
                hint=f"repair it, name `{name}` a numeric column, or read it as text: open_log(..., text=[{name!r}])"
                if value[2] == "int64"
                else "repair it or leave it empty (missing)",
            )
        if "straddling" in message:
            return InputError(
                f"`{self.path}` has a row longer than {_BLOCK_BYTES >> 20} MiB", hint="look for an unclosed quote"
            )
        if "Empty CSV" in message:
            return InputError(f"`{self.path}` is empty", hint="check that it was written to its end")
        if "Truncated compressed" in message or "inflate failed" in message:
            return InputError(
                f"`{self.path}` ends in the middle or is damaged ({message})", hint="check with gzip -t, copy it again"
            )
        return InputError(f"`{self.path}` cannot be read ({message.splitlines()[0]})", hint="check the file")

    def _not_utf8(self, what: str) -> InputError:
        return InputError(
            f"{what} is not UTF-8 text", hint=f"convert it, for example: iconv -f latin1 -t utf-8 {self.path.name}"
        )


def _noun(type_name: str) -> str:
    return "time" if type_name.startswith("timestamp") else _NOUN.get(type_name, type_name)


def _fields(count: int) -> str:
    return "1 field" if count == 1 else f"{count} fields"
