"""What was seen of a log, of memory budgets and of drift, as one HTML page with charts."""

from __future__ import annotations

import os
from html import escape

from vitalfew.core.files import write_text
from vitalfew.look.budgets import SLOWER, BudgetLook, MemoryLook
from vitalfew.look.drift import DriftLook
from vitalfew.look.drift_page import Models, drift_parts
from vitalfew.report.charts import miss_ratio_chart
from vitalfew.report.figures import amount
from vitalfew.report.html import figure, page, section
from vitalfew.report.tables import Cell, Table

__all__ = ["answer", "budget_table", "facts", "write_page"]


def answer(look: MemoryLook) -> str:
    """Return how much memory is enough, in a sentence."""
    found = look.enough
    if look.policy is None:
        return "no policy that `train` has was asked for: nothing is said about the time"
    if found is None:
        return "no budget is enough: batches have no room beside the rows"
    if found.share >= 1:
        return "all rows have to be in memory: --memory is of no use on this disk"
    text = f"--memory {found.budget} is enough ({found.rows:,} rows at a time, {amount(found.nbytes, 'B')} in all)"
    if found.slower is not None:
        text += f": a step takes {found.slower:.2f}x what it does with everything in memory"
    return text


def facts(look: MemoryLook) -> list[str]:
    """Return what the figures rest on, a line each."""
    disk = look.speed
    return [
        f"{look.batches:,} batches need {look.uses:,} rows, {look.distinct:,} different ones; the first use of each "
        f"({look.distinct / max(look.uses, 1):.1%}) is a miss whatever the memory, but nothing has to be read for it",
        f"all {look.table_rows:,} rows of the training part with their state take {amount(look.table_bytes, 'B')}; "
        f"a batch needs up to {look.largest:,}",
        f"measured: {amount(look.compute, 's')} per step with everything in memory; a disk of "
        f"{disk.page_reads:,.0f} pages/s read and {amount(disk.write_bytes, 'B/s')} written"
        + ("" if disk.direct else ", through the page cache: a larger store will be slower"),
        f"modelled: the time of a step with {look.policy}, and that {SLOWER:g}x is enough",
    ]


def budget_table(look: MemoryLook) -> Table:
    """Return the budgets, the one that is enough last where it was not asked for."""
    asked = {each.budget for each in look.budgets}
    rows = [*look.budgets, *([look.enough] if look.enough and look.enough.budget not in asked else [])]
    policies = list(dict.fromkeys(name for each in rows for name in each.misses))
    names = ("Budget", "Memory", "Rows", *policies, "Step", "Slower")
    cells = tuple(tuple(_cells(each, policies)) for each in rows)
    return Table("budgets", "What each budget does", names, cells, frozenset(names[1:]))


def _cells(each: BudgetLook, policies: list[str]) -> list[Cell]:
    if each.problem:
        return [Cell(each.budget, note=each.problem), *(Cell("-") for _ in range(len(policies) + 4))]
    misses = [each.misses.get(name) for name in policies]
    return [
        Cell(each.budget),
        Cell(amount(each.nbytes, "B"), each.nbytes),
        Cell(f"{each.rows:,}", each.rows),
        *(Cell("-") if miss is None else Cell(f"{miss:.1%}", miss) for miss in misses),
        Cell(amount(each.seconds, "s"), each.seconds),
        Cell("-" if each.slower is None else f"{each.slower:.2f}x", each.slower),
    ]


def write_page(
    path: str | os.PathLike[str],
    title: str,
    *,
    memory: MemoryLook | None = None,
    drift: DriftLook | None = None,
    models: Models | None = None,
) -> None:
    """Write what was seen of memory, of drift, or of both, in one step: the file is whole or absent."""
    told = ["how much memory the rows need"] * (memory is not None) + ["each slice of time against the first"] * (
        drift is not None
    )
    quiet = escape(" and ".join(told).capitalize())
    parts = [
        f'<header><h1>{escape(title)}</h1><p class="quiet">{quiet}</p></header><main>',
        *([] if memory is None else _budget_parts(memory)),
        *([] if drift is None else drift_parts(drift, models)),
        "</main><footer>vitalfew look</footer>",
    ]
    write_text(path, page(title, parts))


def _budget_parts(look: MemoryLook) -> list[str]:
    shown = [*look.budgets, *([look.enough] if look.enough and look.enough not in look.budgets else [])]
    policies = list(dict.fromkeys(name for each in shown for name in each.misses))
    lines = {
        name: [(each.share, each.misses[name]) for each in shown if name in each.misses]
        for name in sorted(policies, key=lambda name: name != look.policy)
    }
    enough = None
    if look.enough is not None and look.enough.share < 1:
        enough = look.enough.share, f"{look.enough.budget} is enough"
    chart = figure(
        "Rows that have to be fetched",
        miss_ratio_chart(lines, look.lru, enough),
        "Points: the policies as training runs them, with the rows of batches in flight inside the memory. Grey: LRU "
        "at every size, exactly, those rows beside it. Dotted: Belady, which knows all batches; no policy does better. "
        "The first use of a row counts as fetched.",
    )
    notes = "".join(f"<li>{escape(text)}</li>" for text in facts(look))
    return [
        f'<section class="verdict none" aria-label="Answer"><p class="headline">{escape(_headline(look))}</p>'
        f"<p>{escape(answer(look))}</p></section>",
        f'<div class="charts">{chart}</div>',
        section(budget_table(look)),
        f"<section><h2>What the figures rest on</h2><ul>{notes}</ul></section>",
    ]


def _headline(look: MemoryLook) -> str:
    found = look.enough
    if found is None:
        return "No answer"
    return f"{amount(found.nbytes, 'B')} of memory, {100 * found.share:.3g} % of the rows"
