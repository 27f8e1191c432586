"""Tables of an encoder on disk: a JSON document, and the arrays of the vocabularies beside it."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vitalfew.core.errors import InputError
from vitalfew.core.files import atomic_write, read_document, write_document
from vitalfew.data._fit import Table
from vitalfew.data.vocabulary import Direct, Hashed, Vocabulary

__all__ = ["load_tables", "save_tables"]

_VERSION = 1


def save_tables(folder: Path, body: Mapping[str, Any], tables: Mapping[str, Table]) -> None:
    """Write the arrays, then the document that names their checksum."""
    arrays = {
        f"{j}_{key}": array
        for j, table in enumerate(tables.values())
        if isinstance(table, Vocabulary)
        for key, array in table.arrays().items()
    }
    with atomic_write(folder / "encoder.npz") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type, unused-ignore]
    entries = [_table_entry(name, table) for name, table in tables.items()]
    document = {**body, "tables": entries, "checksum": _checksum(arrays)}
    write_document(folder / "encoder.json", "encoder", _VERSION, document)


def load_tables(folder: Path) -> tuple[dict[str, Any], dict[str, Table]]:
    """Read the document and the tables."""
    body = read_document(folder / "encoder.json", "encoder", _VERSION)
    path = folder / "encoder.npz"
    try:
        # Opened here, since NumPy leaves a file open that turns out to be damaged.
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise InputError(f"no such file: {path}", hint="keep it beside encoder.json") from None
    except (ValueError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"`{path}` is damaged ({error})", hint="write the encoder again") from None
    if _checksum(arrays) != body["checksum"]:
        raise InputError(f"`{path}` does not belong to the encoder.json beside it", hint="write the encoder again")
    return body, {entry["name"]: _table(entry, j, arrays) for j, entry in enumerate(body["tables"])}


def _table_entry(name: str, table: Table) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "type": type(table).__name__.lower(), "num_rows": table.num_rows}
    return entry | {"seed": table.seed} if isinstance(table, Hashed) else entry


def _table(entry: Mapping[str, Any], j: int, arrays: Mapping[str, npt.NDArray[Any]]) -> Table:
    if entry["type"] == "hashed":
        return Hashed(entry["num_rows"], entry["seed"])
    if entry["type"] == "direct":
        return Direct(entry["num_rows"])
    return Vocabulary.from_arrays({key: arrays[f"{j}_{key}"] for key in ("keys", "counts")})


def _checksum(arrays: Mapping[str, npt.NDArray[Any]]) -> int:
    total = 0
    for name in sorted(arrays):
        total = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), zlib.crc32(name.encode(), total))
    return total
