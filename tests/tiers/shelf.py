"""A tier that keeps records in a dictionary, fails when it is told to, and watches what its owner does."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vitalfew.core import StorageError
from vitalfew.tiers import Opened, Traffic

Committed = tuple[dict[int, tuple[int, bytes]], np.ndarray, str]


@dataclass
class Shelf:
    """Settings of a tier, as a user names it; opened again it holds its last commit.

    `fails` is asked before each read, write and commit, by name, and may say that it breaks. With `wanders`, a write
    moves some other rows as well, as the compaction of a file does.
    """

    fails: Callable[[str], bool] = lambda what: False
    wanders: random.Random | None = None
    committed: Committed | None = None
    tiers: list[Keeper] = field(default_factory=list)

    def open(self, num_rows: int, record_bytes: int, *, resume: bool = False) -> Opened:
        tier = Keeper(self, num_rows, record_bytes)
        self.tiers.append(tier)
        if not resume or self.committed is None:
            return Opened(tier, None, None)
        tier.live, places, note = dict(self.committed[0]), self.committed[1].copy(), json.loads(self.committed[2])
        tier.next = max(tier.live, default=-1) + 1
        return Opened(tier, places, note)


class Keeper:
    """Places are never used twice, so whatever is stale is found out."""

    def __init__(self, settings: Shelf, num_rows: int, record_bytes: int) -> None:
        self.settings, self.num_rows, self.record_bytes = settings, num_rows, record_bytes
        self.traffic, self.nbytes = Traffic(), 0
        self.live: dict[int, tuple[int, bytes]] = {}
        self.next = 0
        self.closed = False
        self._moved: list[tuple[int, int]] = []

    def _try(self, what: str) -> None:
        assert not self.closed, f"{what} after close"
        if self.settings.fails(what):
            raise StorageError(f"the shelf broke in a {what}", hint="mend it")

    def read(self, ids: np.ndarray, places: np.ndarray, out: np.ndarray) -> None:
        self._try("read")
        for line, (row, place) in enumerate(zip(ids.tolist(), places.tolist(), strict=True)):
            owner, record = self.live[place]
            assert owner == row, f"row {row} was sought in the place of row {owner}"
            out[line] = np.frombuffer(record, np.uint8)
        self.traffic.rows_read += len(ids)

    def write(self, ids: np.ndarray, records: np.ndarray) -> np.ndarray:
        here = {row for row, _ in self.live.values()}
        assert not here & set(ids.tolist()), "a row would live twice"
        assert len(set(ids.tolist())) == len(ids)
        self._try("write")
        others = list(self.live)
        places = np.arange(self.next, self.next + len(ids), dtype=np.int32)
        self.next += len(ids)
        for row, place, record in zip(ids.tolist(), places.tolist(), records, strict=True):
            self.live[place] = row, record.tobytes()
        if (dice := self.settings.wanders) is not None:
            for place in dice.sample(others, dice.randint(0, len(others))):
                self.live[self.next] = self.live.pop(place)
                self._moved.append((self.live[self.next][0], self.next))
                self.next += 1
        self.traffic.rows_written += len(ids)
        return places

    def release(self, places: np.ndarray) -> None:
        for place in places.tolist():
            del self.live[place]

    def moved(self) -> tuple[np.ndarray, np.ndarray] | None:
        if not self._moved:
            return None
        ids, places = np.array(self._moved).T
        self._moved = []
        return ids.astype(np.int64), places.astype(np.int32)

    def commit(self, places: Callable[[int, int], np.ndarray], note: Mapping[str, Any]) -> None:
        assert not self._moved, "rows were moved and nobody has asked where to"
        self._try("commit")
        half = self.num_rows // 2
        table = np.concatenate([places(0, half), places(half, self.num_rows)])
        told = {int(place): row for row, place in enumerate(table) if place >= 0}
        assert told == {place: row for place, (row, _) in self.live.items()}, "all rows, and no other"
        self.settings.committed = dict(self.live), table, json.dumps(note)

    def close(self) -> None:
        self.closed = True
