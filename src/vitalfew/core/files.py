"""Files that are whole or absent: atomic writes, and JSON documents with a schema name and version."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from vitalfew.core.errors import InputError

__all__ = ["atomic_folder", "atomic_write", "read_document", "write_document", "write_text"]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _part(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file that appears under its name only when the block ends without an error.

    The bytes go to a temporary file in the same folder, reach the disk, and then take the name in one step.
    A crash, an exception or Ctrl-C leaves the former file as it was. A link is followed, not replaced.

    Raises
    ------
    InputError
        If the path is there and is no regular file: a folder, a pipe, a device.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> with atomic_write(folder / "a.txt") as file:
    ...     _ = file.write(b"whole")
    >>> [p.name for p in folder.iterdir()]
    ['a.txt']
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        raise InputError(f"{path} is no regular file", hint="name a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _part(target)
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync(target.parent)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a folder that appears under its name, whole, only when the block ends without an error.

    Raises
    ------
    InputError
        If the folder exists already: a whole folder is never written over.
    """
    target = Path(path)
    if target.exists():
        raise InputError(f"{target} exists already", hint="choose another name or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _part(target)
    part.mkdir()
    try:
        yield part
        for item in (*part.rglob("*"), part):
            if item.is_file() or item.is_dir():
                _sync(item)
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    _sync(target.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in one step, UTF-8."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_document(path: str | os.PathLike[str], schema: str, version: int, body: Mapping[str, Any]) -> None:
    """Write a JSON document that names its schema and version.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "plan.json"
    >>> write_document(file, "plan", 1, {"gap": 0.0})
    >>> read_document(file, "plan", 1)
    {'gap': 0.0}
    """
    assert not {"schema", "version"} & body.keys(), "these two are the document's own"
    document = {"schema": f"vitalfew/{schema}", "version": version, **body}
    write_text(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds {text}")
    return number


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in items:
        if key in found:
            raise ValueError(f"it holds {key!r} twice")
        found[key] = value
    return found


def read_document(
    path: str | os.PathLike[str],
    schema: str,
    version: int,
    upgrades: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] | None = None,
    *,
    check: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Read a JSON document, bringing older versions up step by step.

    Parameters
    ----------
    path
        The file.
    schema, version
        What the caller understands.
    upgrades
        From version n to a function that makes version n + 1.
    check
        Sees the content as it was written, before any upgrade; may raise.

    Raises
    ------
    InputError
        If the file is absent, is no JSON, holds another schema, or is newer than the caller.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        document = json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
    except FileNotFoundError:
        raise InputError(f"no such file: {path}", hint="check the path") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder", hint=f"name the {schema} file inside it") from None
    except ValueError as error:
        raise InputError(f"{path} is not a JSON document ({error})", hint=f"name a {schema} file") from None
    if not isinstance(document, dict) or document.get("schema") != f"vitalfew/{schema}":
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise InputError(f"{path} holds {found!r}, not a vitalfew {schema}", hint=f"name a {schema} file")
    found_version = document.get("version")
    if type(found_version) is not int or found_version < 1:
        raise InputError(f"{path} has the version {found_version!r}", hint="expected a positive whole number")
    if found_version > version:
        raise InputError(
            f"{path} has {schema} version {found_version}, this vitalfew reads up to {version}",
            hint="upgrade vitalfew",
        )
    body = {key: value for key, value in document.items() if key not in ("schema", "version")}
    if check is not None:
        check(body)
    for step in range(found_version, version):
        upgrade = (upgrades or {}).get(step)
        if upgrade is None:
            raise InputError(f"{path}: {schema} version {step} can no longer be read", hint="write it again")
        body = upgrade(body)
    return body
