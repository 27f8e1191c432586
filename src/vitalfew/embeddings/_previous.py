"""The commit before the last one, kept until all shards have theirs: a kill in between can be taken back.

A folder of rows keeps its rows in files that a commit does not change until something is written after it. So the
small files that name a commit are enough to return to it, as long as nothing has been.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

__all__ = ["go_back", "keep", "let_go"]

_KEPT, _NEW = "previous", "previous-new"
_COMMIT = "commit.json"
_NOT_KEPT = ("rows.pages", "lock")


def keep(folder: Path) -> None:
    """Keep what names the last commit, before the next one replaces it."""
    let_go(folder)
    if not (folder / _COMMIT).exists():
        return
    new = folder / _NEW
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    for path in folder.iterdir():
        if path.is_file() and path.name not in _NOT_KEPT and not path.name.startswith("."):
            _copy(path, new / path.name)
    _sync(new)
    new.rename(folder / _KEPT)
    _sync(folder)


def go_back(folder: Path) -> bool:
    """Return to the commit that was kept; False where there is none. Nobody may have the folder open."""
    kept = folder / _KEPT
    if not (kept / _COMMIT).exists():
        return False
    for path in sorted(kept.iterdir(), key=lambda path: path.name == _COMMIT):  # the document comes last
        part = folder / f".{path.name}.back.part"
        part.unlink(missing_ok=True)
        _copy(path, part)
        part.replace(folder / path.name)
    _sync(folder)
    return True


def let_go(folder: Path) -> None:
    """Forget the commit that was kept."""
    shutil.rmtree(folder / _KEPT, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)  # these files are replaced, never written to
    except OSError:
        shutil.copy2(source, target)
        _sync(target)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
