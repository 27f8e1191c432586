"""Point it at a log: where are the few, and what would pay."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitalfew.look.clicks import ColumnLook, Look, look_at_log

__all__ = ["ColumnLook", "Look", "look_at_log"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("vitalfew.look.clicks"), name)
