"""Rows on disk, wherever they lay in memory: safetensors files and a manifest, in a folder that is whole or absent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vitalfew.core import InputError, StorageError, VitalfewError
from vitalfew.core.files import atomic_folder, read_document, write_document
from vitalfew.embeddings.shards import Shard, ShardWriter, plan
from vitalfew.embeddings.tables import EmbeddingBags

__all__ = ["load_rows", "save_rows"]

_MANIFEST, _SCHEMA, _VERSION = "rows.json", "rows-export", 1
_CHUNK = 8 << 20
"""Bytes of rows that are in memory at a time."""
_MIXED = "the tables are part old, part new: load again, or open them anew"

Progress = Callable[[float], object]


def save_rows(
    tables: EmbeddingBags,
    folder: str | os.PathLike[str],
    *,
    state: bool = True,
    shard_bytes: int = 1 << 30,
    progress: Progress | None = None,
) -> None:
    """Write all rows as safetensors, a few at a time, whether they are in memory or in a tier below.

    Parameters
    ----------
    tables
        Of any kind. What they hold is written, not where it lies.
    folder
        Must not exist; it appears when it is whole.
    state
        Whether to write the optimizer state too, so that training can go on. Statistics are left out.
    shard_bytes
        The most that one file holds of rows. A larger table is cut: ``user.weight.0``, ``user.weight.1``.
    progress
        Called with the share that is done.

    Raises
    ------
    InputError
        If the folder exists, or gradients wait for a step.
    StorageError
        If the disk is full or fails; nothing is left behind.

    Examples
    --------
    >>> import tempfile
    >>> from safetensors.torch import load_file
    >>> from vitalfew.embeddings import SGD, EmbeddingBags, Table
    >>> tables = EmbeddingBags([Table("user", 10, 4), Table("item", 20, 4)], SGD(lr=0.5))
    >>> folder = Path(tempfile.mkdtemp()) / "export"
    >>> save_rows(tables, folder)
    >>> sorted(path.name for path in folder.iterdir())
    ['rows-weight-00001.safetensors', 'rows.json']
    >>> torch.equal(load_file(folder / "rows-weight-00001.safetensors")["item.weight"], tables.rows_of("item"))
    True

    Notes
    -----
    Rows are asked for in the order of their ids. Where a tier keeps them in another order, several are read for one.
    """
    if shard_bytes < 1:
        raise InputError(f"shard_bytes must be positive, got {shard_bytes}", hint="1 << 30 is usual")
    tables.rows.check_settled("a save would leave them out")
    folder, files = Path(folder), _shards(tables, state, shard_bytes)
    digests: dict[str, str] = {}
    failed, hint = f"{folder} cannot be written", "look at the disk and the room on it; nothing is left behind"
    with _storage(failed, hint), atomic_folder(folder) as part, contextlib.ExitStack() as stack:
        outs: dict[str, ShardWriter] = {}
        for start, stop in _spans(files, tables):
            columns = tables.columns(start, stop)
            for file in _within(files, start, stop):
                if start == file.start:
                    outs[file.name] = stack.enter_context(ShardWriter(part, file))
                outs[file.name].write(columns[file.column])
                if stop == file.stop:
                    digests[file.name] = outs.pop(file.name).close()
            del columns  # before the next ones come
            if progress is not None:
                progress(stop / tables.num_rows)
        body = {
            **_about(tables),
            "state": state,
            "shard_bytes": shard_bytes,
            "files": [file.entry() | {"sha256": digests[file.name]} for file in files],
        }
        write_document(part / _MANIFEST, _SCHEMA, _VERSION, {**body, "seal": _seal(body)})


def load_rows(folder: str | os.PathLike[str], tables: EmbeddingBags, *, progress: Progress | None = None) -> None:
    """Fill tables of any kind with the rows that `save_rows` has written, a few at a time.

    Everything is checked first, the digests of all files too: what does not fit leaves the tables as they were. The
    settings of the optimizer, the count of steps and the seed of the rounding come along, so that training goes on as
    it would have. From a folder without state the weights are taken alone, and training begins anew on them.

    Parameters
    ----------
    folder
        What `save_rows` made.
    tables
        With the same tables, storage and optimizer. Rows that are in no slot go straight to the tier below; `commit`
        makes them durable there.
    progress
        Called with the share that is done.

    Raises
    ------
    InputError
        If the folder is damaged or made for other tables, or an update may still come; nothing has changed then.
    StorageError
        If a disk fails half way: the tables are part old, part new then.

    Examples
    --------
    >>> import tempfile
    >>> from vitalfew.embeddings import SGD, EmbeddingBags, Table, TieredEmbeddings
    >>> from vitalfew.tiers import Dram, File
    >>> folder = Path(tempfile.mkdtemp())
    >>> tables = EmbeddingBags([Table("user", 1000, 4)], SGD(lr=0.5))
    >>> tables.save(folder / "export")
    >>> with TieredEmbeddings(tables.tables, SGD(lr=0.5), tiers=[Dram(50), File(folder / "rows")]) as tiered:
    ...     tiered.load(folder / "export")
    ...     torch.equal(tiered.rows_of("user"), tables.rows_of("user"))
    True
    """
    folder = Path(folder)
    body = read_document(folder / _MANIFEST, _SCHEMA, _VERSION)
    if body.pop("seal", None) != _seal(body):
        raise InputError(f"`{folder / _MANIFEST}` is damaged: it is not what was written", hint="restore the folder")
    _check_fit(folder, body, tables)
    files = _shards(tables, body["state"], body["shard_bytes"])
    if [file.entry() for file in files] != [{k: v for k, v in e.items() if k != "sha256"} for e in body["files"]]:
        raise InputError(f"`{folder}` has its rows in files of another kind", hint="it needs another vitalfew")
    for n, (file, entry) in enumerate(zip(files, body["files"], strict=True)):
        file.check(folder, entry["sha256"])
        if progress is not None:
            progress((n + 1) / len(files) / 2)
    tables.rows.end_turn("a load would come between")
    with _storage(f"{folder} cannot be read", _MIXED), contextlib.ExitStack() as stack:
        ins: dict[str, BinaryIO] = {}
        for start, stop in _spans(files, tables):
            columns: dict[str, Tensor] = {}
            for file in _within(files, start, stop):
                if start == file.start:
                    ins[file.name] = stack.enter_context(file.open(folder))
                columns[file.column] = file.read(ins[file.name], stop - start)
                if stop == file.stop:
                    ins.pop(file.name).close()
            tables.fill(start, columns)
            if progress is not None:
                progress((1 + stop / tables.num_rows) / 2)
    if body["state"]:
        tables.set_extra_state(_extra(body))
    else:
        tables.rows.counts.steps = 0


# -- which rows are where


def _shards(tables: EmbeddingBags, state: bool, shard_bytes: int) -> list[Shard]:
    columns = {"weight": tables.rows.weight} | (tables.rows.state if state else {})
    return [
        shard
        for name, slab in columns.items()
        for shard in plan(tables.tables, name, slab.dtype, slab.shape[1], shard_bytes)
    ]


def _spans(files: list[Shard], tables: EmbeddingBags) -> Iterator[tuple[int, int]]:
    """Cut all rows into pieces that fit memory, and that lie in one file of each column."""
    rows = tables.rows
    row_bytes = rows.weight.element_size() * tables.dim + rows.optimizer.state_bytes(tables.dim)
    step = max(1, _CHUNK // row_bytes)
    for first, last in pairwise(sorted({0} | {file.stop for file in files})):
        for start in range(first, last, step):
            yield start, min(start + step, last)


def _within(files: list[Shard], start: int, stop: int) -> list[Shard]:
    return [file for file in files if file.start <= start and stop <= file.stop]


# -- the manifest


def _about(tables: EmbeddingBags) -> dict[str, Any]:
    rows = tables.rows
    return {
        "tables": [{"name": t.name, "num_rows": t.num_rows, "dim": t.dim} for t in tables.tables],
        "dtype": _name(rows.weight.dtype),
        "optimizer": rows.optimizer.to_dict(),
        "steps": rows.counts.steps,
        "seed": rows.seed,
        "first": getattr(tables, "_first_seed", None),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _seal(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _extra(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest as the extra state of `EmbeddingBags`."""
    tables = [[table["name"], table["num_rows"]] for table in body["tables"]]
    return {"tables": tables, **{key: body[key] for key in ("optimizer", "steps", "seed")}}


def _check_fit(folder: Path, body: Mapping[str, Any], tables: EmbeddingBags) -> None:
    """Refuse rows of other tables, another storage or another optimizer."""
    mine = _about(tables)
    if body["tables"] != mine["tables"]:
        held, asked = ([f"{t['name']}: {t['num_rows']} x {t['dim']}" for t in b["tables"]] for b in (body, mine))
        raise InputError(f"`{folder}` holds the tables {held}, not {asked}", hint="make the tables it was saved from")
    if body["dtype"] != mine["dtype"]:
        raise InputError(
            f"`{folder}` holds rows of {body['dtype']}, not {mine['dtype']}",
            hint=f"make the tables with dtype=torch.{body['dtype']}",
        )
    theirs, ours = body["optimizer"]["name"], mine["optimizer"]["name"]
    if body["state"] and theirs != ours:
        raise InputError(
            f"`{folder}` was trained by {theirs}, not {ours}", hint="use the same optimizer, or save with state=False"
        )


@contextlib.contextmanager
def _storage(failed: str, hint: str) -> Iterator[None]:
    try:
        yield
    except VitalfewError:
        raise
    except OSError as error:
        raise StorageError(f"{failed}: {error.strerror}", hint=hint) from error
