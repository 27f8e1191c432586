"""The encoded log on disk: plain arrays in files, so that training may be far larger than memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from vitalfew.core.errors import InputError
from vitalfew.core.files import atomic_folder, read_document, write_document
from vitalfew.data.encoded import Encoded

if TYPE_CHECKING:
    from vitalfew.data.encode import Encoder
    from vitalfew.data.histories import Histories
    from vitalfew.data.readers import LogReader

__all__ = ["EncodedLog", "write_log"]

_VERSION = 1
_MANIFEST = "log.json"
_TYPES = {"f32": "<f4", "i32": "<i4", "i64": "<i8"}


@dataclass(frozen=True, slots=True)
class EncodedLog:
    """Encoded rows in a folder; `block` reads those of a span, `rows` any.

    Attributes
    ----------
    num_rows, num_dense
        Rows, and numeric columns.
    features, table_rows
        Names of the table features, and the rows of each one's table.
    num_ids
        Ids in all rows: `num_rows` times the number of features, unless lists are among them.
    is_jagged
        Whether `Encoded.offsets` is there.
    label_counts
        Rows with label 0 and with label 1.
    items
        Rows of the log in each sample, itself the last: one more than a history is long (see `Histories`).

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from vitalfew.data import Encoder, infer_schema, open_log
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> rows = [f"{i % 2},u{i % 5},{i}" for i in range(10)]
    >>> _ = (folder / "log.csv").write_text(chr(10).join(["click,user,day", *rows]))
    >>> log = open_log(folder / "log.csv")
    >>> encoder = Encoder.fit(log, infer_schema(log, label="click", time="day"), until=5)
    >>> _ = write_log(folder / "encoded", log, encoder, cutoff=5)
    >>> train = EncodedLog.open(folder / "encoded" / "train")
    >>> len(train), train.features, train.block(4, 6).label.tolist()
    (6, ('user',), [0.0, 1.0])
    """

    folder: Path
    num_rows: int
    num_dense: int
    features: tuple[str, ...]
    table_rows: tuple[int, ...]
    num_ids: int
    is_jagged: bool
    has_time: bool
    label_counts: tuple[int, int]
    items: int = 1

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> EncodedLog:
        """Open what `write_log` wrote.

        Raises
        ------
        InputError
            If the folder holds no encoded log, or one of its files is not as long as it should be.
        """
        body = read_document(Path(folder) / _MANIFEST, "encoded-log", _VERSION)
        log = cls(
            folder=Path(folder),
            features=tuple(body.pop("features")),
            table_rows=tuple(body.pop("table_rows")),
            label_counts=tuple(body.pop("label_counts")),
            **body,
        )
        for name, length in log._lengths().items():
            path, expected = log.folder / name, length * np.dtype(_TYPES[name[-3:]]).itemsize
            found = path.stat().st_size if path.exists() else 0
            if found != expected:
                raise InputError(f"`{path}` has {found} bytes, expected {expected}", hint="write the log again")
        return log

    def __len__(self) -> int:
        return self.num_rows

    def block(self, start: int, stop: int) -> Encoded:
        """Return rows start to stop - 1.

        Notes
        -----
        Cost: reads just these rows. They are copied, so that no page of a mapped file counts as memory in use.
        """
        if not 0 <= start <= stop <= self.num_rows:
            raise InputError(f"rows {start} to {stop} are not within 0 to {self.num_rows}")
        width, columns = self.items * len(self.features), self.items * self.num_dense
        offsets = None
        if self.is_jagged:
            offsets = self._read("offsets.i64", start * width, stop * width + 1)
            first = int(offsets[0])
            ids = self._read(self._ids_name(), first, int(offsets[-1]))
            offsets -= first
        else:
            ids = self._read(self._ids_name(), start * width, stop * width).reshape(-1, width)
        return Encoded(
            self._read("dense.f32", start * columns, stop * columns).reshape(-1, columns)
            if columns
            else np.zeros((stop - start, 0), np.float32),
            ids.astype(np.int64, copy=False),
            offsets,
            self._read("label.f32", start, stop),
            self._read("time.i64", start, stop) if self.has_time else None,
        )

    def rows(self, numbers: npt.NDArray[np.int64]) -> Encoded:
        """Return the rows of these numbers, in the order named.

        Notes
        -----
        Cost: reads the pages these rows lie on, and copies the rows. For whole epochs in random order from a disk
        `Batches` reads more at a time.
        """
        at = np.asarray(numbers)
        if at.ndim != 1 or at.dtype.kind not in "iu":
            raise InputError(f"row numbers are a list of integers, got {at.dtype} of shape {at.shape}")
        if len(at) and not 0 <= at.min() <= at.max() < self.num_rows:
            raise InputError(f"rows {at.min()} to {at.max()} are not all within 0 to {self.num_rows - 1}")
        at = at.astype(np.int64, copy=False)
        width, columns, offsets = self.items * len(self.features), self.items * self.num_dense, None
        if self.is_jagged:
            bags = self._map("offsets.i64")[at[:, None] * width + np.arange(width + 1)].astype(np.int64)
            offsets = np.concatenate(([0], np.cumsum(np.diff(bags).reshape(-1)))).astype(np.int64)
            shift = bags[:, 0] - offsets[:-1:width]
            lengths = bags[:, -1] - bags[:, 0]
            ids = self._map(self._ids_name())[np.arange(offsets[-1]) + np.repeat(shift, lengths)]
        else:
            ids = self._map(self._ids_name()).reshape(-1, width)[at]
        return Encoded(
            self._map("dense.f32").reshape(-1, columns)[at].astype(np.float32, copy=False)
            if columns
            else np.zeros((len(at), 0), np.float32),
            ids.astype(np.int64, copy=False),
            offsets,
            self._map("label.f32")[at].astype(np.float32, copy=False),
            self._map("time.i64")[at].astype(np.int64, copy=False) if self.has_time else None,
        )

    def _map(self, name: str) -> npt.NDArray[Any]:
        """Map a file; it counts as memory in use only until what was taken from it has been copied."""
        length = self._lengths()[name]
        if not length:
            return np.empty(0, _TYPES[name[-3:]])
        # As plain arrays: indexing a memmap would return another one.
        return np.asarray(np.memmap(self.folder / name, _TYPES[name[-3:]], "r", shape=(length,)))

    def _read(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        dtype = np.dtype(_TYPES[name[-3:]])
        path = self.folder / name
        values = np.fromfile(path, dtype, stop - start, offset=start * dtype.itemsize)
        if len(values) != stop - start:
            raise InputError(f"`{path}` ends in the middle", hint="write the log again")
        return values.astype(dtype.newbyteorder("="), copy=False)

    def _ids_name(self) -> str:
        return _ids_name(self.table_rows)

    def _lengths(self) -> dict[str, int]:
        """Return how many values each file holds."""
        lengths = {"label.f32": self.num_rows, self._ids_name(): self.num_ids}
        if self.num_dense:
            lengths["dense.f32"] = self.num_rows * self.items * self.num_dense
        if self.is_jagged:
            lengths["offsets.i64"] = self.num_rows * len(self.features) + 1
        if self.has_time:
            lengths["time.i64"] = self.num_rows
        return lengths


def write_log(
    folder: str | os.PathLike[str],
    reader: LogReader,
    encoder: Encoder,
    *,
    cutoff: int | None = None,
    test_share: float = 0.2,
    seed: int = 0,
    histories: Histories | None = None,
    progress: Callable[[float], None] | None = None,
) -> tuple[EncodedLog, EncodedLog]:
    """Encode a log into `folder/train` and `folder/test`, in file order, in one pass with bounded memory.

    Parameters
    ----------
    folder
        Appears whole or not at all; must not exist.
    reader, encoder
        The log, and what turns it into numbers.
    cutoff
        Rows with a later time are for testing (see `time_cutoff`). Without it a share of the rows is, chosen by
        the seed and the row number.
    test_share, seed
        Used without a cutoff; the same as for `Encoder.fit`.
    histories
        Puts what the same user clicked before in front of each row.
    progress
        Is called with the share done.

    Raises
    ------
    InputError
        If a slice is empty or has one label only.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from vitalfew.data import Encoder, infer_schema, open_log
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> rows = [f"{i % 3 % 2},u{i % 5}" for i in range(100)]
    >>> _ = (folder / "log.csv").write_text(chr(10).join(["click,user", *rows]))
    >>> log = open_log(folder / "log.csv")
    >>> encoder = Encoder.fit(log, infer_schema(log, label="click"), test_share=0.2)
    >>> train, test = write_log(folder / "encoded", log, encoder, test_share=0.2)
    >>> len(train) + len(test)
    100
    """
    from vitalfew.data.split import is_test

    if cutoff is not None and encoder.schema.time is None:
        raise InputError("a cutoff needs a time, and no column is the time", hint="name the time column")
    with atomic_folder(folder) as part, ExitStack() as stack:
        items = 1 if histories is None else histories.length + 1
        slices = {name: stack.enter_context(_Slice(part / name, encoder, items)) for name in ("train", "test")}
        row = 0
        for batch in encoder.batches(reader, progress=progress):
            rows = encoder.encode(batch, first_row=row)
            if histories is not None:
                rows = histories.widen(rows)
            if cutoff is not None:
                assert rows.time is not None
                held_back = rows.time > cutoff
            else:
                held_back = is_test(np.arange(row, row + len(rows)), test_share, seed)
            slices["train"].add(rows.take(np.flatnonzero(~held_back)))
            slices["test"].add(rows.take(np.flatnonzero(held_back)))
            row += len(rows)
        for name, each in slices.items():
            each.finish(name, encoder.schema.label)
    return EncodedLog.open(Path(folder) / "train"), EncodedLog.open(Path(folder) / "test")


@dataclass(slots=True)
class _Slice:
    """The files of one encoded log in the making."""

    folder: Path
    encoder: Encoder
    items: int = 1
    num_rows: int = 0
    num_ids: int = 0
    num_positive: int = 0
    _files: dict[str, BinaryIO] = field(default_factory=dict)

    def __enter__(self) -> _Slice:
        self.folder.mkdir(parents=True)
        if self.encoder.schema.lists:
            self._write("offsets.i64", np.zeros(1, np.int64))
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.close()

    def add(self, rows: Encoded) -> None:
        """Append rows."""
        assert rows.label is not None
        self._write("label.f32", rows.label)
        if self.encoder.schema.numeric:
            self._write("dense.f32", rows.dense)
        self._write(_ids_name(tuple(self.encoder.num_rows.values())), rows.ids)
        if rows.offsets is not None:
            self._write("offsets.i64", rows.offsets[1:] + self.num_ids)
        if rows.time is not None:
            self._write("time.i64", rows.time)
        self.num_rows += len(rows)
        self.num_ids += rows.ids.size
        self.num_positive += int(np.count_nonzero(rows.label))

    def finish(self, name: str, label: str) -> None:
        """Close the files and write the manifest."""
        self.__exit__()
        if self.num_rows == 0:
            raise InputError(f"the {name} slice is empty", hint="choose another cutoff or test_share, or more rows")
        if self.num_positive in (0, self.num_rows):
            raise InputError(
                f"all {self.num_rows} rows of the {name} slice have the label {min(self.num_positive, 1)} in `{label}`",
                hint="AUC is undefined with one label; check the label column, or use more rows",
            )
        body = {
            "num_rows": self.num_rows,
            "num_dense": len(self.encoder.schema.numeric),
            "features": list(self.encoder.tables),
            "table_rows": list(self.encoder.num_rows.values()),
            "num_ids": self.num_ids,
            "is_jagged": bool(self.encoder.schema.lists),
            "has_time": self.encoder.schema.time is not None,
            "label_counts": [self.num_rows - self.num_positive, self.num_positive],
            "items": self.items,
        }
        write_document(self.folder / _MANIFEST, "encoded-log", _VERSION, body)

    def _write(self, name: str, values: npt.NDArray[Any]) -> None:
        if name not in self._files:
            self._files[name] = (self.folder / name).open("wb")
        values.astype(_TYPES[name[-3:]], copy=False).tofile(self._files[name])


def _ids_name(table_rows: tuple[int, ...]) -> str:
    return "ids.i32" if max(table_rows, default=0) < 2**31 else "ids.i64"
