"""Which item goes to which place, how good that is, and how good it could be at best."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from vitalfew.core.errors import InputError

__all__ = ["Plan", "Problem"]


class Problem(Protocol):
    """What a plan is checked against; written apart from any solver."""

    def violations(self, places: Mapping[Hashable, Hashable]) -> Sequence[str]:
        """Return one sentence per broken limit, none when the places are allowed."""
        ...

    def objective(self, places: Mapping[Hashable, Hashable]) -> float:
        """Return the cost of the places; lower is better."""
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """A placement with its cost and a proof of how far it may be from the best.

    Attributes
    ----------
    places
        Item to place.
    objective
        Its cost; lower is better.
    bound
        No placement costs less than this; ``-inf`` when nothing is known.
    status
        ``"optimal"``, ``"feasible"`` or ``"infeasible"``.

    Examples
    --------
    >>> Plan({"a": 0, "b": 1}, objective=11.0, bound=10.0, status="feasible").gap
    0.1
    """

    places: Mapping[Hashable, Hashable]
    objective: float
    bound: float = -math.inf
    status: Literal["optimal", "feasible", "infeasible"] = "feasible"

    @property
    def gap(self) -> float:
        """How much cheaper the best could be, as a share of the bound; ``inf`` when nothing is known."""
        if self.objective == self.bound:
            return 0.0
        return (self.objective - self.bound) / abs(self.bound) if self.bound and math.isfinite(self.bound) else math.inf

    def check(self, problem: Problem) -> None:
        """Raise `InputError` unless the places are allowed, cost what is claimed, and respect the bound."""
        broken = [] if self.status == "infeasible" else list(problem.violations(self.places))
        if broken:
            raise InputError(f"the plan breaks {len(broken)} limits, first: {broken[0]}", hint="solve it again")
        if self.status == "infeasible":
            return
        cost = problem.objective(self.places)
        if not math.isclose(cost, self.objective, rel_tol=1e-9, abs_tol=1e-12):
            raise InputError(f"the plan claims a cost of {self.objective} but costs {cost}", hint="solve it again")
        tight = math.isclose(self.bound, self.objective, rel_tol=1e-9, abs_tol=1e-12)
        if not (self.bound <= self.objective or tight):
            raise InputError(
                f"the plan costs {self.objective}, below its bound {self.bound}", hint="the bound is wrong"
            )
        if self.status == "optimal" and not tight:
            raise InputError(
                f"the plan claims to be optimal, its bound {self.bound} is below its cost {self.objective}",
                hint="call it feasible",
            )
