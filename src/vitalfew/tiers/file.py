"""Rows in a file on a fast disk: written in batches to free pages, never in place, so that the last commit survives."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitalfew.core.errors import InputError, StorageError
from vitalfew.tiers import _commits, _pages
from vitalfew.tiers._direct import FULL, DirectFile, aligned, storage
from vitalfew.tiers._space import Longs, Space, mask_bytes
from vitalfew.tiers.lower import Bytes, Ids, Opened, Places, Traffic

__all__ = ["File", "PageFile", "file_memory"]

BUFFER_BYTES = 4 << 20
"""Size of the one buffer that all pages pass through."""
MAX_RECORD_BYTES = 1 << 20
MAX_ROWS = 1 << 29
"""Places are 31 bits, and the file may grow to four times its rows: twice for rows that live, twice for a commit."""


@dataclass(frozen=True, slots=True)
class File:
    """Rows on a local disk, best an NVMe drive.

    Parameters
    ----------
    path
        A folder of its own; made if it is absent.
    io_depth
        How many requests wait with the disk at once.

    Examples
    --------
    >>> import tempfile
    >>> opened = File(tempfile.mkdtemp()).open(num_rows=100, record_bytes=8)
    >>> places = opened.tier.write(np.array([7]), np.full((1, 8), 42, np.uint8))
    >>> out = np.empty((1, 8), np.uint8)
    >>> opened.tier.read(np.array([7]), places, out)
    >>> out
    array([[42, 42, 42, 42, 42, 42, 42, 42]], dtype=uint8)
    >>> opened.tier.close()

    Notes
    -----
    The disk needs room for up to four times the rows' bytes: what lives takes at most twice its size, and the pages
    of the last commit stay until the next one. A read of one row moves a page, 4096 bytes or more.
    """

    path: str | os.PathLike[str]
    io_depth: int = field(default=128, kw_only=True)

    def __post_init__(self) -> None:
        if not 1 <= self.io_depth <= 4096:
            raise InputError(f"io_depth must lie in [1, 4096], got {self.io_depth}", hint="128 suits NVMe drives")

    def open(self, num_rows: int, record_bytes: int, *, resume: bool = False) -> Opened:
        """Open the folder for this process alone.

        Parameters
        ----------
        num_rows, record_bytes
            The size of what is to be kept.
        resume
            Whether to go on from the last commit in the folder; otherwise it must hold none.

        Raises
        ------
        InputError
            If the folder is in use, holds something else, or does not fit what is asked for.
        StorageError
            If the disk fails or the folder is damaged.
        """
        if not 1 <= num_rows <= MAX_ROWS:
            raise InputError(f"num_rows must lie in [1, {MAX_ROWS}], got {num_rows}", hint="spread the rows over files")
        if not 1 <= record_bytes <= MAX_RECORD_BYTES:
            raise InputError(f"record_bytes must lie in [1, {MAX_RECORD_BYTES}], got {record_bytes}", hint="split rows")
        folder = Path(self.path).absolute()
        _commits.inspect(folder, resume)
        with storage(f"opening {folder}"):
            lock = _commits.lock(folder)
        try:
            # Once more: the run that held the lock until here may have written its first commit.
            body = _commits.read_commit(folder) if _commits.inspect(folder, resume) else None
            if body is None:
                with storage(f"clearing {folder}"):
                    (folder / _commits.DATA).unlink(missing_ok=True)
                _commits.remove_tables(folder, None)
            else:
                for name, asked in (("num_rows", num_rows), ("record_bytes", record_bytes)):
                    if body[name] != asked:
                        raise InputError(
                            f"{folder} holds a commit with {name} {body[name]}, asked for {asked}",
                            hint="resume with the model and optimizer it was written with",
                        )
            tier = PageFile(folder, num_rows, record_bytes, self.io_depth, lock)
        except BaseException:
            os.close(lock)
            raise
        if body is None:
            return Opened(tier, None, None)
        try:
            return Opened(tier, tier._restore(body), body["note"])
        except BaseException:
            tier.close()
            raise


class PageFile:
    """Rows in pages of one file, the `Lower` that `File` opens.

    A row lives at most once: release its former place before it is written again. Pages are only ever written while
    nothing refers to them, neither a live row nor the last commit. When live rows fill less than half of the pages
    they lie in, a `write` also moves some of them together, and `moved` tells where they went.

    Attributes
    ----------
    direct
        Whether the page cache is passed by; some filesystems refuse that.
    layout
        The size of pages, and how many records one holds.
    """

    def __init__(self, folder: Path, num_rows: int, record_bytes: int, io_depth: int, lock: int) -> None:
        self.record_bytes, self.traffic = record_bytes, Traffic()
        self.layout = _pages.Layout.of(record_bytes)
        self._folder, self._num_rows, self._lock = folder, num_rows, lock
        self._file = DirectFile(folder / _commits.DATA, self.layout.page_bytes, io_depth)
        self.direct = self._file.direct
        self._buffer = aligned(max(1, BUFFER_BYTES // self.layout.page_bytes), self.layout.page_bytes)
        self._space = Space(self._file, self.layout)
        self._epoch = 0
        self._table: dict[str, Any] | None = None
        self._moved: tuple[Ids, Places] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of main memory: the buffer, the pages' masks however large the file becomes, and moved rows."""
        masks = max(self._space.nbytes, mask_bytes(self.layout, self._num_rows))
        return self._buffer.nbytes + masks + sum(part.nbytes for part in self._moved or ())

    @property
    def used_pages(self) -> int:
        """Pages with live rows, and those that only the last commit needs."""
        return self._space.pages - self._space.free

    @property
    def holding_pages(self) -> int:
        """Pages with live rows: with steady writing, at most twice those that the rows need, and a few."""
        return self._space.holding

    def read(self, ids: Ids, places: Places, out: Bytes) -> None:
        assert out.shape == (len(ids), self.record_bytes)
        order = np.argsort(places)
        assert not len(ids) or places[order[0]] >= 0, "a row that was never written has no place"
        pages, first = _distinct(places[order] // self.layout.records_per_page)
        for start, stop in self._spans(len(pages)):
            some, buffer = pages[start:stop], self._buffer[: stop - start]
            self._load(some, buffer)
            line, damage = _pages.take(buffer, some, first[start : stop + 1], order, ids, places, out, self.layout)
            if line >= 0:
                raise self._damaged(int(some[line]), damage)
        self.traffic.rows_read += len(ids)

    def write(self, ids: Ids, records: Bytes) -> Places:
        """Take records and return where they are; if that left pages badly filled, move some other rows together."""
        if not len(ids):
            return np.empty(0, np.int32)
        assert records.shape == (len(ids), self.record_bytes)
        # Chosen first, so that the rows written here are not among those that move.
        sparse = self._space.sparse(self._space.pages_for(len(ids))) if self._moved is None else np.empty(0, np.int64)
        places = self._store(ids, records)
        try:
            if len(sparse):
                self._compact(sparse)
        except BaseException:
            self.release(places)
            raise
        self.traffic.rows_written += len(ids)
        return places

    def release(self, places: Places) -> None:
        self._space.release(places)

    def moved(self) -> tuple[Ids, Places] | None:
        moved, self._moved = self._moved, None
        return moved

    def commit(self, places: Callable[[int, int], Places], note: Mapping[str, Any]) -> None:
        assert self._moved is None, "rows were moved and nobody has asked where to"
        started = perf_counter()
        self._check_present()
        self._file.sync()
        self._epoch += 1  # also for the next try, if this one fails half way
        table = _commits.write_places(self._folder, self._epoch, self._num_rows, self._checked(places), self._table)
        body = {
            "epoch": self._epoch,
            "num_rows": self._num_rows,
            "record_bytes": self.record_bytes,
            "page_bytes": self.layout.page_bytes,
            "records_per_page": self.layout.records_per_page,
            "pages": self._space.pages,
            "table": table,
        }
        self._check_present()
        # If the next step fails half way, the document may have its name already: the pages of both commits stay.
        pages = self._space.keep()
        _commits.write_commit(self._folder, body, note)
        self._space.settle(pages)
        self._table = table
        _commits.remove_tables(self._folder, table)
        self.traffic.seconds += perf_counter() - started

    def close(self) -> None:
        self._file.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _restore(self, body: dict[str, Any]) -> Places:
        """Take up the state of a commit; return the places of all rows."""
        layout = _pages.Layout(self.record_bytes, body["page_bytes"], body["records_per_page"])
        if layout != self.layout:
            raise InputError(f"{self._folder} has pages of another kind: {layout}", hint="it needs another vitalfew")
        pages, size = body["pages"], self._file.size
        if size < pages * layout.page_bytes:
            raise StorageError(
                f"{self._file.path} is cut: it has {size} bytes of {pages * layout.page_bytes}",
                hint="go back to a copy of the folder",
            )
        places = _commits.read_places(self._folder, body["table"])
        if not self._space.restore(pages, places):
            raise StorageError(f"{self._folder} is damaged: rows share a place", hint="go back to a copy of the folder")
        self._epoch, self._table = body["epoch"], body["table"]
        _commits.remove_tables(self._folder, self._table)
        return places

    def _checked(self, places: Callable[[int, int], Places]) -> Callable[[int, int], Places]:
        """Return the owner's places, held against the pages: a commit must not name a record that is dead."""

        def checked(start: int, stop: int) -> Places:
            some = places(start, stop)
            assert self._space.are_live(some), f"one of the rows {start} to {stop - 1} has a place that was released"
            return some

        return checked

    def _spans(self, count: int) -> Iterator[tuple[int, int]]:
        """Cut pages into parts that fit the buffer."""
        for start in range(0, count, len(self._buffer)):
            yield start, min(start + len(self._buffer), count)

    def _check_present(self) -> None:
        if not self._file.present:
            raise StorageError(
                f"{self._file.path} is gone from its folder", hint="nothing can be kept there; name another folder"
            )

    def _damaged(self, page: int, damage: int) -> StorageError:
        return StorageError(
            f"page {page} of {self._file.path} is damaged: {_pages.DAMAGE[damage]}",
            hint="go back to a copy of the folder, and look at the disk",
        )

    def _load(self, pages: Longs, buffer: Bytes) -> None:
        started = perf_counter()
        self._file.read(pages * self.layout.page_bytes, buffer)
        self.traffic.seconds += perf_counter() - started
        self.traffic.reads += len(pages)
        self.traffic.bytes_read += buffer.nbytes

    def _store(self, ids: Ids, records: Bytes) -> Places:
        """Write records to free pages; nothing refers to those before all are written."""
        per_page = self.layout.records_per_page
        pages = self._space.find(self._space.pages_for(len(ids)))
        for start, stop in self._spans(len(pages)):
            some, buffer = pages[start:stop], self._buffer[: stop - start]
            rows = slice(start * per_page, stop * per_page)
            _pages.fill(buffer, some, self._epoch + 1, ids[rows], records[rows], self.layout)
            started = perf_counter()
            self._file.write(some * self.layout.page_bytes, buffer)
            self.traffic.seconds += perf_counter() - started
            self.traffic.writes += len(some)
            self.traffic.bytes_written += buffer.nbytes
        return self._space.occupy(pages, len(ids))

    def _compact(self, pages: Longs) -> None:
        """Write the live records of these pages together. Without room on the disk for that, leave them."""
        ids, old, new = [], [], []
        try:
            for start, stop in self._spans(len(pages)):
                some, buffer = pages[start:stop], self._buffer[: stop - start]
                self._load(some, buffer)
                room = len(some) * max(1, self.layout.records_per_page // 2)
                rows, places = np.empty(room, np.int64), np.empty(room, np.int32)
                records = np.empty((room, self.record_bytes), np.uint8)
                line, count = _pages.lift(buffer, some, self._space.live, rows, places, records, self.layout)
                if line >= 0:
                    raise self._damaged(int(some[line]), count)
                new.append(self._store(rows[:count], records[:count]))
                ids.append(rows[:count])
                old.append(places[:count])
        except BaseException as error:
            for part in new:
                self.release(part)
            if isinstance(error, StorageError) and error.errno in FULL:
                return
            raise
        self._moved = np.concatenate(ids), np.concatenate(new)
        self.release(np.concatenate(old))


def file_memory(num_rows: int, record_bytes: int) -> int:
    """Return the bytes of main memory that a file of so many rows takes beside them, at most."""
    return BUFFER_BYTES + mask_bytes(_pages.Layout.of(record_bytes), num_rows)


def _distinct(pages: NDArray[Any]) -> tuple[Longs, Longs]:
    """Return the pages of a sorted list once each, and where each begins in it, with the end."""
    begins = np.flatnonzero(np.diff(pages, prepend=-1))
    return pages[begins].astype(np.int64), np.append(begins, len(pages))
