"""What every tier below the compute memory can do: hold rows as records, and hand them out and take them by batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bytes", "Ids", "Lower", "Opened", "Places", "Traffic"]

Ids = NDArray[np.int64]
"""Row ids over all tables, 0 to num_rows - 1."""
Places = NDArray[np.int32]
"""Where a tier keeps rows: its own numbers, never negative; -1 stands for a row that was never written."""
Bytes = NDArray[np.uint8]
"""Records, shape (rows, record_bytes)."""


@dataclass(slots=True)
class Traffic:
    """What a tier has moved, counted as it was moved."""

    rows_read: int = 0
    rows_written: int = 0
    bytes_read: int = 0
    """Bytes the device was asked for: whole pages, where it has pages."""
    bytes_written: int = 0
    reads: int = 0
    """Requests: pages read, calls made."""
    writes: int = 0
    seconds: float = 0.0
    """Time spent waiting for the device."""


class Lower(Protocol):
    """A tier that holds whole rows (weights, optimizer state, statistics) for the memory above it.

    The owner keeps the directory from row to place, so that a row has one authoritative copy. Calls come from one
    thread at a time. A call that fails has changed nothing the owner can see.
    """

    record_bytes: int
    traffic: Traffic

    @property
    def nbytes(self) -> int:
        """Bytes of main memory this tier takes on the owner's side: buffers and tables."""

    def read(self, ids: Ids, places: Places, out: Bytes) -> None:
        """Copy records into the lines of `out`. They stay where they are."""

    def write(self, ids: Ids, records: Bytes) -> Places:
        """Take records and return where they are."""

    def release(self, places: Places) -> None:
        """Drop records that have been changed or taken over above."""

    def moved(self) -> tuple[Ids, Places] | None:
        """Return rows this tier has moved on its own since the last call, and their new places, once."""

    def commit(self, places: Callable[[int, int], Places], note: Mapping[str, Any]) -> None:
        """Make the present content durable; a later `open` finds it, whatever happens after.

        `places(start, stop)` tells the places of those rows. `note` is plain JSON, given back by `open`.
        """

    def close(self) -> None:
        """Let go of files and processes; what was not committed is lost."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A tier that is open, and what its last commit holds: nothing for a new one."""

    tier: Lower
    places: Places | None
    note: dict[str, Any] | None
