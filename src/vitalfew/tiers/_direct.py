"""Batched direct I/O: many equal pages of one file per call, past the page cache where the filesystem allows it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import platform
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vitalfew.core.errors import StorageError, VitalfewError
from vitalfew.tiers.lower import Bytes

__all__ = ["BLOCK", "FULL", "REQUEST_BYTES", "DirectFile", "aligned", "storage"]

BLOCK = 4096
"""Direct I/O moves whole blocks of this many bytes, to and from addresses that are multiples of it."""
REQUEST_BYTES = 1 << 20
"""Neighbouring pages travel together up to this size."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No room: on the disk, in the user's share of it, in one file."""

_MAX_THREADS = 16
Longs = NDArray[np.int64]


def _failure(code: int | None, doing: str) -> StorageError:
    reason = os.strerror(code) if code else "unknown reason"
    if code in FULL:
        error = StorageError(f"the disk is full: {doing}: {reason}", hint="free space there; the last commit is intact")
    else:
        error = StorageError(f"{doing}: {reason}", hint="look at the disk; the last commit is as it was written")
    error.errno = code
    return error


@contextlib.contextmanager
def storage(doing: str) -> Iterator[None]:
    """Turn an error of the operating system into one that tells what was being done."""
    try:
        yield
    except VitalfewError:
        raise
    except OSError as error:
        raise _failure(error.errno, doing) from error


def aligned(lines: int, width: int) -> Bytes:
    """Return a buffer at an address that direct I/O takes, given back to the system with its last view."""
    return np.frombuffer(mmap.mmap(-1, max(lines * width, 1)), np.uint8)[: lines * width].reshape(lines, width)


class _Engine(Protocol):
    """Moves pieces of a buffer to or from offsets of a file; a result is a number of bytes, or minus an errno."""

    def run(self, write: bool, handle: int, memory: Bytes, at: Longs, offsets: Longs, lengths: Longs) -> Longs: ...

    def close(self) -> None: ...


class _Threads:
    """Works everywhere: a few threads that each wait for one request.

    They are started once, and a signal does no harm between: unlike a pool's, these queues have no lock to lose.
    """

    def __init__(self, depth: int) -> None:
        self._workers = min(depth, _MAX_THREADS)
        self._open()

    def _open(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = [
            Thread(target=_serve, args=(self._jobs,), name="vitalfew-file", daemon=True) for _ in range(self._workers)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, write: bool, handle: int, memory: Bytes, at: Longs, offsets: Longs, lengths: Longs) -> Longs:
        results, view, move = np.zeros(len(at), np.int64), memory.data, os.pwritev if write else os.preadv
        requests = list(zip(at.tolist(), lengths.tolist(), offsets.tolist(), strict=True))
        done: SimpleQueue[None] = SimpleQueue()

        def work(first: int) -> None:
            try:
                for i in range(first, len(requests), self._workers):
                    start, length, offset = requests[i]
                    try:
                        results[i] = move(handle, [view[start : start + length]], offset)
                    except OSError as error:
                        results[i] = -(error.errno or errno.EIO)
            finally:
                done.put(None)

        jobs = [partial(work, first) for first in range(min(self._workers, len(requests)))]
        try:
            for job in jobs:
                self._jobs.put(job)
            for _ in jobs:
                done.get()
        except BaseException:
            self.close()  # waits for all, so that after an interrupt nothing uses the buffer
            self._open()
            raise
        return results

    def close(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []


def _serve(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()


# Numbers of io_setup, io_destroy, io_getevents, io_submit.
_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
_REQUEST = np.dtype(  # struct iocb
    [
        *(("data", "u8"), ("key", "u4"), ("flags", "u4"), ("operation", "u2"), ("priority", "i2"), ("handle", "u4")),
        *(("address", "u8"), ("length", "u8"), ("offset", "i8"), ("reserved", "u8"), ("more", "u4"), ("signal", "u4")),
    ]
)
_EVENT = np.dtype([("data", "u8"), ("request", "u8"), ("result", "i8"), ("result2", "i8")])


class _Aio:
    """Linux asynchronous I/O: one thread keeps `depth` requests with the device, at few system calls."""

    def __init__(self, depth: int) -> None:
        calls = _CALLS.get(platform.machine())
        if sys.platform != "linux" or sys.byteorder != "little" or sys.maxsize < 2**32 or calls is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        self._setup, self._destroy, self._getevents, self._submit = calls
        self._depth = depth
        self._syscall: Any = ctypes.CDLL(None, use_errno=True).syscall
        self._syscall.restype = ctypes.c_long
        self._events = np.zeros(depth, _EVENT)
        self._context = 0
        self._open()

    def _call(self, *numbers: int) -> int:
        """Make a system call; return its result, or minus the errno."""
        result = int(self._syscall(*(ctypes.c_long(number) for number in numbers)))
        return result if result >= 0 else -ctypes.get_errno()

    def _open(self) -> None:
        context = ctypes.c_long(0)
        code = self._call(self._setup, self._depth, ctypes.addressof(context))
        if code < 0:
            raise OSError(-code, os.strerror(-code))
        self._context = context.value

    def run(self, write: bool, handle: int, memory: Bytes, at: Longs, offsets: Longs, lengths: Longs) -> Longs:
        count = len(at)
        requests, results = np.zeros(count, _REQUEST), np.zeros(count, np.int64)
        requests["data"], requests["operation"], requests["handle"] = np.arange(count), int(write), handle
        requests["address"], requests["length"], requests["offset"] = memory.ctypes.data + at, lengths, offsets
        pointers = requests.ctypes.data + np.arange(count) * _REQUEST.itemsize
        try:
            self._drive(pointers, results)
        except BaseException:
            # An interrupt may come between a call and its bookkeeping. To destroy the context waits for all that is
            # under way, so that nothing writes into the buffer later.
            self.close()
            self._open()
            raise
        return results

    def _drive(self, pointers: Longs, results: Longs) -> None:
        count, batch = len(pointers), max(1, self._depth // 4)
        sent = done = 0
        while done < count:
            room = min(self._depth - (sent - done), count - sent)
            if room > 0:
                taken = self._call(self._submit, self._context, room, pointers.ctypes.data + 8 * sent)
                if taken >= 0:
                    sent += taken
                elif taken != -errno.EINTR and not (taken == -errno.EAGAIN and sent > done):
                    results[sent] = taken
                    sent, done = sent + 1, done + 1
            if sent > done:
                done += self._reap(results, min(batch, sent - done))

    def _reap(self, results: Longs, least: int) -> int:
        came = self._call(self._getevents, self._context, least, self._depth, self._events.ctypes.data, 0)
        if came == -errno.EINTR:
            return 0
        if came < 0:
            raise OSError(-came, os.strerror(-came))
        events = self._events[:came]
        results[events["data"].astype(np.int64)] = events["result"]
        return came

    def close(self) -> None:
        if self._context:
            self._call(self._destroy, self._context)
            self._context = 0


class DirectFile:
    """A file of equal pages, read and written many at a time.

    Parameters
    ----------
    path
        The file; made if it is absent.
    page_bytes
        A multiple of 4096.
    depth
        How many requests wait with the device at once.
    direct, asynchronous
        Leave False to go without: the page cache then stands between, or threads wait for the requests.

    Attributes
    ----------
    direct
        Whether the page cache is passed by; some filesystems refuse that.
    asynchronous
        Whether the kernel's asynchronous I/O is used rather than threads.
    """

    def __init__(
        self, path: Path, page_bytes: int, depth: int, *, direct: bool = True, asynchronous: bool = True
    ) -> None:
        assert page_bytes % BLOCK == 0
        self.path, self.page_bytes = path, page_bytes
        self._lost: StorageError | None = None
        with storage(f"opening {path}"):
            self._handle, self.direct = _open(path, direct)
        self._engine: _Engine
        # Through the page cache, asynchronous requests would be served one after another.
        self.asynchronous = asynchronous and self.direct
        if self.asynchronous:
            try:
                self._engine = _Aio(depth)
            except OSError:
                self.asynchronous = False
        if not self.asynchronous:
            self._engine = _Threads(depth)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._handle).st_size

    @property
    def present(self) -> bool:
        """Whether the file is still there under its name."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._handle))
        except OSError:
            return False

    def read(self, offsets: Longs, buffer: Bytes) -> None:
        """Fill the lines of `buffer`, which comes from `aligned`, with the pages at these offsets."""
        self._move(False, offsets, buffer)

    def write(self, offsets: Longs, buffer: Bytes) -> None:
        """Write the lines of `buffer`, which comes from `aligned`, to these offsets."""
        self._move(True, offsets, buffer)

    def _move(self, write: bool, offsets: Longs, buffer: Bytes) -> None:
        assert len(offsets) == len(buffer)
        if not len(offsets):
            return
        first = _runs(offsets, self.page_bytes)
        memory, at = buffer.reshape(-1), first * self.page_bytes
        lengths = np.diff(at, append=len(memory))
        results = self._engine.run(write, self._handle, memory, at, offsets[first], lengths)
        for i in np.flatnonzero(results != lengths).tolist():
            # Cut short or refused: done again in the plainest way, which tells why.
            self._again(write, int(offsets[first[i]]), memory[at[i] : at[i] + lengths[i]])

    def _again(self, write: bool, offset: int, memory: Bytes) -> None:
        view, done = memory.data, 0
        while done < len(view):
            with storage(f"{'writing' if write else 'reading'} {self.path} at byte {offset + done}"):
                move = os.pwritev if write else os.preadv
                moved = move(self._handle, [view[done:]], offset + done) // BLOCK * BLOCK
            if moved == 0:
                raise StorageError(
                    f"{self.path} ends within the {BLOCK} bytes at {offset + done}",
                    hint="it was cut: go back to a copy of the folder",
                )
            done += moved

    def reserve(self, size: int) -> None:
        """Make the file this long with room on the disk for all of it, or leave it as it was."""
        before = self.size
        with storage(f"enlarging {self.path} to {size} bytes"):
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._handle, before, size - before)
                else:
                    os.ftruncate(self._handle, size)
            except OSError:
                os.ftruncate(self._handle, before)
                raise

    def sync(self) -> None:
        """Return when all that was written is on the disk."""
        if self._lost is not None:
            raise self._lost  # the system reports lost data once; a later call would claim that all is well
        try:
            with storage(f"syncing {self.path}"):
                getattr(os, "fdatasync", os.fsync)(self._handle)
        except StorageError as error:
            self._lost = error
            raise

    def close(self) -> None:
        """Let go of the file and of what serves it; may be called again."""
        if self._handle >= 0:
            self._engine.close()
            os.close(self._handle)
            self._handle = -1


def _open(path: Path, direct: bool) -> tuple[int, bool]:
    """Return a file descriptor, and whether it passes the page cache by."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
    if direct and hasattr(os, "O_DIRECT"):
        try:
            handle = os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            try:
                os.preadv(handle, [aligned(1, BLOCK).data], 0)  # some say yes first and refuse later
            except OSError:
                os.close(handle)
            else:
                return handle, True
    return os.open(path, flags, 0o666), False


def _runs(offsets: Longs, page_bytes: int) -> Longs:
    """Return where requests begin, if pages that follow each other in the file go together."""
    most = max(1, REQUEST_BYTES // page_bytes)
    begins = np.ones(len(offsets), np.bool_)
    begins[1:] = np.diff(offsets) != page_bytes
    index = np.arange(len(offsets))
    run_start = np.maximum.accumulate(np.where(begins, index, 0))
    return np.flatnonzero((index - run_start) % most == 0)
