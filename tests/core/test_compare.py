from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from vitalfew.core import InputError, Outcome, Pair, Rule, compare, judge

RULE = Rule("equal work", tolerance=0.01)
SPREAD = st.floats(-1, 1)


def make(logs, falls, *, at="equal work"):
    """Pairs with these log ratios and quality differences."""
    pairs = []
    for seed, (log, fall) in enumerate(zip(logs, falls, strict=True)):
        if at == "equal cost":
            pairs.append(Pair(seed, "base", 2.0, 2.0, 0.5, 0.5 + fall, 3.0, 3.0 * math.exp(log)))
        else:
            pairs.append(Pair(seed, "base", 2.0 * math.exp(log), 2.0, 0.5, 0.5 + fall))
    return pairs


def spread(mean, deviation, n=6):
    """n values with this mean and standard deviation."""
    values = np.linspace(-1, 1, n)
    return (mean + deviation * values / values.std(ddof=1)).tolist()


# How the pairs are run.


class Calls:
    def __init__(self):
        self.seen = []

    def arm(self, name, **outcome):
        def run(seed):
            self.seen.append((name, seed))
            return Outcome(**{"cost": 1.0 + seed % 3, "quality": 0.5} | outcome)

        return run

    def sliced(self, name, slices, after=None):
        def run(seed):
            try:
                for index in range(slices):
                    self.seen.append((name, index))
                    yield
                if after:
                    raise after
                return Outcome(1.0, 0.5)
            finally:
                self.seen.append((name, "closed"))

        return run


@pytest.mark.parametrize("seeds", [4, [11, 7, 7, 99, 0], range(3, 8), np.array([5, 6])])
def test_both_arms_of_a_pair_get_the_same_seed_and_the_first_swaps(seeds):
    calls, told = Calls(), []
    found = compare(calls.arm("base"), calls.arm("few"), tolerance=0.1, pairs=seeds, on_pair=told.append)
    expected = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    assert [pair.seed for pair in found.pairs] == expected
    assert [pair.first for pair in found.pairs] == (["base", "few"] * 3)[: len(expected)]
    assert told == list(found.pairs)
    for index, (seed, pair) in enumerate(zip(expected, found.pairs, strict=True)):
        first, second = calls.seen[2 * index : 2 * index + 2]
        assert (first, second) == ((pair.first, seed), ("few" if pair.first == "base" else "base", seed))


def test_a_pair_holds_what_the_arms_gave():
    outcome = {"base": Outcome(3.0, 0.7, 5.0), "few": Outcome(2.0, 0.6, 5.0)}
    found = compare(lambda seed: outcome["base"], lambda seed: outcome["few"], tolerance=0.2, pairs=2)
    assert found.pairs[0] == Pair(0, "base", 3.0, 2.0, 0.7, 0.6, 5.0, 5.0)
    assert found.pairs[1] == Pair(1, "few", 3.0, 2.0, 0.7, 0.6, 5.0, 5.0)
    assert (found.quality.before, found.quality.after) == pytest.approx((0.7, 0.6))


def test_generators_take_turns():
    calls = Calls()
    compare(calls.sliced("base", 2), calls.sliced("few", 3), tolerance=0.1, pairs=2)
    assert calls.seen[:7] == [
        ("base", 0),
        ("few", 0),
        ("base", 1),
        ("few", 1),
        ("base", "closed"),
        ("few", 2),
        ("few", "closed"),
    ]
    assert calls.seen[7:9] == [("few", 0), ("base", 0)]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_an_error_in_one_generator_closes_both(error):
    calls = Calls()
    with pytest.raises(type(error)):
        compare(calls.sliced("base", 5), calls.sliced("few", 1, after=error), tolerance=0.1)
    assert calls.seen == [
        ("base", 0),
        ("few", 0),
        ("base", 1),
        ("few", "closed"),
        ("base", "closed"),
    ]


def test_an_error_before_the_second_arm_starts_leaves_nothing_running():
    started = []

    def base(seed):
        started.append(seed)
        yield
        return Outcome(1.0, 0.5)

    def few(seed):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        compare(base, few, tolerance=0.1)
    assert started == []


@pytest.mark.parametrize("gave", [None, 3.5, (1.0, 0.5)])
def test_an_arm_must_give_an_outcome(gave, refuses):
    def sliced(seed):
        yield
        return gave

    for arm in (sliced, lambda seed: gave):
        with refuses(repr(gave)):
            compare(lambda seed: Outcome(1.0, 0.5), arm, tolerance=0.1)


def test_the_rule_is_checked_before_the_first_run(refuses):
    calls = Calls()
    with refuses("-1"):
        compare(calls.arm("base"), calls.arm("few"), tolerance=-1)
    with refuses("0"):
        compare(calls.arm("base"), calls.arm("few"), tolerance=0.1, pairs=0)
    with refuses("[]"):
        compare(calls.arm("base"), calls.arm("few"), tolerance=0.1, pairs=[])
    assert calls.seen == []


# The numbers, against SciPy.

DIFFERENCES = st.lists(st.tuples(SPREAD, SPREAD), min_size=2, max_size=10)
CONFIDENCES = st.sampled_from([0.8, 0.9, 0.95, 0.99])


@given(DIFFERENCES, CONFIDENCES)
def test_the_factor_is_the_geometric_mean_with_a_t_interval_on_the_logs(values, confidence):
    logs, falls = zip(*values, strict=True)
    found = judge(replace(RULE, confidence=confidence), make(logs, falls)).ratio
    error = stats.sem(logs)
    half = stats.t.ppf((1 + confidence) / 2, len(logs) - 1) * error
    assert found.mean == pytest.approx(stats.gmean(np.exp(logs)))
    assert math.log(found.low) == pytest.approx(np.mean(logs) - half, abs=1e-9, rel=1e-7)
    assert math.log(found.high) == pytest.approx(min(np.mean(logs) + half, 700), abs=1e-9, rel=1e-7)


def one_sided(values, limit, alternative):
    return stats.ttest_1samp(values, limit, alternative=alternative).pvalue


@given(DIFFERENCES, CONFIDENCES, st.floats(0.01, 2))
def test_quality_is_equivalent_when_both_one_sided_tests_say_so(values, confidence, tolerance):
    logs, falls = zip(*values, strict=True)
    assume(np.std(falls) > 1e-6)
    alpha = 1 - confidence
    below = one_sided(falls, -tolerance, "greater")  # small: surely not as low as -tolerance
    above = one_sided(falls, tolerance, "less")
    worse = one_sided(falls, -tolerance, "less")
    better = one_sided(falls, tolerance, "greater")
    assume(all(abs(p - alpha) > 1e-6 for p in (below, above, worse, better)))
    found = judge(replace(RULE, tolerance=tolerance, confidence=confidence), make(logs, falls)).quality
    assert (found.finding == "equivalent") == (max(below, above) < alpha)
    assert (found.finding == "worse") == (worse < alpha)
    assert (found.finding == "better") == (better < alpha)
    assert found.difference == pytest.approx(np.mean(falls), abs=1e-12)
    assert found.tolerance == tolerance


@given(
    st.integers(2, 8).flatmap(
        lambda n: st.tuples(
            st.lists(st.floats(-0.1, 0.3), min_size=n, max_size=n),
            st.lists(st.floats(-0.03, 0.01), min_size=n, max_size=n),
        )
    ),
    CONFIDENCES,
    st.sampled_from([1.0, 1.05, 1.2]),
    st.sampled_from(["equal work", "equal cost", "equal quality"]),
)
def test_the_verdict_is_that_of_the_rule(values, confidence, least, at):
    logs, falls = values
    assume(np.std(falls) > 1e-6)
    assume(np.std(logs) > 1e-6)
    pairs = make(logs, falls, at=at)
    limit, alpha = math.log(least), 1 - confidence
    more, less = one_sided(logs, limit, "greater"), one_sided(logs, limit, "less")
    fine, lost = one_sided(falls, -0.01, "greater"), one_sided(falls, -0.01, "less")
    assume(min(abs(more - alpha / 2), abs(less - alpha / 2), abs(fine - alpha), abs(lost - alpha)) > 1e-6)
    if at == "equal quality" and min(falls) < -0.01:
        expected = "undecided"
    elif lost < alpha:
        expected = "quality lost"
    elif less < alpha / 2:
        expected = "no saving"
    elif more < alpha / 2 and fine < alpha:
        expected = "saved"
    else:
        expected = "undecided"
    assume(min(abs(fall + 0.01) for fall in falls) > 1e-9)
    found = judge(Rule(at, 0.01, least, confidence), pairs)
    assert found.verdict == expected
    assert found.why
    assert found.pairs_needed is None or (found.verdict == "undecided" and found.pairs_needed > len(pairs))


@given(DIFFERENCES)
def test_judging_is_pure_and_blind_to_the_order_of_the_pairs(values):
    pairs = make(*zip(*values, strict=True))
    first = judge(RULE, pairs)
    assert judge(RULE, pairs) == first
    assert judge(RULE, pairs[::-1]).verdict == first.verdict


# The four verdicts, and undecided with its reasons.


@pytest.mark.parametrize("at", ["equal work", "equal cost", "equal quality"])
@pytest.mark.parametrize(
    ("logs", "falls", "verdict", "why"),
    [
        (spread(0.7, 0.05), spread(0.0, 0.002), "saved", "2.01x"),
        (spread(0.7, 0.05), spread(0.2, 0.05), "saved", "no worse than"),
        (spread(0.0, 0.01), spread(0.0, 0.002), "no saving", "surely below 1.05x"),
        (spread(-0.7, 0.05), spread(0.0, 0.002), "no saving", "0.50x"),
        (spread(0.1, 0.2), spread(0.0, 0.002), "undecided", "the ratio may be as low as"),
        (spread(0.7, 0.05, 2), [0.0, -0.008], "undecided", "AUC may fall by"),
    ],
)
def test_every_verdict_can_be_reached(at, logs, falls, verdict, why):
    found = judge(Rule(at, 0.01), make(logs, falls, at=at), metric="AUC")
    assert found.verdict == verdict
    assert why in found.why


@pytest.mark.parametrize("at", ["equal work", "equal cost"])
@pytest.mark.parametrize("log", [0.7, 0.0])
def test_lost_quality_goes_before_any_saving(at, log):
    found = judge(Rule(at, 0.01), make(spread(log, 0.01), spread(-0.05, 0.004), at=at), metric="AUC")
    assert found.verdict == "quality lost"
    assert found.why.startswith("AUC falls by 0.0500 (at least 0.0")
    assert found.quality.finding == "worse"


def test_unequal_work_is_undecided_with_the_reason():
    pairs = make(spread(0.7, 0.01), spread(0, 0.001))
    pairs[3] = replace(pairs[3], few_work=0.9)
    found = judge(RULE, pairs)
    assert (found.verdict, found.pairs_needed) == ("undecided", None)
    assert found.why == "pair of seed 3 did unequal work, 1 and 0.9: not equal work"


def test_unequal_cost_is_undecided_with_the_reason():
    pairs = make(spread(0.7, 0.01), spread(0, 0.001), at="equal cost")
    assert judge(Rule("equal cost", 0.01), pairs).verdict == "saved"
    pairs[2] = replace(pairs[2], few_cost=2.1)
    assert judge(Rule("equal cost", 0.01), pairs).verdict == "saved"
    pairs[2] = replace(pairs[2], few_cost=2.3)
    found = judge(Rule("equal cost", 0.01), pairs)
    assert found.verdict == "undecided"
    assert "pair of seed 2 cost 2 and 2.3" in found.why


def test_unequal_quality_is_undecided_with_the_reason():
    rule = Rule("equal quality", 0.01)
    pairs = make(spread(0.7, 0.01), spread(0.005, 0.001))
    assert judge(rule, pairs).verdict == "saved"
    pairs[1] = replace(pairs[1], few_quality=0.48)
    found = judge(rule, pairs)
    assert found.verdict == "undecided"
    assert "pair of seed 1 stopped at unequal quality, 0.5 and 0.48" in found.why


@pytest.mark.parametrize("at", ["equal work", "equal quality"])
def test_at_equal_cost_the_work_counts_and_else_the_cost(at):
    pairs = [Pair(s, "base", 4.0, 4.0, 0.5, 0.5, 1.0, 3.0) for s in range(3)]
    assert judge(Rule("equal cost", 0.01), pairs).ratio.mean == pytest.approx(3.0)
    pairs = [Pair(s, "base", 8.0, 4.0, 0.5, 0.5) for s in range(3)]
    assert judge(Rule(at, 0.01), pairs).ratio.mean == pytest.approx(2.0)


def test_one_pair_is_undecided_however_large_the_saving():
    found = judge(RULE, make([3.0], [0.0]))
    assert (found.verdict, found.pairs_needed) == ("undecided", 2)
    assert found.why == "one pair has no spread: at least 2 are needed"
    assert (found.quality.low, found.quality.high, found.quality.finding) == (None, None, "unclear")


@given(st.floats(0.06, 0.3), st.floats(0.05, 0.4), st.floats(-0.008, 0.0), st.floats(0.001, 0.01), st.integers(3, 6))
def test_an_undecided_comparison_tells_how_many_pairs_would_do(log, log_spread, fall, fall_spread, n):
    logs, falls = spread(log, log_spread, n), spread(fall, fall_spread, n)
    found = judge(RULE, make(logs, falls))
    assume(found.verdict == "undecided")

    def decides(m):
        half_log = stats.t.ppf(0.975, m - 1) * log_spread / math.sqrt(m)
        half_fall = stats.t.ppf(0.95, m - 1) * fall_spread / math.sqrt(m)
        return half_log <= abs(log - math.log(1.05)) and half_fall <= fall + 0.01

    if found.pairs_needed is None:
        assert not decides(1000)
        assert "hardly" in found.why
    else:
        assert decides(found.pairs_needed)
        assert not decides(found.pairs_needed - 1)
        assert f"{found.pairs_needed} pairs would do" in found.why


def test_as_many_pairs_as_told_do_decide_when_the_spread_stays():
    few = judge(RULE, make(spread(0.2, 0.2, 5), spread(0, 0.004, 5)))
    assert few.verdict == "undecided"
    n = few.pairs_needed
    assert judge(RULE, make(spread(0.2, 0.2, n), spread(0, 0.004, n))).verdict == "saved"
    assert judge(RULE, make(spread(0.2, 0.2, n - 1), spread(0, 0.004, n - 1))).verdict == "undecided"


def test_a_ratio_just_at_the_limit_names_no_number():
    found = judge(replace(RULE, min_saving=1.0), make([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]))
    assert (found.verdict, found.pairs_needed) == ("undecided", None)
    assert "hardly" in found.why


# How often the verdict is wrong.


def rate(verdict, rule, *, log=0.0, fall=0.0, runs=2500, n=5, seed=0):
    rng = np.random.default_rng(seed)
    logs = rng.normal(log, 0.1, (runs, n))
    falls = rng.normal(fall, 0.004, (runs, n))
    return np.mean([judge(rule, make(*pair)).verdict == verdict for pair in zip(logs, falls, strict=True)])


def at_most(nominal, runs=2500):
    return nominal + 3 * math.sqrt(nominal * (1 - nominal) / runs)


def test_with_a_true_ratio_of_one_saved_is_said_no_more_often_than_nominal():
    rule = Rule("equal work", tolerance=0.05, min_saving=1.0)
    assert 0.01 < rate("saved", rule) <= at_most(0.025)
    assert rate("saved", replace(rule, min_saving=1.05), runs=500) <= 0.025


def test_with_a_true_fall_at_the_tolerance_saved_and_lost_are_said_no_more_often_than_nominal():
    rule = Rule("equal work", tolerance=0.01)
    assert 0.02 < rate("saved", rule, log=1.0, fall=-0.01) <= at_most(0.05)
    assert rate("quality lost", rule, log=1.0, fall=-0.01) <= at_most(0.05)


# What is refused.


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_costs_and_works_are_positive(value, refuses):
    with refuses(value):
        Outcome(value, 0.5)
    with refuses(value):
        Outcome(1.0, 0.5, value)
    for name in ("base_cost", "few_cost", "base_work", "few_work"):
        with refuses(value):
            replace(make([0.0], [0.0])[0], **{name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_qualities_are_finite(value, refuses):
    with refuses(value):
        Outcome(1.0, value)
    for name in ("base_quality", "few_quality"):
        with refuses(value):
            replace(make([0.0], [0.0])[0], **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("at", "equal time"),
        ("tolerance", 0.0),
        ("tolerance", math.nan),
        ("tolerance", math.inf),
        ("min_saving", 0.9),
        ("min_saving", math.nan),
        ("min_saving", math.inf),
        ("confidence", 0.5),
        ("confidence", 1.0),
        ("confidence", math.nan),
    ],
)
def test_a_rule_makes_sense(name, value, refuses):
    with refuses(value):
        Rule(**{"at": "equal work", "tolerance": 0.01} | {name: value})


def test_a_rule_says_how_it_decides():
    text = str(Rule("equal cost", 0.002, 1.1, 0.995))
    for part in ("At equal cost", "99.5% interval", "work done ratio", "1.1x", "0.002", "0.005 each", "undecided"):
        assert part in text


def test_no_pairs_cannot_be_judged():
    with pytest.raises(InputError, match="no pairs"):
        judge(RULE, [])
