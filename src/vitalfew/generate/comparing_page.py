"""What a comparison of caches found: a table, a page with charts, and a receipt for an arm."""

from __future__ import annotations

import datetime as dt
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from vitalfew.core import Comparison, Line, Pair, Prediction, Receipt, Rule, judge
from vitalfew.core.files import write_text
from vitalfew.core.intervals import Interval, mean_interval
from vitalfew.generate.comparing import Arm, Compared
from vitalfew.generate.following import Run
from vitalfew.meter import machine
from vitalfew.report.charts import frontier_chart, slices_chart
from vitalfew.report.figures import amount
from vitalfew.report.html import figure, page, section
from vitalfew.report.tables import Cell, Table

__all__ = ["ArmFound", "facts", "findings", "frontier_table", "make_receipt", "write_page"]

_METRIC = "log-likelihood per token"


@dataclass(frozen=True, slots=True)
class ArmFound:
    """An arm beside the full cache; intervals of 95 % over the texts.

    Attributes
    ----------
    nbytes, share
        Of the cache at the end: mean, and as a share of the full cache.
    kl, worse, agreement
        Divergence from the full cache and rise of the negative log-likelihood, nats per token; share of tokens with the
        same likeliest token.
    step, step_ratio, prefill, prefill_ratio
        Mean seconds, and how many times the full cache's.
    foretold
        The step's share of the full cache's time if it were all reading of weights and cache.
    comparison
        The verdict on its bytes and its likelihood.
    """

    arm: Arm
    nbytes: float
    share: float
    kl: Interval
    worse: Interval
    agreement: Interval
    step: float
    step_ratio: Interval
    prefill: float
    prefill_ratio: Interval
    foretold: float
    comparison: Comparison


def findings(compared: Compared, rule: Rule) -> list[ArmFound]:
    """Judge each arm by the rule, in their order."""
    return [_found(compared, arm, rule) for arm in compared.runs if not arm.full]


def _found(compared: Compared, arm: Arm, rule: Rule) -> ArmFound:
    full, ours = compared.full, compared.runs[arm]

    def over(figure: Callable[[Run, Run], float]) -> Interval:
        return mean_interval([figure(run, base) for run, base in zip(ours, full, strict=True)], 0.95)

    def ratio(figure: Callable[[Run], float]) -> Interval:
        log = over(lambda run, base: math.log(figure(run) / figure(base)))
        return Interval(math.exp(log.mean), math.exp(log.low), math.exp(min(log.high, 700.0)))

    pairs = [
        Pair(i, "base", base.nbytes, run.nbytes, -base.nll, -run.nll)
        for i, (base, run) in enumerate(zip(full, ours, strict=True))
    ]
    nbytes, whole = _mean(ours, "nbytes"), _mean(full, "nbytes")
    return ArmFound(
        arm,
        nbytes,
        nbytes / whole,
        over(lambda run, base: run.kl),
        over(lambda run, base: run.nll - base.nll),
        over(lambda run, base: run.agreement),
        _mean(ours, "step"),
        ratio(lambda run: run.step),
        _mean(ours, "prefill"),
        ratio(lambda run: run.prefill),
        (compared.weight_bytes + nbytes) / (compared.weight_bytes + whole),
        judge(rule, pairs, metric=_METRIC),
    )


def _mean(runs: tuple[Run, ...], name: str) -> float:
    return math.fsum(getattr(run, name) for run in runs) / len(runs)


def frontier_table(compared: Compared, found: list[ArmFound]) -> Table:
    """Return one row per arm, the full cache first."""
    names = ("Cache", "Bytes", "Share", "KL", "Worse by", "Same", "Token", "Prompt", "Verdict")
    full = compared.full
    first = (
        Cell("full"),
        Cell(amount(_mean(full, "nbytes"), "B"), _mean(full, "nbytes")),
        Cell("100 %", 1.0),
        *(Cell("-") for _ in range(3)),
        Cell(amount(_mean(full, "step"), "s"), _mean(full, "step")),
        Cell(amount(_mean(full, "prefill"), "s"), _mean(full, "prefill")),
        Cell("-"),
    )
    rows = (first, *map(_row, found))
    return Table("caches", "What each cache does", names, rows, frozenset(names[1:-1]))


def _row(each: ArmFound) -> tuple[Cell, ...]:
    return (
        Cell(each.arm.name),
        Cell(amount(each.nbytes, "B"), each.nbytes),
        Cell(amount(each.share, "share"), each.share),
        Cell(f"{each.kl.mean:.4f}", each.kl.mean, _half(each.kl)),
        Cell(f"{each.worse.mean:+.4f}", each.worse.mean, _half(each.worse)),
        Cell(f"{each.agreement.mean:.1%}", each.agreement.mean, _half(each.agreement, ".1%")),
        Cell(f"{each.step_ratio.mean:.2f}x", each.step_ratio.mean, amount(each.step, "s")),
        Cell(f"{each.prefill_ratio.mean:.2f}x", each.prefill_ratio.mean, amount(each.prefill, "s")),
        Cell(each.comparison.verdict),
    )


def _half(interval: Interval, form: str = ".4f") -> str:
    """Return half of an interval, where there is one."""
    half = (interval.high - interval.low) / 2
    return f"\u00b1 {half:{form}}" if math.isfinite(half) else ""


def facts(compared: Compared) -> list[str]:
    """Return what the figures rest on, a line each."""
    course, texts = compared.course, len(compared.full)
    return [
        f"{texts} texts: {course.prompt:,} tokens at once, then {course.continued:,} one by one; each arm is told the "
        f"same {texts * course.continued:,} tokens, whatever it would have said itself",
        "counted: bytes of the cache at the end, with positions and scores; the full cache is the one of transformers",
        "measured: KL is the divergence from the full cache's distribution, worse by is the rise of the negative "
        "log-likelihood, both in nats per token; same is how often both hold the same token the likeliest",
        "measured: token is the median time of a step at batch 1, prompt the time of the prompt, in times of the full "
        "cache's",
        "intervals are of 95 %, over the texts",
    ]


def _charts(compared: Compared, found: list[ArmFound]) -> str:
    lines: dict[str, list[ArmFound]] = {}
    for each in found:
        lines.setdefault(each.arm.policy, []).append(each)
    full_ms = 1000 * _mean(compared.full, "step")
    below = "of the full cache's bytes"

    def ends(interval: Interval) -> tuple[float | None, float | None]:
        return (interval.low, interval.high) if math.isfinite(interval.low) else (None, None)

    divergence = {name: [(each.share, each.kl.mean, *ends(each.kl)) for each in some] for name, some in lines.items()}
    speed = {name: [(each.share, 1000 * each.step, None, None) for each in some] for name, some in lines.items()}
    return (
        '<div class="charts">'
        + figure(
            "How far from the full cache",
            frontier_chart("Divergence against bytes", divergence, what="KL, nats per token", below=below, log=True),
            "Lower is nearer. Bars: 95 % intervals over the texts. The axis is logarithmic.",
        )
        + figure(
            "Time per token",
            frontier_chart(
                "Time against bytes", speed, what="ms", below=below, mark=(full_ms, f"full cache: {full_ms:.3g} ms")
            ),
            "Batch 1. With a small model the weights are most of the bytes that a step reads, and there is little to "
            "gain.",
        )
        + _mass_chart(compared, lines)
        + "</div>"
    )


def _mass_chart(compared: Compared, lines: dict[str, list[ArmFound]]) -> str:
    """Draw what the kept tokens had of the prompt's votes, each policy at its smallest budget."""
    masses: dict[str, list[float | None]] = {}
    for some in lines.values():
        arm = min(some, key=lambda each: each.share).arm
        layers = list(zip(*(run.mass for run in compared.runs[arm]), strict=True))
        masses[arm.name] = [
            None if None in layer else math.fsum(mass for mass in layer if mass is not None) / len(layer)
            for layer in layers
        ]
    points = {
        name: [None if mass is None else (mass, None, None) for mass in layers] for name, layers in masses.items()
    }
    starts = [str(k) for k in range(max(map(len, masses.values()), default=0))]
    return figure(
        "Attention that the kept tokens had, layer by layer",
        slices_chart("Retained attention by layer", points, starts, what="share of the votes", below="layer"),
        "Of the prompt's queries that voted, each policy's own, at the smallest budget. It is no measure of quality: "
        "later tokens may want what these did not.",
    )


def write_page(path: str | os.PathLike[str], title: str, compared: Compared, found: list[ArmFound], rule: Rule) -> None:
    """Write the comparison as one HTML page, in one step: the file is whole or absent."""
    notes = "".join(f"<li>{escape(text)}</li>" for text in (*facts(compared), str(rule).replace("`", "")))
    quiet = f"{len(found)} caches beside the full one"
    parts = [
        f'<header><h1>{escape(title)}</h1><p class="quiet">{quiet}</p></header><main>',
        _charts(compared, found),
        section(frontier_table(compared, found)),
        f"<section><h2>What the figures rest on</h2><ul>{notes}</ul></section>",
        "</main><footer>vitalfew compare-cache</footer>",
    ]
    write_text(path, page(title, parts))


def make_receipt(compared: Compared, each: ArmFound, *, title: str, command: str = "") -> Receipt:
    """Return the account of one arm."""
    full, verdict = compared.full, each.comparison
    step, prefill = _mean(full, "step"), _mean(full, "prefill")
    ratio = each.step_ratio
    known = math.isfinite(ratio.low) and ratio.low > 0
    return Receipt(
        title,
        f"{each.arm.policy} with {each.arm.budget} of the prompt",
        (
            Line("KV cache", "B", _mean(full, "nbytes"), each.nbytes, "counted", note="at the end, one text"),
            Line(
                "time per token",
                "s",
                step,
                each.step,
                "measured",
                step * ratio.low if known else None,
                step * ratio.high if known else None,
                note="median of a text's steps, batch 1",
            ),
            Line("time to first token", "s", prefill, each.prefill, "measured"),
        ),
        verdict.verdict,
        verdict.why,
        rule=str(verdict.rule),
        quality=(verdict.quality,),
        pairs=verdict.pairs,
        pairs_needed=verdict.pairs_needed,
        predictions=(
            Prediction(
                "time per token", "s", step * each.foretold, each.step, "if all of it were reading weights and cache"
            ),
        ),
        notes=(
            f"divergence from the full cache: {each.kl.mean:.4f} nats per token",
            f"the same likeliest token as with the full cache: {each.agreement.mean:.1%}",
            *facts(compared),
        ),
        environment=machine(),
        command=command,
        made=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    )
