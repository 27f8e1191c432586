"""Point it at a log: where are the few, what changes over time, and what would pay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitalfew._lazy import lazily

if TYPE_CHECKING:
    from vitalfew.look.budgets import BudgetLook, MemoryLook, look_at_budgets
    from vitalfew.look.clicks import ColumnLook, Look, look_at_log
    from vitalfew.look.drift import ColumnDrift, DriftLook, SliceLook, look_at_drift
    from vitalfew.look.shift import chance_psi, domain_auc, new_id_share, psi

_HOME = {
    "BudgetLook": "budgets",
    "ColumnDrift": "drift",
    "ColumnLook": "clicks",
    "DriftLook": "drift",
    "Look": "clicks",
    "MemoryLook": "budgets",
    "SliceLook": "drift",
    "chance_psi": "shift",
    "domain_auc": "shift",
    "look_at_budgets": "budgets",
    "look_at_drift": "drift",
    "look_at_log": "clicks",
    "new_id_share": "shift",
    "psi": "shift",
}

__all__ = [
    "BudgetLook",
    "ColumnDrift",
    "ColumnLook",
    "DriftLook",
    "Look",
    "MemoryLook",
    "SliceLook",
    "chance_psi",
    "domain_auc",
    "look_at_budgets",
    "look_at_drift",
    "look_at_log",
    "new_id_share",
    "psi",
]

__getattr__ = lazily(__name__, _HOME)
