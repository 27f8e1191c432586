"""Rows over fast and slow memory: tiers, policies that choose who stays, and their simulation.

Importing this package loads neither numba nor Ray; the first use of a name does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitalfew._lazy import lazily

if TYPE_CHECKING:
    from vitalfew.tiers._ray import Remote
    from vitalfew.tiers.curves import MissCurve, lru_curve
    from vitalfew.tiers.dram import Dram
    from vitalfew.tiers.file import File
    from vitalfew.tiers.hbm import Hbm
    from vitalfew.tiers.lower import Lower, Opened, Traffic
    from vitalfew.tiers.policies import LFU, LRU, Belady, Chaos, LookAhead, Policy, Static, policy_named
    from vitalfew.tiers.simulation import Simulated, lower_bound, simulate
    from vitalfew.tiers.store import Moves, RowStore

__all__ = [
    "LFU",
    "LRU",
    "Belady",
    "Chaos",
    "Dram",
    "File",
    "Hbm",
    "LookAhead",
    "Lower",
    "MissCurve",
    "Moves",
    "Opened",
    "Policy",
    "Remote",
    "RowStore",
    "Simulated",
    "Static",
    "Traffic",
    "lower_bound",
    "lru_curve",
    "policy_named",
    "simulate",
]

_NAMES_IN = {
    "_ray": ("Remote",),
    "curves": ("MissCurve", "lru_curve"),
    "dram": ("Dram",),
    "file": ("File",),
    "hbm": ("Hbm",),
    "lower": ("Lower", "Opened", "Traffic"),
    "policies": ("LFU", "LRU", "Belady", "Chaos", "LookAhead", "Policy", "Static", "policy_named"),
    "simulation": ("Simulated", "lower_bound", "simulate"),
    "store": ("Moves", "RowStore"),
}
_MODULE_OF = {name: module for module, names in _NAMES_IN.items() for name in names}

__getattr__ = lazily(__name__, _MODULE_OF)


def __dir__() -> list[str]:
    return sorted(__all__)
