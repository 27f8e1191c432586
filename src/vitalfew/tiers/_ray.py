"""A tier in the memory of other processes or machines: rows are spread over Ray actors by their id."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitalfew.core.errors import InputError, StorageError
from vitalfew.core.files import read_document, write_document
from vitalfew.tiers._ray_actors import Actors
from vitalfew.tiers.lower import Bytes, Ids, Opened, Places, Traffic

__all__ = ["Remote"]

_ROUND_BYTES = 8 << 20
"""A batch goes out in rounds of this size, so that no message and no sum of messages in flight is larger."""
_SLOWEST_DISK = 8 << 20  # bytes per second: a shard that writes its file is given the time this takes
_MOST_FILES = 16  # a shard with more than these is written whole
_MANIFEST = ("remote-rows", 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """Keep rows in the memory of Ray actors: on this machine, or spread over the nodes of a cluster.

    Parameters
    ----------
    shards
        Number of actors; a row lives on shard `id % shards`.
    address
        A running Ray cluster: `"host:port"`, or `"auto"` for the one of this node. None: a small Ray of our own on
        this machine, which ends with the tier. Where Ray is initialised already, that one is used and left running.
    folder
        Where `commit` writes. Every shard writes files of its own there, so with shards on other nodes it must be a
        folder that all nodes share under the same name. None: nothing can be committed.
    timeout
        Seconds to wait for an answer before a shard counts as lost. A commit and a resume are given more, by size.
    latency
        Seconds each shard sleeps before it answers a read or a write. For tests only.

    Examples
    --------
    >>> remote = Remote(shards=4, folder="/shared/run-1")
    >>> remote.timeout
    60.0

    Notes
    -----
    Cost: one call per touched shard and 8 MiB, all in flight at once; some milliseconds each. Leave it when the rows
    fit the memory or the disk of this machine.
    """

    shards: int = 2
    address: str | None = None
    folder: str | os.PathLike[str] | None = None
    timeout: float = 60.0
    latency: float = 0.0

    def __post_init__(self) -> None:
        if type(self.shards) is not int or self.shards < 1:
            raise InputError(f"shards must be a positive whole number, got {self.shards!r}", hint="pass 1 or more")
        if self.address is not None and "://" in self.address:
            raise InputError(f"address {self.address!r} is not the one of a node", hint="pass host:port, or auto")
        if not 0 < self.timeout < float("inf"):
            raise InputError(f"timeout must be positive and finite, got {self.timeout!r}", hint="pass seconds")
        if not 0 <= self.latency < self.timeout:
            raise InputError(f"latency must lie in [0, timeout), got {self.latency!r}", hint="it is for tests only")

    def open(self, num_rows: int, record_bytes: int, *, resume: bool = False) -> Opened:
        """Start the shards; with `resume`, from the last commit in the folder.

        Raises
        ------
        MissingExtra
            If Ray is not installed.
        InputError
            If there is nothing to resume from, or it is of another shape.
        StorageError
            If the cluster or a shard does not answer, or a file of the commit is damaged.
        """
        if -(-num_rows // self.shards) >= 2**31:
            raise InputError(f"{num_rows} rows are too many for {self.shards} shards", hint="pass more shards")
        last = self._last_commit(num_rows, record_bytes) if resume else None
        tier = _Tier(self, num_rows, record_bytes)
        try:
            places = tier.start(last)
        except BaseException:
            tier.close()
            raise
        return Opened(tier, places, None if last is None else last["note"])

    def _last_commit(self, num_rows: int, record_bytes: int) -> dict[str, Any]:
        if self.folder is None:
            raise InputError("there is nothing to resume from: Remote has no folder", hint="pass folder=")
        path = Path(self.folder) / "commit.json"
        document = read_document(path, *_MANIFEST)
        for name, asked in (("num_rows", num_rows), ("record_bytes", record_bytes), ("shards", self.shards)):
            if document.get(name) != asked:
                raise InputError(
                    f"{path} was written with {name} {document.get(name)}, not {asked}",
                    hint="open it with the settings it was written with",
                )
        return document


class _Tier:
    """The owner's side: sends, waits, and knows which files make up the last commit."""

    def __init__(self, remote: Remote, num_rows: int, record_bytes: int) -> None:
        self.record_bytes = record_bytes
        self.traffic = Traffic()
        self._num_rows = num_rows
        self._folder = None if remote.folder is None else Path(remote.folder).absolute()
        self._step = max(1, _ROUND_BYTES // (record_bytes + 8))
        self._files: list[list[dict[str, Any]]] = [[] for _ in range(remote.shards)]
        # In the name of every file: a run that starts over, or a shard that outlives its owner, meets no other's file.
        self._token = secrets.token_hex(4)
        self._epoch = 0
        self._rows = [len(range(k, num_rows, remote.shards)) for k in range(remote.shards)]
        shards = [(rows, record_bytes, remote.latency) for rows in self._rows]
        self._actors = Actors(remote.address, shards, remote.timeout, self.traffic)

    def start(self, last: Mapping[str, Any] | None) -> Places | None:
        """Wait for the shards; return the places of the rows that the commit holds."""
        if last is None:
            self._actors.ask("load", {k: ("", []) for k in range(len(self._rows))})
            return None
        self._files, self._epoch = last["files"], last["epoch"]
        files = {k: (str(self._folder), self._files[k]) for k in range(len(self._rows))}
        places = np.empty(self._num_rows, np.int32)
        for k, held in self._actors.ask("load", files, self._disk_seconds()).items():
            places[k :: len(files)] = np.unpackbits(held, count=self._rows[k]).astype(np.int32) - 1
        return places

    @property
    def nbytes(self) -> int:
        """Bytes of main memory on the owner's side: one round as it is gathered and as it is sent, and its ids."""
        return self._step * (2 * self.record_bytes + 32)

    def read(self, ids: Ids, places: Places, out: Bytes) -> None:
        for start in range(0, len(ids), self._step):
            lines = out[start : start + self._step]
            batch = _by_shard(ids[start : start + self._step], len(self._rows))
            for k, records in self._actors.ask("read", {k: (local,) for k, (_, local) in batch.items()}).items():
                lines[batch[k][0]] = records
            self.traffic.reads += len(batch)
        self.traffic.rows_read += len(ids)
        self.traffic.bytes_read += len(ids) * (self.record_bytes + 8)

    def write(self, ids: Ids, records: Bytes) -> Places:
        for start in range(0, len(ids), self._step):
            lines = records[start : start + self._step]
            batch = _by_shard(ids[start : start + self._step], len(self._rows))
            self._actors.ask("write", {k: (local, lines[order]) for k, (order, local) in batch.items()})
            self.traffic.writes += len(batch)
        self.traffic.rows_written += len(ids)
        self.traffic.bytes_written += len(ids) * (self.record_bytes + 8)
        return np.zeros(len(ids), np.int32)

    def release(self, places: Places) -> None:
        """Do nothing: a shard keeps one line per row, and the next write of the row overwrites it."""

    def moved(self) -> tuple[Ids, Places] | None:
        return None

    def commit(self, places: Callable[[int, int], Places], note: Mapping[str, Any]) -> None:
        """Let every shard save what changed, then switch to it by one document.

        `places` is not asked: a shard knows which rows were written.
        """
        if self._folder is None:
            raise InputError("Remote has no folder to commit to", hint="pass folder=, one that all nodes share")
        self._epoch += 1  # also after a commit that failed, so that no name is used twice
        whole = [_is_long(files) for files in self._files]
        path = {k: self._folder / f"shard-{k}-{self._epoch}-{self._token}.rows" for k in range(len(self._rows))}
        saved = self._actors.ask("save", {k: (str(path[k]), whole[k]) for k in path}, self._disk_seconds())
        files = []
        for k, file in saved.items():
            if file["rows"] and not path[k].is_file():
                raise StorageError(
                    f"shard {k} of {len(path)} has written {path[k]}, which is not seen here",
                    hint="pass a folder that all nodes share under the same name",
                )
            files.append(([] if whole[k] else self._files[k]) + ([file] if file["rows"] else []))
        body = {
            "epoch": self._epoch,
            "num_rows": self._num_rows,
            "record_bytes": self.record_bytes,
            "shards": len(path),
        }
        try:
            write_document(self._folder / "commit.json", *_MANIFEST, {**body, "files": files, "note": dict(note)})
        except OSError as error:
            raise StorageError(
                f"{self._folder / 'commit.json'} could not be written ({error.strerror or error})",
                hint="make room and commit again; the last commit is still there",
            ) from error
        self._files = files
        self._tidy()
        self._actors.ask("committed", dict.fromkeys(path, ()))

    def close(self) -> None:
        self._actors.close()

    def _disk_seconds(self) -> float:
        return max(self._rows) * (self.record_bytes + 8) / _SLOWEST_DISK

    def _tidy(self) -> None:
        """Remove files that no commit needs, and what a killed shard has left half."""
        assert self._folder is not None
        kept = {file["name"] for files in self._files for file in files}
        for path in (*self._folder.glob("shard-*.rows"), *self._folder.glob(".shard-*.rows.*.part")):
            if path.name not in kept:
                with contextlib.suppress(OSError):
                    path.unlink()


def _by_shard(ids: Ids, shards: int) -> dict[int, tuple[NDArray[np.intp], Ids]]:
    """Return, for each shard that is touched, where its rows are in the batch and what the shard calls them."""
    shard = (ids % shards).astype(np.int32)
    order = np.argsort(shard, kind="stable")
    ends = np.cumsum(np.bincount(shard, minlength=shards))
    parts = enumerate(np.split(order, ends[:-1]))
    return {k: (part, ids[part] // shards) for k, part in parts if len(part)}


def _is_long(files: list[dict[str, Any]]) -> bool:
    """Tell whether changes outweigh the rows they change, so that a whole file is due."""
    rows = [file["rows"] for file in files]
    return len(rows) >= _MOST_FILES or sum(rows[1:]) >= sum(rows[:1])
