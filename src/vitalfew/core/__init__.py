"""The nouns of the house and four functions: plain values, no framework."""

from __future__ import annotations

from vitalfew.core.budget import Budget, parse_size
from vitalfew.core.compare import Arm, Comparison, Outcome, Rule, compare, judge
from vitalfew.core.errors import InputError, MissingExtra, StorageError, VitalfewError, need
from vitalfew.core.plan import Plan, Problem
from vitalfew.core.profile import Profile, profile
from vitalfew.core.receipt import Curve, Declined, How, Line, Pair, Prediction, Quality, Receipt, Verdict
from vitalfew.core.selection import Selection, select

__all__ = [
    "Arm",
    "Budget",
    "Comparison",
    "Curve",
    "Declined",
    "How",
    "InputError",
    "Line",
    "MissingExtra",
    "Outcome",
    "Pair",
    "Plan",
    "Prediction",
    "Problem",
    "Profile",
    "Quality",
    "Receipt",
    "Rule",
    "Selection",
    "StorageError",
    "Verdict",
    "VitalfewError",
    "compare",
    "judge",
    "need",
    "parse_size",
    "profile",
    "select",
]
