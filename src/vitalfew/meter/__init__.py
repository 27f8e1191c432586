"""Time, memory, bytes, counts, energy and carbon of a piece of work; each figure says where it came from."""

from __future__ import annotations

from vitalfew.meter.carbon import Intensity, emissions
from vitalfew.meter.figure import Figure, How, human, total
from vitalfew.meter.machine import machine
from vitalfew.meter.memory import peak_rss
from vitalfew.meter.scope import Scope, count, current, scope
from vitalfew.meter.sources import Source, sources

__all__ = [
    "Figure",
    "How",
    "Intensity",
    "Scope",
    "Source",
    "count",
    "current",
    "emissions",
    "human",
    "machine",
    "peak_rss",
    "scope",
    "sources",
    "total",
]
