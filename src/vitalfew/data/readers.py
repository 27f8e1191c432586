"""Read click logs (Parquet, CSV, TSV, the Criteo layout) as a stream of record batches with bounded memory."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import pyarrow as pa

from vitalfew.core.errors import InputError
from vitalfew.data._parquet import ParquetFile
from vitalfew.data._text import TextFile

__all__ = ["LogReader", "open_log", "unknown_column"]

PathLike: TypeAlias = "str | os.PathLike[str]"

_FORMAT_OF_SUFFIX = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".tsv": "tsv"}
_FORMATS = ("parquet", "csv", "tsv", "criteo")


def open_log(
    path: PathLike | Sequence[PathLike],
    *,
    format: str | None = None,  # noqa: A002
    bad_rows: Literal["error", "skip"] = "error",
    text: Collection[str] = (),
) -> LogReader:
    r"""Open a log: one file, several files, or a folder of files.

    Parameters
    ----------
    path
        A file, a folder (all Parquet or CSV files in it, sorted by name), or a list of these.
    format
        "parquet", "csv", "tsv" or "criteo"; by default the suffix tells, `.gz` allowed behind that of a text file.
        "criteo" is tab separated without a header (label, I1 to I13, C1 to C26) and must be named.
    bad_rows
        What to do with a text row that has the wrong number of fields.
    text
        Columns of a text file to read as text although they look like numbers, for instance "007".

    Raises
    ------
    InputError
        If a file is absent, empty, without rows or damaged, or the files disagree on their columns.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "clicks.csv"
    >>> _ = file.write_text("click,user,price\n1,ann,0.5\n0,bob,1.5\n")
    >>> log = open_log(file)
    >>> log.columns
    ('click', 'user', 'price')
    >>> [batch.num_rows for batch in log.batches(["click"])]
    [2]

    Notes
    -----
    Cost: a footer for each Parquet file, about 1 MiB of text for each other file.
    """
    if bad_rows not in ("error", "skip"):
        raise InputError(f"bad_rows must be 'error' or 'skip', got {bad_rows!r}")
    if format is not None and format not in _FORMATS:
        raise InputError(f"unknown format {format!r}", hint=f"use one of {', '.join(_FORMATS)}")
    paths = [path] if isinstance(path, str | os.PathLike) else list(path)
    found = [file for each in paths for file in _files(Path(each), format)]
    if not found:
        raise InputError("the list of files is empty", hint="name at least one file")
    formats = {file: format or _format_of(file) for file in found}
    if len(set(formats.values())) > 1:
        raise InputError(f"the files mix formats: {', '.join(sorted(set(formats.values())))}", hint="keep one format")
    files = [
        ParquetFile(file) if kind == "parquet" else TextFile(file, kind, skip_bad_rows=bad_rows == "skip", text=text)
        for file, kind in formats.items()
    ]
    log = LogReader(files)
    for name in text:
        if name not in log.types:
            raise unknown_column(name, log.columns, f"`{log.name}`")
    return log


class LogReader:
    """The columns of a log and its rows in batches; made by `open_log`.

    Attributes
    ----------
    columns, types
        Names in file order, and the Arrow type of each. Those of a text file are inferred from its first 1 MiB.
    num_rows
        Rows in all files; None for text, which does not say.
    num_bytes
        Bytes on the disk.
    is_text
        Whether the types are inferred, so that `batches(types=...)` may choose others.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "clicks.csv"
    >>> _ = file.write_text("click,user" + chr(10) + "1,7" + chr(10) + "0,8")
    >>> [batch.to_pydict() for batch in open_log(file).batches(["user"], types={"user": pa.string()})]
    [{'user': ['7', '8']}]
    """

    def __init__(self, files: Sequence[ParquetFile | TextFile]) -> None:
        first = next((file for file in files if _has_rows(file)), None)
        if first is None:
            kind = "a header but no rows" if files[0].is_text else "no rows"
            raise InputError(f"`{files[0].path}` has {kind}", hint="check that it was written to its end")
        for name in first.columns:
            if first.columns.count(name) > 1:
                raise InputError(f"`{first.path}` has two columns named `{name}`", hint="give each its own name")
        self._files = [file for file in files if _has_rows(file)]
        for file in self._files:
            for name in first.columns:
                if name not in file.types:
                    raise unknown_column(name, file.columns, f"`{file.path}`")
        self.columns = first.columns
        self.types = dict(first.types)
        self.is_text = first.is_text
        self.num_bytes = sum(file.num_bytes for file in self._files)
        counts = [file.num_rows for file in self._files]
        self.num_rows = None if first.is_text else sum(count for count in counts if count is not None)

    @property
    def name(self) -> str:
        """The path of the first file, for messages."""
        return str(self._files[0].path)

    @property
    def num_bad_rows(self) -> int:
        """Rows left out in the latest pass because of their number of fields."""
        return sum(file.num_bad_rows for file in self._files)

    def batches(
        self,
        columns: Sequence[str] | None = None,
        *,
        types: Mapping[str, pa.DataType] | None = None,
        batch_rows: int = 131_072,
        progress: Callable[[float], None] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Stream the rows in file order.

        Parameters
        ----------
        columns
            Which columns, in which order; all by default.
        types
            The type to read a column as, where it differs from `types` of the reader.
        batch_rows
            The most rows in one batch.
        progress
            Is called with the share done, from 0 to 1, after each batch.
        """
        if batch_rows < 1:
            raise InputError(f"batch_rows must be 1 or more, got {batch_rows}")
        names = self.columns if columns is None else tuple(columns)
        for name in (*names, *(types or {})):
            if name not in self.types:
                raise unknown_column(name, self.columns, f"`{self.name}`")
        return self._stream(names, types or {}, batch_rows, progress)

    def _stream(
        self,
        columns: tuple[str, ...],
        types: Mapping[str, pa.DataType],
        batch_rows: int,
        progress: Callable[[float], None] | None,
    ) -> Iterator[pa.RecordBatch]:
        done_bytes = 0
        if self.is_text:  # every file is read as the first one looks
            types = {name: types.get(name, self.types[name]) for name in columns}
        for file in self._files:
            for batch, share in file.batches(columns, types, batch_rows):
                yield batch
                if progress is not None:
                    progress((done_bytes + share * file.num_bytes) / self.num_bytes)
            done_bytes += file.num_bytes
        if progress is not None:
            progress(1.0)


def unknown_column(name: str, found: Iterable[str], where: str) -> InputError:
    """Return the error for a column that is not there, with the closest name that is.

    Examples
    --------
    >>> print(unknown_column("clik", ["click", "user"], "`a.csv`"))
    column `clik` is missing from `a.csv` (found: click, user); did you mean `click`?
    """
    names = list(found)
    shown = ", ".join(names[:40]) + (", ..." if len(names) > 40 else "")
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean `{close[0]}`?" if close else "name one of the columns found"
    return InputError(f"column `{name}` is missing from {where} (found: {shown})", hint=hint)


def _has_rows(file: ParquetFile | TextFile) -> bool:
    return file.has_rows if isinstance(file, TextFile) else file.num_rows > 0


def _files(path: Path, format: str | None) -> list[Path]:  # noqa: A002
    if not path.exists():
        raise InputError(f"no such file: {path}", hint="check the path")
    if not path.is_dir():
        return [path]
    # Writers of many files leave markers such as _SUCCESS and .part.crc beside them.
    inside = [p for p in sorted(path.iterdir()) if p.is_file() and not p.name.startswith((".", "_"))]
    files = [p for p in inside if format is not None or _suffix(p) in _FORMAT_OF_SUFFIX]
    if not files:
        raise InputError(f"the folder {path} holds no Parquet or CSV file", hint="name the files, or their format")
    return files


def _suffix(path: Path) -> str:
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return "" if name.endswith(".gz") and suffix in (".parquet", ".pq") else suffix


def _format_of(path: Path) -> str:
    try:
        return _FORMAT_OF_SUFFIX[_suffix(path)]
    except KeyError:
        raise InputError(
            f"cannot tell the format of `{path}` from its name", hint=f"pass the format: {', '.join(_FORMATS)}"
        ) from None
