"""Facts about the machine that belong on a receipt; none of them tells who or where it is."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vitalfew.core.errors import need
from vitalfew.meter._cgroup import core_limit, memory_limit
from vitalfew.meter._nvml import gpu_names

__all__ = ["machine", "usable_cores"]

_PACKAGES = ("torch", "numba", "numpy", "pyarrow")


def usable_cores() -> float:
    """Return how many cores this process may keep busy, by its affinity and by the limits of its container.

    Examples
    --------
    >>> 0 < usable_cores() <= os.cpu_count()
    True
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(float(cores), core_limit() or float(cores))


def _cpu_model(table: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = table.read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(packages: Iterable[str] = _PACKAGES) -> dict[str, Any]:
    """Return what a receipt tells about the machine: processor, memory, system, versions, GPUs.

    Parameters
    ----------
    packages
        Their versions are looked up without importing them; those that are not installed are left out.

    Examples
    --------
    >>> facts = machine(["numpy"])
    >>> facts["logical_cores"] >= 1, list(facts["packages"])
    (True, ['numpy'])
    """
    memory = int(need("psutil").virtual_memory().total)
    return {
        "cpu": _cpu_model(),
        "logical_cores": os.cpu_count() or 1,
        "usable_cores": usable_cores(),
        "memory_bytes": min(memory, memory_limit() or memory),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name in packages if (version := _version(name))},
        "gpus": gpu_names(),
    }
