"""What this machine offers to tell joules, best first, with what is missing and why."""

from __future__ import annotations

import os

from vitalfew.meter import _nvml, _rapl
from vitalfew.meter._source import Absent, Source, SourceLost
from vitalfew.meter.machine import usable_cores
from vitalfew.meter.model import BUSY_CORE, IDLE_CORE, Power

__all__ = ["Absent", "Source", "SourceLost", "sources"]


def sources() -> list[Source]:
    """Return the sources of energy figures: counters first, then the models, with the reason why each is needed.

    A source with an empty ``reason`` can be read. One with a reason and a ``power`` gives modelled figures; one with
    a reason alone gives none.

    Examples
    --------
    >>> all(source.how == "measured" or source.reason for source in sources())
    True

    Notes
    -----
    Where a package counter can be read the models of the process are left out: the counter covers their joules.
    """
    packages = _rapl.packages(_rapl.ROOT, os.cpu_count() or 1)
    counters = [*packages, *_nvml.gpus()]
    # Best first; the order within each kind stays.
    counters.sort(key=lambda source: bool(source.reason))
    if not any(package.reason == "" for package in packages):
        counters += _models("; ".join(package.reason for package in packages))
    return counters


def _models(why: str) -> list[Source]:
    cores = usable_cores()
    busy = Power(busy=BUSY_CORE, note="per core that the process keeps busy, nominal")
    rest = Power(always=IDLE_CORE * cores, note=f"{cores:g} cores at rest, shared with other processes, nominal")
    return [Absent("process", "process model", why, busy), Absent("idle", "process model", why, rest)]
