"""The folder of a file of rows: its lock, tables of places, and the one document that says which of them count.

A commit writes a table of places under a name of its own and then replaces `commit.json`, in one step. The table is
whole, or it is the rows that differ from an older whole one, as long as those are few.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vitalfew.core.errors import InputError, StorageError
from vitalfew.core.files import atomic_write, read_document, write_document
from vitalfew.tiers._direct import storage
from vitalfew.tiers.lower import Places

__all__ = [
    "DATA",
    "inspect",
    "lock",
    "read_commit",
    "read_places",
    "remove_tables",
    "write_commit",
    "write_places",
]

DATA, LOCK, COMMIT = "rows.pages", "lock", "commit.json"
LEFT_OVER = ("places-*.bin", "changes-*.bin", ".*.part")

_SCHEMA, _VERSION = "rows", 1
_CHUNK = 1 << 18
_INT32 = np.dtype("<i4")
_PAIR_BYTES = 2 * _INT32.itemsize

Table = dict[str, Any]
PlacesOf = Callable[[int, int], Places]


def _digest() -> Any:
    return hashlib.blake2b(digest_size=16)


def _entry(path: Path, digest: Any, count: int) -> dict[str, Any]:
    return {"file": path.name, "checksum": digest.hexdigest(), "count": count}


def _spans(num_rows: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_rows, _CHUNK):
        yield start, min(start + _CHUNK, num_rows)


class _TooManyError(Exception):
    """So many rows have changed that a whole table is due."""


def write_places(folder: Path, epoch: int, num_rows: int, places: PlacesOf, before: Table | None) -> Table:
    """Write where the rows are, as changes since the last whole table if those are few; return what tells the files."""
    if before is not None:
        try:
            return {"whole": before["whole"], "changes": _write_changes(folder, epoch, num_rows, places, before)}
        except _TooManyError:
            pass
    path, digest = folder / f"places-{epoch}.bin", _digest()
    with storage(f"writing {path}"), atomic_write(path) as file:
        for start, stop in _spans(num_rows):
            data = places(start, stop).astype(_INT32).tobytes()
            digest.update(data)
            file.write(data)
    return {"whole": _entry(path, digest, num_rows), "changes": None}


def _write_changes(folder: Path, epoch: int, num_rows: int, places: PlacesOf, before: Table) -> dict[str, Any]:
    """Write pairs of row and place, unless they come to more than a quarter of a whole table."""
    base, path = folder / before["whole"]["file"], folder / f"changes-{epoch}.bin"
    digest, count = _digest(), 0
    with storage(f"writing {path}"), base.open("rb") as old, atomic_write(path) as file:
        for start, stop in _spans(num_rows):
            were = np.frombuffer(old.read((stop - start) * _INT32.itemsize), _INT32)
            if len(were) < stop - start:
                raise _TooManyError
            are = places(start, stop)
            changed = np.flatnonzero(were != are)
            count += len(changed)
            if 4 * count * _PAIR_BYTES > num_rows * _INT32.itemsize:
                raise _TooManyError
            data = np.column_stack([changed + start, are[changed]]).astype(_INT32).tobytes()
            digest.update(data)
            file.write(data)
    return _entry(path, digest, count)


def read_places(folder: Path, table: Table) -> Places:
    """Return the place of every row, or tell which file is damaged."""
    places = _read(folder, table["whole"], _INT32.itemsize).astype(np.int32)
    if table["changes"] is not None:
        rows, to = _read(folder, table["changes"], _PAIR_BYTES).reshape(-1, 2).T
        places[rows] = to
    return places


def _read(folder: Path, entry: Mapping[str, Any], item_bytes: int) -> Places:
    path = folder / entry["file"]
    with storage(f"reading {path}"):
        data = path.read_bytes()
    digest = _digest()
    digest.update(data)
    if len(data) != entry["count"] * item_bytes or digest.hexdigest() != entry["checksum"]:
        raise StorageError(
            f"{path} is damaged: {len(data)} bytes that do not fit their checksum",
            hint="go back to a copy of the folder",
        )
    return np.frombuffer(data, _INT32)


def _seal(body: Mapping[str, Any]) -> str:
    digest = _digest()
    digest.update(json.dumps(body, sort_keys=True).encode())
    return str(digest.hexdigest())


def write_commit(folder: Path, body: Mapping[str, Any], note: Mapping[str, Any]) -> None:
    """Replace the document of the last commit: from here on, this is what the folder holds."""
    try:
        plain = json.loads(json.dumps({**body, "note": note}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"the note is not plain JSON ({error})", hint="pass numbers, text, lists and dicts") from None
    path = folder / COMMIT
    with storage(f"writing {path}"):
        write_document(path, _SCHEMA, _VERSION, {**plain, "checksum": _seal(plain)})


def read_commit(folder: Path) -> dict[str, Any]:
    """Return the document of the last commit."""
    path = folder / COMMIT
    try:
        with storage(f"reading {path}"):
            body = read_document(path, _SCHEMA, _VERSION)
    except InputError as error:
        raise StorageError(error.message, hint=error.hint) from None
    if body.pop("checksum", None) != _seal(body):
        raise StorageError(f"{path} is damaged: its checksum does not fit", hint="go back to a copy of the folder")
    return body


def remove_tables(folder: Path, table: Table | None) -> None:
    """Remove every table of places but those of the last commit, and what a killed process has left."""
    kept = {entry["file"] for entry in (table or {}).values() if entry is not None}
    with contextlib.suppress(OSError):  # what stays is removed the next time
        for pattern in LEFT_OVER:
            for path in folder.glob(pattern):
                if path.name not in kept:
                    path.unlink(missing_ok=True)


def inspect(folder: Path, resume: bool) -> bool:
    """Return whether the folder holds a commit; refuse what does not fit the wish."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is no folder", hint="name a folder for the rows")
    found = (folder / COMMIT).exists()
    if resume and not found:
        raise InputError(f"{folder} holds no commit to resume from", hint="open it without resume to begin")
    if not resume and found:
        raise InputError(
            f"{folder} holds the rows of an earlier run", hint="pass resume=True to go on, or name another folder"
        )
    if not resume and folder.exists():
        ours = (DATA, LOCK, *LEFT_OVER)
        alien = [path.name for path in folder.iterdir() if not any(path.match(pattern) for pattern in ours)]
        if alien:
            raise InputError(f"{folder} holds other files, such as {min(alien)}", hint="name a folder of its own")
    return found


def lock(folder: Path) -> int:
    """Take the folder for this process alone, until the file descriptor is closed; make it if it is absent."""
    if not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder.parent, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(f"{folder} is in use", hint="wait for the other run, or name another folder") from None
    except BaseException:
        os.close(handle)
        raise
    return handle
