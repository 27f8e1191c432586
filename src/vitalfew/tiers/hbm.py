"""Rows in the memory of a GPU: records come and go through page-locked memory while the GPU computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitalfew.core import InputError, StorageError, parse_size
from vitalfew.tiers.lower import Bytes
from vitalfew.tiers.record import Record

__all__ = ["Hbm", "HbmSlab", "Move", "columns_of"]

Columns = Sequence[tuple[int, torch.dtype]]
"""Width and type of each field of a row, in the order of its record."""
Slots = NDArray[np.int32] | NDArray[np.int64]

_WORDS = {2: (np.uint16, torch.int16), 4: (np.uint32, torch.int32)}


def columns_of(dim: int, dtype: torch.dtype, wide_states: int, row_states: int) -> list[tuple[int, torch.dtype]]:
    """Return the columns of a row: weight, states as wide as it, states of one number, two counters.

    Examples
    --------
    >>> columns_of(16, torch.bfloat16, 0, 1)
    [(16, torch.bfloat16), (1, torch.float32), (2, torch.int32)]
    """
    wide, narrow = [(dim, torch.float32)] * wide_states, [(1, torch.float32)] * row_states
    return [(dim, dtype), *wide, *narrow, (2, torch.int32)]


@dataclass(frozen=True, slots=True)
class Hbm:
    """So much memory of a GPU for rows, their state and the staging that moves them.

    Attributes
    ----------
    size
        Bytes, or a text such as ``"2 GiB"``.
    device
        ``"cuda"``, ``"cuda:1"``; ``"cpu"`` is the same without a GPU, for trying things out.

    Examples
    --------
    >>> Hbm("1 MiB", device="cpu").open(columns_of(16, torch.float32, 0, 1), staging_rows=100).num_slots
    13465
    """

    size: str | int
    device: str = "cuda"

    def __post_init__(self) -> None:
        try:
            kind = torch.device(self.device).type
        except RuntimeError:
            kind = ""
        if kind not in ("cuda", "cpu"):
            raise InputError(f"there is no device {self.device!r} for rows", hint="use 'cuda', 'cuda:1' or 'cpu'")
        if self.nbytes < 1:
            raise InputError(f"a memory of {self.size} holds no row", hint='write the size like "2 GiB"')

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return parse_size(self.size) if isinstance(self.size, str) else self.size

    def open(self, columns: Columns, *, staging_rows: int, buffers: int = 3) -> HbmSlab:
        """Take the memory: as many slots as fit beside the staging.

        Raises
        ------
        InputError
            If not even the staging and one row fit, naming the bytes needed.
        """
        row = _record(columns).nbytes
        staging = buffers * staging_rows * (row + 8)
        num_slots = (self.nbytes - staging) // row
        if num_slots < 1:
            raise InputError(
                f"{self.size} cannot hold {buffers} buffers of {staging_rows} rows and a row, {staging + row} bytes",
                hint="give more memory, or use smaller batches",
            )
        return HbmSlab(columns, num_slots, self.device, staging_rows=staging_rows, buffers=buffers)


class HbmSlab:
    """Columns on a device, with one line per slot, and the way in and out for records.

    A record going in is copied to a staging buffer on the device beside the computation, and is written to its slot
    when the caller says so, in line with the computation; one going out is read in line and copied out beside it. So
    the rows that a kernel sees do not depend on how fast anything moves.

    Parameters
    ----------
    columns
        Width and type of each; records have the same fields in this order, laid out as by `Record`.
    num_slots
        Lines of each column.
    device
        A CUDA device, or ``"cpu"``: then everything happens at once.
    staging_rows
        The most records one asynchronous move can carry.
    buffers
        The most such moves under way.

    Examples
    --------
    >>> slab = HbmSlab([(3, torch.float32), (1, torch.float32)], 10, "cpu", staging_rows=4)
    >>> records = np.arange(8, dtype=np.float32).view(np.uint8).reshape(2, 16)
    >>> slab.put(np.array([7, 2]), records)
    >>> slab.columns[0][2]
    tensor([4., 5., 6.])
    """

    def __init__(
        self, columns: Columns, num_slots: int, device: str | torch.device, *, staging_rows: int, buffers: int = 3
    ) -> None:
        if num_slots < 1 or staging_rows < 1 or buffers < 1:
            raise InputError(
                f"a slab needs slots and staging, got {num_slots} slots and {buffers} buffers of {staging_rows} rows",
                hint="pass positive sizes",
            )
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        if on_gpu and not torch.cuda.is_available():
            raise InputError(f"there is no GPU for rows on {device}", hint="use a machine with CUDA, or device='cpu'")
        record = _record(columns)
        self.num_slots, self.staging_rows = num_slots, staging_rows
        self.row_bytes = record.nbytes
        """Bytes of one record."""
        self._inward = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._outward = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]
        try:
            self.columns = [torch.zeros(num_slots, width, dtype=dtype, device=self.device) for width, dtype in columns]
            """The fields of all slots."""
            # The memory may have been another tensor's, of which the device is not done yet.
            idle = _mark(self._compute())
            self._free = [_Buffer(staging_rows, self.row_bytes, self.device, idle) for _ in range(buffers)]
        except RuntimeError as error:
            raise StorageError(
                f"{device} has no room for {num_slots} slots of {self.row_bytes} bytes ({str(error).splitlines()[0]})",
                hint="give the rows less memory, or free some of the device's",
            ) from error
        self._fields = [
            _Field(column, view, at) for column, (view, at) in zip(self.columns, record.columns, strict=True)
        ]
        self._staging = buffers * staging_rows * (self.row_bytes + 8)

    @property
    def nbytes(self) -> int:
        """Bytes on the device: columns and staging."""
        return sum(column.nbytes for column in self.columns) + self._staging

    def pinned(self, rows: int) -> Bytes:
        """Return page-locked memory for so many records; what lies in such memory moves without another copy."""
        return _host((rows, self.row_bytes), torch.uint8, self.device).numpy()

    def put(self, slots: Slots, records: Bytes) -> None:
        """Write records to their slots before anything the device is asked to do next."""
        self._in_parts(self.put_async, slots, records)

    def take(self, slots: Slots, records: Bytes) -> None:
        """Read slots into `records`, after everything the device has been asked to do."""
        self._in_parts(self.take_async, slots, records)

    def put_async(self, slots: Slots, records: Bytes) -> Move:
        """Send records to the device; its `wait` writes them to their slots, before what the device is asked next.

        Page-locked records must stay as they are until then. Others are copied before this returns.
        """
        buffer, num = self._take_buffer(slots, records)
        source = torch.from_numpy(records)
        direct = _is_pinned(source)
        if not direct:
            source = buffer.host(self.device)[:num].copy_(source)
        with _on(self._inward):
            _after(self._inward, buffer.idle)
            there, staged = buffer.slots[:num], buffer.staged[:num]
            there.copy_(buffer.host_slots[:num], non_blocking=True)
            staged.copy_(source, non_blocking=True)
            arrived = buffer.sent = _mark(self._inward)

        def finish() -> None:
            if direct and arrived is not None:
                arrived.synchronize()  # the caller's memory is the caller's again
            stream = self._compute()
            _after(stream, arrived)
            for field in self._fields:
                field.words.index_copy_(0, there, field.of(staged))
            buffer.idle = _mark(stream)
            self._free.append(buffer)

        return Move(finish)

    def take_async(self, slots: Slots, records: Bytes) -> Move:
        """Read slots as they are when the device gets here; `records` holds them once `wait` has returned."""
        buffer, num = self._take_buffer(slots, records)
        target = torch.from_numpy(records)
        landing = target if _is_pinned(target) else buffer.host(self.device)[:num]
        stream = self._compute()
        _after(stream, buffer.idle)
        there, staged = buffer.slots[:num], buffer.staged[:num]
        there.copy_(buffer.host_slots[:num], non_blocking=True)
        for field in self._fields:
            field.of(staged).copy_(field.words.index_select(0, there))
        gathered = _mark(stream)
        with _on(self._outward):
            _after(self._outward, gathered)
            landing.copy_(staged, non_blocking=True)
            arrived = buffer.sent = buffer.idle = _mark(self._outward)

        def finish() -> None:
            if arrived is not None:
                arrived.synchronize()
            if landing is not target:
                target.copy_(landing)
            self._free.append(buffer)

        return Move(finish)

    def _in_parts(self, send: Callable[[Slots, Bytes], Move], slots: Slots, records: Bytes) -> None:
        under_way: deque[Move] = deque()
        for start in range(0, len(slots), self.staging_rows):
            if under_way and not self._free:
                under_way.popleft().wait()
            stop = start + self.staging_rows
            under_way.append(send(slots[start:stop], records[start:stop]))
        for move in under_way:
            move.wait()

    def _take_buffer(self, slots: Slots, records: Bytes) -> tuple[_Buffer, int]:
        num = len(slots)
        if num > self.staging_rows:
            raise InputError(
                f"{num} rows do not fit a staging buffer of {self.staging_rows}", hint="move them in parts"
            )
        assert records.shape == (num, self.row_bytes), records.shape
        assert num == 0 or 0 <= slots.min() <= slots.max() < self.num_slots, "a slot is outside the slab"
        assert self._free, "every staging buffer is under way: wait for a move first"
        buffer = self._free.pop(0)
        if buffer.sent is not None:
            buffer.sent.synchronize()  # until then its page-locked memory is being read
        buffer.host_slots[:num] = torch.from_numpy(slots)
        return buffer, num

    def _compute(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self.device) if self._inward is not None else None


class Move:
    """Records under way."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish: Callable[[], None] | None = finish

    def wait(self) -> None:
        """End the move; a second call does nothing."""
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()


class _Field:
    """One column seen as words, and where its words lie in a record."""

    def __init__(self, column: Tensor, view: NDArray[np.uint16 | np.uint32], at: int) -> None:
        self._word = _WORDS[view.itemsize][1]
        self.words = column.view(self._word)
        self._start, self._stop = at, at + view.shape[1]

    def of(self, staged: Tensor) -> Tensor:
        """Return the words of this field in some records."""
        return staged.view(self._word)[:, self._start : self._stop]


class _Buffer:
    """Staging for one move, on the device and, once it is needed, in page-locked memory."""

    def __init__(self, rows: int, row_bytes: int, device: torch.device, idle: torch.cuda.Event | None) -> None:
        self.slots = torch.empty(rows, dtype=torch.int64, device=device)
        self.staged = torch.empty(rows, row_bytes, dtype=torch.uint8, device=device)
        self.host_slots = _host((rows,), torch.int64, device)
        self.sent: torch.cuda.Event | None = None
        """When the last move had left, or filled, the page-locked memory."""
        self.idle = idle
        """When the last move had no more need of the device's part."""
        self._host: Tensor | None = None

    def host(self, device: torch.device) -> Tensor:
        if self._host is None:
            self._host = _host(tuple(self.staged.shape), torch.uint8, device)
        return self._host


def _record(columns: Columns) -> Record:
    return Record([np.empty((0, width), _WORDS[dtype.itemsize][0]) for width, dtype in columns])


def _host(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
    except RuntimeError as error:
        raise StorageError(
            f"no page-locked memory for {shape} items of {dtype} ({str(error).splitlines()[0]})",
            hint="use smaller batches or fewer buffers",
        ) from error


def _is_pinned(records: Tensor) -> bool:
    return torch.cuda.is_available() and records.is_pinned()


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _mark(stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    return None if stream is None else stream.record_event()


def _after(stream: torch.cuda.Stream | None, event: torch.cuda.Event | None) -> None:
    if stream is not None and event is not None:
        stream.wait_event(event)
