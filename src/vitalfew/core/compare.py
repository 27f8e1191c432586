"""Did the few save anything, and did it cost quality? Paired runs, and a verdict by a rule fixed beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal

from vitalfew.core.errors import InputError
from vitalfew.core.intervals import Interval, mean_interval, pairs_needed
from vitalfew.core.receipt import Pair, Quality, Verdict

__all__ = ["Arm", "Comparison", "Outcome", "Rule", "compare", "judge"]

At = Literal["equal work", "equal cost", "equal quality"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run of one arm gave.

    Attributes
    ----------
    cost
        What is to be saved: seconds, bytes, joules ...; positive.
    quality
        Higher is better.
    work
        How much was done: samples, tokens ...; positive.
    """

    cost: float
    quality: float
    work: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cost) and self.cost > 0 and math.isfinite(self.work) and self.work > 0):
            raise InputError(f"cost and work must be positive, got {self.cost} and {self.work}", hint="measure them")
        if not math.isfinite(self.quality):
            raise InputError(f"quality is {self.quality}", hint="a run without a finite quality cannot be compared")


Arm = Callable[[int], "Outcome | Generator[None, None, Outcome]"]
"""A function of the seed. A generator may yield between slices of its work: the two arms then take turns."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How the verdict will be reached; fixed before the first run.

    Attributes
    ----------
    at
        What both arms hold equal: work (compare the cost), cost (compare the work done) or quality (compare the cost
        of reaching it).
    tolerance
        Quality may fall by this much at most.
    min_saving
        Least factor that counts as a saving; 1.05 asks for 5 %.
    confidence
        Of the interval on the factor. Quality is held to two one-sided tests at ``1 - confidence`` each.
    """

    at: At
    tolerance: float
    min_saving: float = 1.05
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.at not in ("equal work", "equal cost", "equal quality"):
            raise InputError(
                f"at must be 'equal work', 'equal cost' or 'equal quality', got {self.at!r}", hint="choose one"
            )
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise InputError(f"tolerance must be positive, got {self.tolerance}", hint="0.001 of AUC is usual")
        if not 1 <= self.min_saving < math.inf:
            raise InputError(
                f"min_saving must be finite and at least 1, got {self.min_saving}", hint="1.05 asks for 5 %"
            )
        if not 0.5 < self.confidence < 1:
            raise InputError(f"confidence must lie in (0.5, 1), got {self.confidence}", hint="0.95 is usual")

    def __str__(self) -> str:
        counted = "work done" if self.at == "equal cost" else "cost"
        return (
            f"At {self.at}: `saved` if the {100 * self.confidence:g}% interval of the paired {counted} ratio lies "
            f"above {self.min_saving:g}x and quality falls by less than {self.tolerance:g} (two one-sided tests, "
            f"{1 - self.confidence:.2g} each); `quality lost` if it surely falls by more; `no saving` if the ratio "
            f"surely stays below {self.min_saving:g}x; else `undecided`."
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """The pairs, the factor saved, the quality difference, and the verdict of the rule.

    Attributes
    ----------
    ratio
        Geometric mean of the paired ratios with its interval; above 1 is a saving.
    quality
        Ours minus the baseline, higher is better.
    pairs_needed
        When undecided: how many pairs would decide, if the spread stays as it is; None when no number can be named.
        Run them afresh: adding pairs to these until a verdict comes out makes a false one likelier than the rule says.
    """

    rule: Rule
    pairs: tuple[Pair, ...]
    ratio: Interval
    quality: Quality
    verdict: Verdict
    why: str
    pairs_needed: int | None


def _finding(interval: Interval, tolerance: float) -> Literal["equivalent", "better", "worse", "unclear"]:
    if interval.low > tolerance:
        return "better"
    if interval.high < -tolerance:
        return "worse"
    if interval.low > -tolerance and interval.high < tolerance:
        return "equivalent"
    return "unclear"


def _log_ratio(rule: Rule, pair: Pair) -> float:
    if rule.at == "equal cost":
        return math.log(pair.few_work / pair.base_work)
    return math.log(pair.base_cost / pair.few_cost)


def _unequal(rule: Rule, pair: Pair) -> str | None:
    """Say how a pair breaks what the rule holds equal, if it does."""
    if rule.at == "equal work" and not math.isclose(pair.base_work, pair.few_work, rel_tol=1e-9):
        return f"pair of seed {pair.seed} did unequal work, {pair.base_work:g} and {pair.few_work:g}"
    if rule.at == "equal cost" and not math.isclose(pair.base_cost, pair.few_cost, rel_tol=0.1):
        return f"pair of seed {pair.seed} cost {pair.base_cost:g} and {pair.few_cost:g}, more than 10 % apart"
    if rule.at == "equal quality" and pair.few_quality < pair.base_quality - rule.tolerance:
        return f"pair of seed {pair.seed} stopped at unequal quality, {pair.base_quality:g} and {pair.few_quality:g}"
    return None


def judge(rule: Rule, pairs: Sequence[Pair], *, metric: str = "quality") -> Comparison:
    """Apply the rule to finished pairs. Pure: the same pairs give the same verdict.

    Examples
    --------
    >>> pairs = [Pair(s, "base", 10 + s / 10, 2.0, base_quality=0.7, few_quality=0.7) for s in range(3)]
    >>> judge(Rule("equal work", tolerance=0.001), pairs).verdict
    'saved'
    >>> judge(Rule("equal work", tolerance=0.001), pairs[:1]).why
    'one pair has no spread: at least 2 are needed'
    """
    if not pairs:
        raise InputError("there are no pairs to judge", hint="run at least two")
    logs = [_log_ratio(rule, pair) for pair in pairs]
    falls = [pair.few_quality - pair.base_quality for pair in pairs]
    log = mean_interval(logs, rule.confidence)
    # An interval of confidence 1 - 2a inside the limits is the same as two one-sided tests at a each.
    two_sided = 2 * rule.confidence - 1
    fall = mean_interval(falls, two_sided)
    ratio = Interval(math.exp(log.mean), math.exp(log.low), math.exp(min(log.high, 700.0)))
    finding = _finding(fall, rule.tolerance)
    n = len(pairs)
    known = n > 1
    quality = Quality(
        metric,
        math.fsum(p.base_quality for p in pairs) / n,
        math.fsum(p.few_quality for p in pairs) / n,
        fall.mean,
        fall.low if known else None,
        fall.high if known else None,
        rule.tolerance,
        finding,
    )

    def small(value: float, sign: str = "") -> str:
        # Two digits beyond the tolerance's first say how far from it a difference lies.
        return f"{value:{sign}.{max(0, 2 - math.floor(math.log10(rule.tolerance)))}f}"

    limit = math.log(rule.min_saving)
    unequal = next((text for pair in pairs if (text := _unequal(rule, pair))), None)
    verdict: Verdict = "undecided"
    needed: int | None = None
    if unequal:
        why = f"{unequal}: not {rule.at}"
    elif not known:
        why, needed = "one pair has no spread: at least 2 are needed", 2
    elif fall.high < -rule.tolerance:
        verdict = "quality lost"
        why = (
            f"{metric} falls by {small(-fall.mean)} (at least {small(-fall.high)}), "
            f"more than the {rule.tolerance:g} allowed"
        )
    elif log.high < limit:
        verdict = "no saving"
        why = f"the ratio is {ratio.mean:.2f}x, surely below {rule.min_saving:g}x (at most {ratio.high:.2f}x)"
    elif log.low > limit and fall.low > -rule.tolerance:
        verdict = "saved"
        why = (
            f"{ratio.mean:.2f}x (at least {ratio.low:.2f}x), "
            f"{metric} {small(fall.mean, '+')} (no worse than {small(fall.low, '+')})"
        )
    else:
        doubts, wants = [], []
        if not log.low > limit:
            doubts.append(f"the ratio may be as low as {ratio.low:.2f}x")
            wants.append(pairs_needed(logs, abs(log.mean - limit), rule.confidence))
        if not fall.low > -rule.tolerance:
            doubts.append(f"{metric} may fall by {small(-fall.low)}, {rule.tolerance:g} is allowed")
            wants.append(pairs_needed(falls, abs(fall.mean + rule.tolerance), two_sided))
        numbers = [want for want in wants if want is not None]
        needed = max([*numbers, n + 1]) if len(numbers) == len(wants) else None
        more = f"{needed} pairs would do" if needed else "more pairs alone will hardly decide it"
        why = f"{' and '.join(doubts)}; {more}"
    return Comparison(rule, tuple(pairs), ratio, quality, verdict, why, needed)


def _run(arms: dict[str, Arm], order: Sequence[str], seed: int) -> dict[str, Outcome]:
    """Run both arms of a pair; generators take turns, so that a slow minute of the machine meets both."""
    outcomes: dict[str, Outcome] = {}
    running: dict[str, Generator[None, None, Outcome]] = {}
    try:
        for name in order:
            result = arms[name](seed)
            if isinstance(result, Generator):
                running[name] = result
            else:
                outcomes[name] = result
        while running:
            for name in [name for name in order if name in running]:
                try:
                    next(running[name])
                except StopIteration as stop:
                    outcomes[name] = stop.value
                    del running[name]
    finally:
        for generator in running.values():
            generator.close()
    for name, outcome in outcomes.items():
        if not isinstance(outcome, Outcome):
            raise InputError(f"the arm {name!r} gave {outcome!r}", hint="return an Outcome")
    return outcomes


def compare(
    base: Arm,
    few: Arm,
    *,
    at: At = "equal work",
    tolerance: float,
    pairs: int | Sequence[int] = 5,
    min_saving: float = 1.05,
    confidence: float = 0.95,
    metric: str = "quality",
    on_pair: Callable[[Pair], None] | None = None,
) -> Comparison:
    """Run the baseline and the few in pairs and judge by a rule fixed before the first run.

    Parameters
    ----------
    base, few
        Functions of the seed that return an `Outcome`. Both arms of a pair get the same seed and must derive the data
        order from it. A generator function may ``yield`` between slices of its work; the arms then alternate.
    at
        What the arms hold equal. They see to it themselves; a pair that does not is `undecided`, with the reason.
    tolerance
        How much quality may fall.
    pairs
        How many, or their seeds. The arm that goes first swaps from pair to pair.
    on_pair
        Called after each pair, for progress.

    Examples
    --------
    >>> slow, fast = (lambda seed: Outcome(9.0 + seed % 2, 0.8)), (lambda seed: Outcome(3.0, 0.8))
    >>> c = compare(slow, fast, tolerance=0.01, pairs=4)
    >>> c.verdict, round(c.ratio.mean, 2)
    ('saved', 3.16)
    """
    rule = Rule(at, tolerance, min_saving, confidence)
    seeds = range(pairs) if isinstance(pairs, int) else pairs
    if len(seeds) < 1:
        raise InputError(f"pairs must be at least 1, got {pairs}", hint="5 is a good start")
    done: list[Pair] = []
    for index, seed in enumerate(seeds):
        order = ("base", "few") if index % 2 == 0 else ("few", "base")
        outcome = _run({"base": base, "few": few}, order, seed)
        b, f = outcome["base"], outcome["few"]
        first: Literal["base", "few"] = "base" if index % 2 == 0 else "few"
        done.append(Pair(seed, first, b.cost, f.cost, b.quality, f.quality, b.work, f.work))
        if on_pair:
            on_pair(done[-1])
    return judge(rule, done, metric=metric)
