"""The limits that a container puts on memory and processors, from the control-group files of Linux, v1 and v2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["core_limit", "memory_limit"]

ROOT = Path("/sys/fs/cgroup")
TABLE = Path("/proc/self/cgroup")


def _folders(controller: str, root: Path, table: Path) -> Iterator[Path]:
    """Yield the folders whose limits hold for this process: its own group and all above it."""
    try:
        lines = table.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controllers if controllers else root
        # Inside a container the group may be named as the host sees it; its folder is then absent, its root is not.
        own = base / group.lstrip("/")
        yield own
        while own != base:
            own = own.parent
            yield own


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def _numbers(words: list[str]) -> list[int]:
    return [int(word) for word in words if word.lstrip("-").isdigit()]


def memory_limit(root: Path = ROOT, table: Path = TABLE) -> int | None:
    """Return the least limit on memory in bytes, or None where there is none.

    Examples
    --------
    >>> memory_limit(table=Path("/absent")) is None
    True
    """
    limits = [
        limit
        for folder in _folders("memory", root, table)
        for name in ("memory.max", "memory.limit_in_bytes")
        for limit in _numbers(_words(folder / name))
    ]
    return min(limits, default=None)


def core_limit(root: Path = ROOT, table: Path = TABLE) -> float | None:
    """Return the least limit on processors, in cores, or None where there is none.

    Examples
    --------
    >>> core_limit(table=Path("/absent")) is None
    True
    """
    limits = []
    for folder in _folders("cpu", root, table):
        joint = _words(folder / "cpu.max")
        quota = _numbers(joint or _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us"))
        # "max" and -1 both say that there is no limit.
        if len(quota) == 2 and quota[0] > 0 and quota[1] > 0:
            limits.append(quota[0] / quota[1])
    return min(limits, default=None)
