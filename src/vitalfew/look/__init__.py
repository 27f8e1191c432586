"""Point it at a log: where are the few, and what would pay."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitalfew.look.budgets import BudgetLook, MemoryLook, look_at_budgets
    from vitalfew.look.clicks import ColumnLook, Look, look_at_log

__all__ = ["BudgetLook", "ColumnLook", "Look", "MemoryLook", "look_at_budgets", "look_at_log"]

_BUDGETS = ("BudgetLook", "MemoryLook", "look_at_budgets")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"vitalfew.look.{'budgets' if name in _BUDGETS else 'clicks'}"), name)
