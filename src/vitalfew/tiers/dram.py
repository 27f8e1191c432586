"""Main memory as a tier: the slab that is computed on, or, below a faster one, a ring of rows that left it last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitalfew.core import Budget, InputError
from vitalfew.tiers.lower import Bytes, Ids, Lower, Opened, Places, Traffic

__all__ = ["Dram", "Nowhere"]


@dataclass(frozen=True, slots=True)
class Dram:
    """So much main memory.

    Attributes
    ----------
    size
        ``"2 GiB"``, a share of what all rows would take (``0.1``), or a count of rows. As the first tier a size in
        bytes covers everything: rows, optimizer state, directory, window and buffers.

    Examples
    --------
    >>> Dram("64 MiB").limit(record_bytes=64, num_rows=10**7) == 2**20
    True
    """

    size: Budget | float | int | str

    def limit(self, record_bytes: int, num_rows: int) -> int:
        """Return how many rows that is, without counting what else they need."""
        budget = Budget.of(self.size)
        if budget.kind == "coverage":
            raise InputError("memory cannot be given as a coverage", hint='write it like "2 GiB" or 0.1')
        of_all = {"share": budget.value * num_rows, "count": budget.value, "bytes": budget.value / record_bytes}
        return min(int(of_all[budget.kind]), num_rows)

    def open(self, num_rows: int, record_bytes: int, below: Opened | None = None) -> Opened:
        """Stand between the compute memory and the tier below, or hold all rows where there is none."""
        lines = self.limit(record_bytes, num_rows)
        if below is None:
            if lines < num_rows:
                raise InputError(
                    f"{self.size!r} holds {lines:,} of {num_rows:,} rows",
                    hint=f"give it {num_rows * record_bytes:,} bytes, or add a tier below, such as File(...)",
                )
            return Opened(_Whole(num_rows, record_bytes), None, None)
        if lines < 1:
            raise InputError(f"{self.size!r} holds not one row of {record_bytes} bytes", hint="give more memory")
        places = None if below.places is None else np.where(below.places >= 0, below.places + lines, -1)
        return Opened(_Ring(below.tier, lines), None if places is None else places.astype(np.int32), below.note)


class _Ring:
    """Rows in the order in which they came; the oldest goes below when its line is wanted.

    Places below the number of lines are lines, those above it are the lower tier's.
    """

    def __init__(self, below: Lower, lines: int) -> None:
        self.record_bytes = below.record_bytes
        self.traffic = Traffic()
        self.below = below
        self._records = np.zeros((lines, below.record_bytes), np.uint8)
        self._ids = np.full(lines, -1, np.int64)
        self._homes = np.full(lines, -1, np.int32)
        self._next = 0
        self._moved: list[tuple[Ids, Places]] = []

    @property
    def nbytes(self) -> int:
        return self._records.nbytes + self._ids.nbytes + self._homes.nbytes + self.below.nbytes

    def _split(self, places: Places) -> tuple[NDArray[np.bool_], Places]:
        return places < len(self._ids), np.maximum(places - len(self._ids), -1).astype(np.int32)

    def read(self, ids: Ids, places: Places, out: Bytes) -> None:
        here, deeper = self._split(places)
        if not here.all():
            part = np.empty((int((~here).sum()), self.record_bytes), np.uint8)
            self.below.read(ids[~here], deeper[~here], part)
            out[~here] = part
        out[here] = self._records[places[here]]
        self.traffic.rows_read += int(here.sum())
        self.traffic.bytes_read += int(here.sum()) * self.record_bytes

    def write(self, ids: Ids, records: Bytes) -> Places:
        lines = len(self._ids)
        if len(ids) > lines:  # those that would not stay go below at once, and the last then find all lines free
            self._sink(np.flatnonzero(self._ids >= 0))
            deeper = self.below.write(ids[:-lines], records[:-lines]) + np.int32(lines)
            self._follow()
            return np.concatenate([deeper, self.write(ids[-lines:], records[-lines:])])
        into = (self._next + np.arange(len(ids))) % lines
        self._sink(into[self._ids[into] >= 0])
        self._records[into], self._ids[into], self._homes[into] = records, ids, -1
        self._next = int(self._next + len(ids)) % lines
        self.traffic.rows_written += len(ids)
        self.traffic.bytes_written += len(ids) * self.record_bytes
        return into.astype(np.int32)

    def _sink(self, lines: NDArray[np.int64]) -> None:
        """Send lines below, those without a copy there as they are."""
        self._copy_below(lines)
        if len(lines):
            self._moved.append((self._ids[lines], self._homes[lines] + np.int32(len(self._ids))))
            self._ids[lines] = -1

    def _copy_below(self, lines: NDArray[np.int64]) -> None:
        new = lines[self._homes[lines] < 0]
        if len(new):
            self._homes[new] = self.below.write(self._ids[new], self._records[new])
            self._follow()

    def _follow(self) -> None:
        moved = self.below.moved()
        if moved is None:
            return
        ids, places = moved
        line_of = np.flatnonzero(self._ids >= 0)
        order = np.argsort(self._ids[line_of])
        at = np.searchsorted(self._ids[line_of][order], ids)
        at = np.minimum(at, max(len(line_of) - 1, 0))
        here = self._ids[line_of][order][at] == ids if len(line_of) else np.zeros(len(ids), np.bool_)
        self._homes[line_of[order][at[here]]] = places[here]
        self._moved.append((ids[~here], places[~here] + np.int32(len(self._ids))))

    def release(self, places: Places) -> None:
        here, deeper = self._split(places)
        lines = places[here]
        homes = self._homes[lines]
        self._ids[lines] = -1
        self.below.release(np.concatenate([deeper[~here], homes[homes >= 0]]))

    def moved(self) -> tuple[Ids, Places] | None:
        self._follow()
        if not self._moved:
            return None
        parts, self._moved = self._moved, []
        return np.concatenate([ids for ids, _ in parts]), np.concatenate([places for _, places in parts])

    def commit(self, places: Callable[[int, int], Places], note: Mapping[str, Any]) -> None:
        self._copy_below(np.flatnonzero(self._ids >= 0))

        def deeper(start: int, stop: int) -> Places:
            here, below = self._split(part := places(start, stop))
            found = np.where(here, self._homes[np.minimum(part, len(self._ids) - 1)], below)
            for ids, moved in self._moved:  # on account of what was just copied; the owner has not asked yet
                mine = (ids >= start) & (ids < stop)
                found[ids[mine] - start] = moved[mine] - len(self._ids)
            return np.where(part < 0, -1, found).astype(np.int32)

        self.below.commit(deeper, note)

    def close(self) -> None:
        self.below.close()


class _Memory:
    """What memory below which there is nothing can, and cannot, do."""

    def __init__(self, record_bytes: int) -> None:
        self.record_bytes = record_bytes
        self.traffic = Traffic()

    def release(self, places: Places) -> None:
        pass

    def moved(self) -> tuple[Ids, Places] | None:
        return None

    def commit(self, places: Callable[[int, int], Places], note: Mapping[str, Any]) -> None:
        raise InputError("memory alone keeps nothing", hint="add a tier such as File(...), or save() to a folder")

    def close(self) -> None:
        pass


class Nowhere(_Memory):
    """No tier below: all rows fit."""

    @property
    def nbytes(self) -> int:
        return 0

    def read(self, ids: Ids, places: Places, out: Bytes) -> None:
        raise AssertionError("no row was ever written here")

    def write(self, ids: Ids, records: Bytes) -> Places:
        raise InputError(f"{len(ids)} rows have no place to go", hint="add a tier below, such as File(...)")


class _Whole(_Memory):
    """Every row in its own line."""

    def __init__(self, num_rows: int, record_bytes: int) -> None:
        from vitalfew.tiers.record import Record

        super().__init__(record_bytes)
        self._lines = np.zeros((num_rows, record_bytes // 4), np.uint32)
        self._record = Record([self._lines])

    @property
    def nbytes(self) -> int:
        return self._lines.nbytes

    def read(self, ids: Ids, places: Places, out: Bytes) -> None:
        self._record.take(places, out)
        self.traffic.rows_read += len(out)
        self.traffic.bytes_read += out.nbytes

    def write(self, ids: Ids, records: Bytes) -> Places:
        places = ids.astype(np.int32)
        self._record.put(places, records)
        self.traffic.rows_written += len(records)
        self.traffic.bytes_written += records.nbytes
        return places
