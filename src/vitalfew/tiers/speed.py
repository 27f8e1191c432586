"""How fast this machine's disk and memory hand out rows, measured; and what a training step would take, modelled."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitalfew.core import InputError
from vitalfew.core.errors import StorageError
from vitalfew.tiers._direct import FULL, DirectFile, aligned, storage
from vitalfew.tiers._pages import Layout, fill, take
from vitalfew.tiers.file import BUFFER_BYTES, File
from vitalfew.tiers.record import Record

__all__ = ["Speed", "expected_pages", "measure_speed", "pages_of", "predict_step"]

_MAX_BYTES = 256 << 20
_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Speed:
    """What the disk and the memory of this machine do in a second.

    Attributes
    ----------
    page_reads
        Random pages read and checked per second.
    write_bytes
        Bytes written per second, one page after the other.
    rows
        Records gathered per second from memory.
    page_bytes, records_per_page
        Of the pages that were read.
    direct
        Whether the page cache was passed by; if not, what was written is read back from memory.
    page_seconds, write_seconds
        Processor time of a page that is read and checked, and of a byte that is written.
    """

    page_reads: float
    write_bytes: float
    rows: float
    page_bytes: int
    records_per_page: int
    direct: bool
    page_seconds: float = 0.0
    write_seconds: float = 0.0


def measure_speed(
    folder: str | os.PathLike[str],
    record_bytes: int,
    *,
    max_bytes: int = _MAX_BYTES,
    seconds: float = _SECONDS,
    io_depth: int | None = None,
) -> Speed:
    """Measure the disk of a folder, by the code and at the queue depth of `File`, and the memory.

    Parameters
    ----------
    folder
        Where rows would be kept. If it is absent, the nearest folder above it that is there; nothing is left behind.
    record_bytes
        Size of one row with its state.
    max_bytes
        Size of the temporary file; smaller where the disk has less room.
    seconds
        About how long to take in all.
    io_depth
        By default that of `File`.

    Raises
    ------
    StorageError
        If the disk cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> speed = measure_speed(tempfile.gettempdir(), 136, max_bytes=1 << 20, seconds=0.05)
    >>> speed.page_reads > 0, speed.write_bytes > 0, speed.rows > 0
    (True, True, True)

    Notes
    -----
    Reads are batches of pages in order of their offsets, drawn anew for each, as the rows of a batch lie.
    """
    if not 1 <= record_bytes <= 1 << 20 or max_bytes < 1 or not seconds > 0:
        raise InputError(
            f"cannot measure records of {record_bytes} B in {max_bytes} B for {seconds} s", hint="pass positive numbers"
        )
    where = next(each for each in (Path(folder).absolute(), *Path(folder).absolute().parents) if each.is_dir())
    layout = Layout.of(record_bytes)
    path = where / f".vitalfew-speed.{secrets.token_hex(4)}.part"
    try:
        file = DirectFile(path, layout.page_bytes, io_depth or File(where).io_depth)
    finally:
        with storage(f"removing {path}"):
            path.unlink(missing_ok=True)  # what is open stays until it is closed, and a killed process leaves nothing
    try:
        pages, written, write_seconds = _write(file, layout, max_bytes, seconds * 0.4)
        reads, page_seconds = _read(file, layout, pages, seconds * 0.4)
    finally:
        file.close()
    rows = _gather(record_bytes, min(max_bytes, 64 << 20), seconds * 0.2)
    return Speed(
        reads, written, rows, layout.page_bytes, layout.records_per_page, file.direct, page_seconds, write_seconds
    )


def _rate(once: Callable[[], int], seconds: float) -> tuple[float, float]:
    """Return how much per second a function does that says how much it did, and its processor time for one.

    The first call warms up.
    """
    once()
    done, start, busy = 0, time.perf_counter(), time.thread_time()
    while True:
        done += once()
        spent = time.perf_counter() - start
        if spent >= seconds:
            return done / spent, (time.thread_time() - busy) / done


def _write(file: DirectFile, layout: Layout, max_bytes: int, seconds: float) -> tuple[int, float, float]:
    """Write until the file or the time is full; return the pages, and bytes per second and processor time of one."""
    page_bytes, per_page = layout.page_bytes, layout.records_per_page
    lines = max(1, min(BUFFER_BYTES, max_bytes) // page_bytes)
    buffer = aligned(lines, page_bytes)
    # Not what a disk could shorten.
    records = np.random.default_rng(0).integers(0, 256, (lines * per_page, layout.record_bytes), np.uint8)
    ids = np.arange(len(records))
    fill(buffer, np.arange(lines), 1, ids, records, layout)  # compiles
    pages, spent, busy = 0, 0.0, 0.0
    while pages == 0 or ((pages + lines) * page_bytes <= max_bytes and spent < seconds):
        try:
            file.reserve((pages + lines) * page_bytes)  # as `File` does, and not on the clock
        except StorageError as error:
            if error.errno in FULL and pages:
                break
            raise
        start, before = time.perf_counter(), time.thread_time()
        numbers = np.arange(pages, pages + lines)
        fill(buffer, numbers, 1, ids, records, layout)
        file.write(numbers * page_bytes, buffer)
        spent += time.perf_counter() - start
        busy += time.thread_time() - before
        pages += lines
    start = time.perf_counter()
    file.sync()
    spent += time.perf_counter() - start
    return pages, pages * page_bytes / spent, busy / (pages * page_bytes)


def _read(file: DirectFile, layout: Layout, pages: int, seconds: float) -> tuple[float, float]:
    """Read pages and take one record out of each; return pages per second, and the processor time of one."""
    count, per_page = max(1, min(BUFFER_BYTES // layout.page_bytes, pages // 8)), layout.records_per_page
    buffer, records = aligned(count, layout.page_bytes), np.empty((count, layout.record_bytes), np.uint8)
    lines = max(1, min(BUFFER_BYTES // layout.page_bytes, pages))  # of the buffer that was written over and over
    order, first, rng = np.arange(count), np.arange(count + 1), np.random.default_rng(1)

    def once() -> int:
        some = np.sort(rng.choice(pages, count, replace=False, shuffle=False))
        file.read(some * layout.page_bytes, buffer)
        places = (some * per_page).astype(np.int32)
        damaged, _ = take(buffer, some, first, order, some % lines * per_page, places, records, layout)
        assert damaged < 0, "pages come back as they were written"
        return count

    return _rate(once, seconds)


def _gather(record_bytes: int, slab_bytes: int, seconds: float) -> float:
    slots = max(1, slab_bytes // record_bytes)
    slab = np.zeros((slots, -(-record_bytes // 4)), np.float32)
    record = Record([slab])
    out = np.empty((min(slots, 4096), record.nbytes), np.uint8)
    rng = np.random.default_rng(2)

    def once() -> int:
        record.take(rng.integers(0, slots, len(out)).astype(np.int32), out)
        return len(out)

    return _rate(once, seconds)[0]


def pages_of(rows: int, record_bytes: int) -> int:
    """Return how many pages so many records fill.

    Examples
    --------
    >>> pages_of(100, 136)
    4
    """
    return -(-rows // Layout.of(record_bytes).records_per_page)


def expected_pages(rows: float, rows_below: float, records_per_page: int) -> float:
    """Return how many pages hold rows that are drawn at random from those below.

    Pages are taken to be two thirds full: a file moves rows together where they fill less than half.

    Examples
    --------
    >>> round(expected_pages(100, 1e9, 30), 1), round(expected_pages(1e6, 30_000, 30))
    (100.0, 1500)
    """
    pages = 1.5 * rows_below / records_per_page
    return float(-pages * np.expm1(-rows / pages)) if pages > 0 else 0.0


def predict_step(
    compute_seconds: float,
    pages_read: float,
    bytes_written: float,
    speed: Speed,
    overlap: bool = True,
    *,
    rows_moved: float = 0.0,
    planning: float = 0.0,
    crowded: bool = False,
) -> float:
    """Return the seconds of a training step, modelled: the longer of computing and moving, or both one after another.

    Parameters
    ----------
    compute_seconds
        Of a step with everything in memory.
    pages_read, bytes_written
        Of one step.
    overlap
        Whether rows move while the model computes, as with `Prefetch` and rows brought in ahead; on demand they do
        not.
    rows_moved
        Rows copied between records and slots in a step.
    planning
        Seconds that the mover takes to read a batch and decide what moves.
    crowded
        Whether computing uses all cores: it then has to wait while the mover computes.

    Examples
    --------
    >>> speed = Speed(100_000, 1e9, 1e7, 4096, 30, direct=True)
    >>> predict_step(0.010, 500, 1e6, speed), predict_step(0.010, 500, 1e6, speed, overlap=False)
    (0.01, 0.016)

    Notes
    -----
    Not in it: pages that the file moves together on its own, commits, and other work on the same disk and cores.
    """
    own = planning + rows_moved / speed.rows
    moving = own + pages_read / speed.page_reads + bytes_written / speed.write_bytes
    if not overlap:
        return compute_seconds + moving
    busy = own + pages_read * speed.page_seconds + bytes_written * speed.write_seconds if crowded else 0.0
    return max(compute_seconds + busy, moving)
