"""One shard of a remote tier: the records of its rows, in memory of its own, and in files when they are to last."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitalfew.core.errors import StorageError
from vitalfew.core.files import atomic_write
from vitalfew.tiers.lower import Bytes, Ids

__all__ = ["Shard"]

_GROWTH = 1.25
_CHUNK_BYTES = 8 << 20


class Shard:
    """Records by id, 0 to num_rows - 1. It knows nothing of processes: an actor wraps it.

    Parameters
    ----------
    num_rows, record_bytes
        Rows this shard may be asked to hold, and the size of each.
    latency
        Seconds to sleep before every answer to a read or a write, for tests only.

    Examples
    --------
    >>> shard = Shard(100, 2)
    >>> shard.write(np.array([7, 3]), np.array([[1, 2], [3, 4]], np.uint8))
    >>> shard.read(np.array([3, 7]))
    array([[3, 4],
           [1, 2]], dtype=uint8)
    """

    def __init__(self, num_rows: int, record_bytes: int, latency: float = 0.0) -> None:
        self._latency = latency
        self._line = np.full(num_rows, -1, np.int32)
        self._changed = np.zeros(num_rows, np.bool_)  # since the last commit
        self._records: Bytes = np.empty((0, record_bytes), np.uint8)
        self._used = 0

    def read(self, ids: Ids) -> Bytes:
        """Return the records of these rows, in this order."""
        lines = self._line[ids]
        assert lines.min(initial=0) >= 0, "the owner asks only for rows it has written"
        records = self._records[lines]
        time.sleep(self._latency)
        return records

    def write(self, ids: Ids, records: Bytes) -> None:
        """Take records; a row that is here is overwritten where it lies."""
        self._put(ids, records)
        self._changed[ids] = True
        time.sleep(self._latency)

    def save(self, path: str, whole: bool) -> dict[str, Any]:
        """Write all rows, or those changed since the last commit, durable to a file; say what it holds.

        No file is written where there are no rows.
        """
        ids = np.flatnonzero(self._line >= 0 if whole else self._changed)
        checksum = 0
        if len(ids):
            try:
                with atomic_write(path) as file:
                    for block in self._blocks(ids):
                        checksum = zlib.crc32(block.data, checksum)
                        file.write(block.data)
            except OSError as error:
                raise StorageError(
                    f"{path} could not be written ({error.strerror or error})",
                    hint="make room and commit again; the last commit is still there",
                ) from error
        return {"name": Path(path).name, "rows": len(ids), "checksum": checksum}

    def committed(self) -> None:
        """Note that what was saved last counts from here on."""
        self._changed[:] = False

    def load(self, folder: str, files: list[dict[str, Any]]) -> NDArray[np.uint8]:
        """Take the rows of saved files, oldest first; return one bit for each row, set where it is here."""
        for file in files:
            ids, records = _rows(Path(folder) / file["name"], file["rows"], self._records.shape[1], file["checksum"])
            self._put(ids, records)
        return np.packbits(self._line >= 0)

    def _put(self, ids: Ids, records: Bytes) -> None:
        fresh = ids[self._line[ids] < 0]
        if len(fresh):
            end = self._used + len(fresh)
            if end > len(self._records):
                lines = min(len(self._line), max(end, int(len(self._records) * _GROWTH)))
                # In place: no second copy while it grows. No view of the records is ever handed out.
                self._records.resize((lines, self._records.shape[1]), refcheck=False)
            self._line[fresh] = np.arange(self._used, end, dtype=np.int32)
            self._used = end
        self._records[self._line[ids]] = records

    def _blocks(self, ids: Ids) -> Iterator[NDArray[Any]]:
        yield ids
        step = max(1, _CHUNK_BYTES // self._records.shape[1])
        for start in range(0, len(ids), step):
            yield self._records[self._line[ids[start : start + step]]]


def _rows(path: Path, rows: int, record_bytes: int, checksum: int) -> tuple[Ids, Bytes]:
    """Map a saved file: ids, then records."""
    try:
        size = path.stat().st_size
        content = np.memmap(path, np.uint8, "r") if size == rows * (8 + record_bytes) else None
    except OSError as error:
        raise StorageError(
            f"{path} cannot be read ({error.strerror or error})",
            hint="keep the files of a commit together, in a folder that every node sees under this name",
        ) from error
    if content is None or zlib.crc32(content.data) != checksum:
        raise StorageError(
            f"{path} is damaged: {size} bytes of {rows} rows do not match the checksum of the commit",
            hint="restore the folder from a copy",
        )
    return content[: rows * 8].view(np.int64), content[rows * 8 :].reshape(rows, record_bytes)
