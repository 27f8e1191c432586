from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from vitalfew.core import Plan

SIZES = {"a": 3, "b": 5, "c": 2, "d": 4}


class Shelves:
    """Two shelves of eight; the fuller shelf is the cost."""

    def violations(self, places):
        broken = [f"{item} has no place" for item in SIZES if item not in places]
        return broken + [f"shelf {shelf} holds more than 8" for shelf in (0, 1) if self.load(places, shelf) > 8]

    def objective(self, places):
        return float(max(self.load(places, 0), self.load(places, 1)))

    def load(self, places, shelf):
        return sum(size for item, size in SIZES.items() if places.get(item) == shelf)


BEST = Plan({"a": 0, "b": 1, "c": 1, "d": 0}, objective=7.0, bound=7.0, status="optimal")


def test_the_best_plan_passes_and_is_the_best():
    BEST.check(Shelves())
    assert BEST.gap == 0
    every = (dict(zip(SIZES, shelves, strict=True)) for shelves in itertools.product((0, 1), repeat=len(SIZES)))
    assert min(Shelves().objective(places) for places in every) == BEST.objective


@pytest.mark.parametrize("bound", [7.0, 5.0, 0.0, -math.inf, 7.0 + 1e-12])
def test_a_plan_within_its_bound_passes(bound):
    replace(BEST, bound=bound, status="feasible").check(Shelves())


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"places": {"a": 0, "b": 0, "c": 0, "d": 1}}, "shelf 0 holds more than 8"),
        ({"places": {"a": 0, "b": 1, "c": 1}}, "d has no place"),
        ({"places": {}}, "4 limits"),
        ({"objective": 6.0}, "6.0 but costs 7.0"),
        ({"objective": math.nan}, "nan"),
        ({"places": {"a": 0, "b": 0, "c": 1, "d": 1}}, "7.0 but costs 8.0"),
        ({"bound": 7.5}, "7.5"),
        ({"bound": 7.5, "status": "feasible"}, "7.5"),
        ({"bound": math.nan, "status": "feasible"}, "nan"),
        ({"bound": 6.9}, "6.9"),
        ({"bound": -math.inf}, "-inf"),
    ],
)
def test_a_plan_changed_in_any_part_fails(changes, shown, refuses):
    with refuses(shown):
        replace(BEST, **changes).check(Shelves())


def test_a_plan_that_says_there_is_none_has_no_places_to_check():
    Plan({}, objective=math.inf, status="infeasible").check(Shelves())


def test_a_plan_of_no_cost_at_its_bound_passes():
    class Free:
        def violations(self, places):
            return []

        def objective(self, places):
            return 0.0

    Plan({}, objective=0.0, bound=1e-15, status="optimal").check(Free())


@pytest.mark.parametrize(
    ("objective", "bound", "gap"),
    [(11, 10, 0.1), (10, 10, 0), (0, 0, 0), (1, 0, math.inf), (1, -math.inf, math.inf), (-9, -10, 0.1)],
)
def test_the_gap_is_a_share_of_the_bound(objective, bound, gap):
    assert Plan({}, objective, bound).gap == pytest.approx(gap)
