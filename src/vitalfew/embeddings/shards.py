"""One column of consecutive rows as a safetensors file, written and read from its begin to its end."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vitalfew.core import InputError, StorageError
from vitalfew.embeddings.rows import array_of
from vitalfew.embeddings.tables import Table

__all__ = ["Part", "Shard", "ShardWriter", "plan"]

_KIND = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True, slots=True)
class Part:
    """A table, or rows of a large one, as one tensor."""

    name: str
    table: str
    first_row: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Shard:
    """A file with one column of the rows from `start` to `stop`, numbered over all tables.

    One column, so that its bytes come in the order of the rows: one pass over all rows writes the files of all
    columns side by side, and each gets its digest on the way.
    """

    name: str
    column: str
    dtype: torch.dtype
    width: int
    start: int
    parts: tuple[Part, ...]

    @property
    def stop(self) -> int:
        return self.start + sum(part.num_rows for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header()) + (self.stop - self.start) * self.width * self.dtype.itemsize

    def header(self) -> bytes:
        """Return what comes before the rows: the length of a JSON text, and the text, padded to 8 bytes."""
        tensors, end = {}, 0
        for part in self.parts:
            begin, end = end, end + part.num_rows * self.width * self.dtype.itemsize
            tensors[part.name] = {
                "dtype": _KIND[self.dtype],
                "shape": [part.num_rows, self.width],
                "data_offsets": [begin, end],
            }
        text = json.dumps(tensors, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def entry(self) -> dict[str, Any]:
        """Return what a manifest says about the file, but for its digest."""
        tensors = [
            {"name": part.name, "table": part.table, "first_row": part.first_row, "num_rows": part.num_rows}
            for part in self.parts
        ]
        return {"file": self.name, "column": self.column, "bytes": self.nbytes, "tensors": tensors}

    def check(self, folder: Path, sha256: str) -> None:
        """Refuse the file if it is not what was written."""
        path = folder / self.name
        try:
            with path.open("rb") as file:
                if (found := os.fstat(file.fileno()).st_size) != self.nbytes:
                    raise InputError(
                        f"`{path}` is damaged: it has {found} bytes of {self.nbytes}", hint="restore the folder"
                    )
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise InputError(f"`{path}` is damaged: it is not what was written", hint="restore the folder")
        except OSError as error:
            raise InputError(f"`{path}` cannot be read ({error.strerror})", hint="restore the folder") from None

    def open(self, folder: Path) -> BinaryIO:
        """Open the file where its rows begin."""
        file = (folder / self.name).open("rb")
        file.seek(len(self.header()))
        return file

    def read(self, file: BinaryIO, num_rows: int) -> Tensor:
        """Return the next rows."""
        rows = torch.empty((num_rows, self.width), dtype=self.dtype, device="cpu")
        data = array_of(rows).data.cast("B")
        if file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise StorageError(f"{file.name} was cut while it was read", hint="restore it, and load again")
        return rows


class ShardWriter:
    """A file as it is written, row by row, and its digest."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        self._file = (folder / shard.name).open("xb")
        self._digest = hashlib.sha256(header := shard.header())
        self._file.write(header)

    def write(self, rows: Tensor) -> None:
        """Append rows."""
        data = array_of(rows).data.cast("B")
        self._digest.update(data)
        self._file.write(data)
        self._file.flush()
        if hasattr(os, "posix_fadvise"):  # so that the disk begins at once, and the cache of the system stays as it is
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> str:
        """End the file; returns its SHA-256."""
        self._file.close()
        return self._digest.hexdigest()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plan(tables: Sequence[Table], column: str, dtype: torch.dtype, width: int, shard_bytes: int) -> list[Shard]:
    """Divide one column among files of at most so many bytes of rows; a table that fits a file is not cut.

    Examples
    --------
    >>> tables = [Table("user", 3, 2), Table("item", 7, 2)]
    >>> for shard in plan(tables, "weight", torch.float32, 2, shard_bytes=40):
    ...     print(shard.name, shard.start, shard.stop, [part.name for part in shard.parts])
    rows-weight-00001.safetensors 0 3 ['user.weight']
    rows-weight-00002.safetensors 3 8 ['item.weight.0']
    rows-weight-00003.safetensors 8 10 ['item.weight.1']
    """
    most = max(1, shard_bytes // (width * dtype.itemsize))
    shares: list[list[Part]] = [[]]
    room = most
    for table in tables:
        for number, first in enumerate(range(0, table.num_rows, most)):
            n = min(most, table.num_rows - first)
            if n > room:
                shares.append([])
                room = most
            name = f"{table.name}.{column}" + (f".{number}" if table.num_rows > most else "")
            shares[-1].append(Part(name, table.name, first, n))
            room -= n
    shards: list[Shard] = []
    for number, parts in enumerate(shares, 1):
        start = shards[-1].stop if shards else 0
        shards.append(Shard(f"rows-{column}-{number:05d}.safetensors", column, dtype, width, start, tuple(parts)))
    return shards
