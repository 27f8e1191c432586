from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vitalfew.core import Budget, Selection, select

FINITE = st.floats(0, 1e100)
WHOLE = st.integers(0, 30)


@st.composite
def cases(draw, score=FINITE, least=1, most=12):
    """Scores, costs, the ids kept the last time, and a bonus."""
    scores = draw(st.lists(score, min_size=least, max_size=most))
    n = len(scores)
    costs = draw(st.lists(st.integers(1, 9), min_size=n, max_size=n))
    kept = draw(st.lists(st.integers(0, n - 1), max_size=n))
    return scores, costs, kept, draw(st.sampled_from([0.0, 1e-9, 0.1, 0.5, 3.0]))


VALUES = {
    "count": st.integers(0, 15),
    "share": st.floats(0, 1),
    "bytes": st.integers(0, 120),
    "coverage": st.floats(0, 1),
}


@st.composite
def budgets(draw, number=1):
    kind = draw(st.sampled_from(sorted(VALUES)))
    made = [Budget(kind, draw(VALUES[kind])) for _ in range(number)]
    return made if number > 1 else made[0]


@given(cases(), budgets(2))
def test_more_budget_never_covers_less(case, two):
    scores, costs, kept, bonus = case
    less, more = sorted(two, key=lambda budget: budget.value)
    small = select(scores, less, costs=costs, kept=kept, bonus=bonus)
    large = select(scores, more, costs=costs, kept=kept, bonus=bonus)
    assert small.ids.tolist() == large.ids[: len(small)].tolist()
    assert small.coverage <= large.coverage + 1e-12
    assert small.cost <= large.cost


@given(cases(), budgets())
def test_a_selection_adds_up(case, budget):
    scores, costs, kept, bonus = case
    few = select(scores, budget, costs=costs, kept=kept, bonus=bonus)
    assert isinstance(few, Selection)
    assert few.ids.dtype == np.int64
    assert len(set(few.ids.tolist())) == len(few) <= few.num_items == len(scores)
    assert few.cost == sum(costs[i] for i in few.ids)
    assert few.mask().tolist() == [i in few.ids for i in range(len(scores))]
    if sum(scores):
        assert few.coverage == pytest.approx(sum(scores[i] for i in few.ids) / sum(scores), abs=1e-12)
    assert 0 <= few.coverage <= 1


@given(cases(), st.sampled_from([Budget("share", 1.0), Budget("count", 10**30), Budget("bytes", 10**30)]))
def test_a_full_budget_takes_everything(case, budget):
    scores, costs, kept, bonus = case
    few = select(scores, budget, costs=costs, kept=kept, bonus=bonus)
    assert sorted(few.ids) == list(range(len(scores)))
    assert few.coverage == pytest.approx(1.0 if sum(scores) else 0.0)


@given(cases(), st.sampled_from(["count", "share", "bytes", "coverage"]))
def test_no_budget_takes_nothing(case, kind):
    scores, costs, kept, bonus = case
    few = select(scores, Budget(kind, 0), costs=costs, kept=kept, bonus=bonus)
    assert (len(few), few.coverage, few.cost) == (0, 0.0, 0.0)


@given(cases(score=WHOLE), budgets(), st.randoms(use_true_random=False))
def test_the_order_of_the_items_does_not_matter_up_to_ties(case, budget, random):
    scores, costs, *_ = case
    costs = [2] * len(scores) if budget.kind == "bytes" else costs
    order = list(range(len(scores)))
    random.shuffle(order)
    plain = select(scores, budget, costs=costs)
    mixed = select([scores[i] for i in order], budget, costs=[costs[i] for i in order])
    assert [scores[order[i]] for i in mixed.ids] == [scores[i] for i in plain.ids]


@given(st.permutations(range(1, 11)), budgets(), st.sampled_from([0.0, 0.21, 0.73]), st.sets(st.integers(1, 10)))
def test_the_order_of_the_items_does_not_matter_without_ties(scores, budget, bonus, kept):
    plain = select(range(1, 11), budget, costs=1, kept=[s - 1 for s in kept], bonus=bonus)
    mixed = select(scores, budget, costs=1, kept=[scores.index(s) for s in kept], bonus=bonus)
    assert [scores[i] for i in mixed.ids] == [i + 1 for i in plain.ids]


@given(cases(score=st.floats(1e-100, 1e100)), budgets(), st.integers(-60, 60))
def test_the_scale_of_the_scores_does_not_matter(case, budget, power):
    scores, costs, kept, bonus = case
    plain = select(scores, budget, costs=costs, kept=kept, bonus=bonus)
    scaled = select([s * 2.0**power for s in scores], budget, costs=costs, kept=kept, bonus=bonus)
    assert scaled.ids.tolist() == plain.ids.tolist()
    assert scaled.coverage == plain.coverage


@given(cases(score=WHOLE), budgets(), st.floats(1e-6, 1e6))
def test_nor_does_any_positive_factor(case, budget, factor):
    scores, costs, *_ = case
    costs = [2] * len(scores) if budget.kind == "bytes" else costs
    plain = select(scores, budget, costs=costs)
    scaled = select([s * factor for s in scores], budget, costs=costs)
    assert scaled.ids.tolist() == plain.ids.tolist()
    assert scaled.coverage == pytest.approx(plain.coverage, abs=1e-12)


@given(st.lists(WHOLE, min_size=1, max_size=8), st.integers(0, 100))
def test_a_coverage_is_reached_by_the_fewest(scores, percent):
    def reached(ids):
        return 100 * sum(scores[i] for i in ids) >= percent * sum(scores)

    fewest = next(k for k in range(len(scores) + 1) if any(reached(ids) for ids in combinations(range(len(scores)), k)))
    few = select(scores, Budget.cover(percent / 100))
    assert reached(few.ids)
    assert len(few) == fewest


@pytest.mark.parametrize("percent", range(101))
def test_a_coverage_that_is_a_whole_number_of_items_takes_just_that_many(percent):
    budget = Budget.cover(percent / 100)
    assert len(select(np.ones(100), budget)) == percent  # 0.07 * 100 is a little above 7
    assert len(select(np.full(100, 0.1), budget)) == percent  # and their sum a little below 10


@given(st.lists(WHOLE, min_size=1, max_size=8), st.integers(0, 9))
def test_a_count_takes_the_most_work_there_is(scores, count):
    best = max(sum(ids) for ids in combinations(scores, min(count, len(scores))))
    assert sum(scores[i] for i in select(scores, count).ids) == best


@given(cases(score=WHOLE), st.integers(0, 120))
def test_a_size_takes_by_score_per_byte_up_to_the_first_that_does_not_fit(case, size):
    scores, costs, *_ = case
    expected = []
    for i in sorted(range(len(scores)), key=lambda i: (-Fraction(scores[i], costs[i]), i)):
        if sum(costs[j] for j in [*expected, i]) > size:
            break
        expected.append(i)
    assert select(scores, f"{size} B", costs=costs).ids.tolist() == expected


@given(st.lists(WHOLE, max_size=12), budgets())
def test_ties_go_to_the_lower_id(scores, budget):
    few = select(scores, budget, costs=1)
    assert few.ids.tolist() == sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: len(few)]


@given(st.integers(1, 3000), st.data())
def test_a_share_that_is_a_whole_number_of_items_takes_just_that_many(n, data):
    k = data.draw(st.integers(0, n))
    assert len(select(np.ones(n), k / n)) == k


# Calm: the kept stay unless a newcomer is clearly better.


@given(cases(), st.integers(0, 12))
def test_a_newcomer_replaces_a_kept_item_only_when_clearly_better(case, count):
    scores, _, kept, bonus = case
    assume(bonus)
    chosen = set(select(scores, count, kept=kept, bonus=bonus).ids.tolist())
    for new in chosen - set(kept):
        for old in set(kept) - chosen:
            assert scores[new] > scores[old] * (1 + bonus)


@given(cases(score=st.floats(1e-100, 1e100)), st.integers(0, 12))
def test_a_newcomer_that_is_clearly_better_does_replace(case, count):
    scores, _, kept, bonus = case
    chosen = set(select(scores, count, kept=kept, bonus=bonus).ids.tolist())
    for new in set(range(len(scores))) - chosen - set(kept):
        for old in chosen & set(kept):
            assert scores[new] <= scores[old] * (1 + bonus) * (1 + 1e-12)


def test_a_newcomer_just_at_the_limit_does_not_replace():
    assert select([15, 10], 1, kept=[1], bonus=0.5).ids.tolist() == [1]
    assert select([15.000001, 10], 1, kept=[1], bonus=0.5).ids.tolist() == [0]
    assert select([0, 0], 1, kept=[1], bonus=0.5).ids.tolist() == [1]
    assert select([30, 40], "2 B", costs=[1, 2], kept=[1], bonus=0.5).ids.tolist() == [1]


@given(cases(), budgets())
def test_without_a_bonus_the_kept_change_nothing(case, budget):
    scores, costs, kept, _ = case
    assert (
        select(scores, budget, costs=costs, kept=kept).ids.tolist()
        == select(scores, budget, costs=costs, kept=[]).ids.tolist()
        == select(scores, budget, costs=costs).ids.tolist()
    )


@given(cases(), budgets())
def test_keeping_what_was_chosen_on_the_same_scores_changes_nothing(case, budget):
    scores, costs, _, bonus = case
    first = select(scores, budget, costs=costs)
    again = select(scores, budget, costs=costs, kept=first.ids, bonus=bonus)
    assert set(again.ids.tolist()) == set(first.ids.tolist())


def switches(walk, count, bonus):
    kept, changed = select(walk[0], count).ids, 0
    for scores in walk[1:]:
        chosen = select(scores, count, kept=kept, bonus=bonus).ids
        changed += len(np.setdiff1d(chosen, kept))
        kept = chosen
    return changed


@pytest.mark.parametrize("count", [1, 5, 15])
@pytest.mark.parametrize("seed", range(4))
def test_a_bonus_never_switches_more_often_on_a_random_walk(seed, count):
    rng = np.random.default_rng(seed)
    walk = np.exp(np.cumsum(rng.normal(0, 0.1, (150, 30)), axis=0))
    counts = [switches(walk, count, bonus) for bonus in (0.0, 0.05, 0.2, 0.8)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0]


@given(st.lists(st.permutations([1, 2, 4, 7, 9]), min_size=2, max_size=20), st.floats(0, 3))
def test_a_bonus_never_switches_the_single_best_more_often(walk, bonus):
    assert switches(walk, 1, bonus) <= switches(walk, 1, 0.0)


# What is refused.


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_scores_are_finite_and_not_negative(bad, refuses):
    with refuses(f"item 1 has {bad}"):
        select([1.0, bad, 2.0], 1)


def test_scores_have_one_dimension(refuses):
    with refuses("(2, 2)"):
        select([[1, 2], [3, 4]], 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 0.0])
def test_costs_are_finite_and_positive(bad, refuses):
    with refuses(f"item 2 has {bad}"):
        select([1, 2, 3], 1, costs=[1, 1, bad])
    with refuses(bad):
        select([1, 2, 3], 1, costs=bad)


def test_costs_are_one_or_one_per_score(refuses):
    with refuses("(2,)"):
        select([1, 2, 3], 1, costs=[1, 2])
    with refuses("(1,)"):
        select([1, 2, 3], 1, costs=[1])
    assert select([1, 2, 3], "4 B", costs=2).cost == 4


def test_a_size_needs_costs(refuses):
    with refuses("4096 bytes"):
        select([1, 2], "4 KiB")


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_a_bonus_is_finite_and_not_negative(bad, refuses):
    with refuses(bad):
        select([1, 2], 1, kept=[0], bonus=bad)


@pytest.mark.parametrize(("kept", "shown"), [([0, 3], "item 3"), ([-1, 0], "item -1"), ([5, -2], "item 5")])
def test_the_kept_are_items_of_these_scores(kept, shown, refuses):
    with refuses(shown):
        select([1, 2, 3], 1, kept=kept)


@pytest.mark.parametrize(("kept", "shown"), [([0.5], "float64"), ([True, False, True], "bool"), (["a"], "<U1")])
def test_the_kept_are_ids_and_no_flags(kept, shown, refuses):
    with refuses(shown):
        select([1, 2, 3], 1, kept=kept)


def test_the_scores_passed_in_stay_as_they_were():
    scores = np.array([3.0, 2.0, 1.0])
    select(scores, 1, kept=[2], bonus=5.0)
    assert scores.tolist() == [3.0, 2.0, 1.0]


@pytest.mark.parametrize("budget", [0, 3, 0.5, "5 B", Budget.cover(1.0)])
def test_of_nothing_nothing_is_chosen(budget):
    few = select([], budget, costs=1)
    assert (few.ids.tolist(), few.coverage, few.cost, few.num_items) == ([], 0.0, 0.0, 0)


@pytest.mark.parametrize("budget", [0.5, Budget.cover(0.9)])
def test_scores_of_zero_cover_nothing(budget):
    assert select([0, 0, 0], budget).coverage == 0.0
