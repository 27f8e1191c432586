"""Tables on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from vitalfew.look import Look, MemoryLook
    from vitalfew.look.drift import DriftLook
    from vitalfew.look.drift_page import Models

__all__ = ["show_budgets", "show_doctor", "show_drift", "show_look", "show_methods"]


def _console() -> Console:
    return Console(highlight=False, soft_wrap=False)


def _table(*columns: str, right: int = 99) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index >= right else "left", overflow="fold")
    return table


def show_look(look: Look) -> None:
    """Print what was seen, busiest tables first, and what is foretold."""
    from vitalfew.meter import human

    console = _console()
    console.print(look.schema.describe(), markup=False)
    console.print()
    table = _table("feature", "values", "top 1 %", "values for 90 %", "share", "skew", "missing", right=1)
    for column in sorted(look.columns, key=lambda c: -c.num_rows):
        table.add_row(
            column.name,
            f"{column.num_rows:,}",
            f"{column.top:.0%}",
            f"{column.rows_for_90:,}",
            f"{column.rows_for_90 / column.num_rows:.0%}",
            f"{column.skew:.2f}",
            f"{column.missing:.0%}",
        )
    console.print(table)
    payoff, settings = look.payoff, look.settings
    console.print()
    console.print(f"{look.num_rows:,} rows, {look.click_rate:.1%} positive")
    console.print(
        f"{look.rows_for_90:,} of {look.table_rows:,} table rows do 90 % of the lookups; all of them with "
        f"{settings.optimizer} state take {human(look.table_bytes, 'B')}"
    )
    console.print(f"a batch of {settings.batch_size:,} looks up {payoff.lookups:,} rows, {payoff.distinct:,} different")
    console.print(
        f"foretold (modelled from a few timed steps): {payoff.ratio:.1f}x faster training with fused rows, "
        f"{human(payoff.plain, 's')} -> {human(payoff.ours, 's')} per step"
    )


def show_budgets(look: MemoryLook) -> None:
    """Print what each policy does at each budget, and how much memory is enough."""
    from vitalfew.look.page import answer, budget_table, facts

    console, seen = _console(), budget_table(look)
    table = _table(*(name.lower() for name in seen.columns), right=1)
    table.collapse_padding = True  # ten columns
    for row in seen.rows:
        table.add_row(*(escape(cell.text) for cell in row))
    console.print()
    console.print(table)
    for note in seen.notes:
        console.print(note, markup=False)
    console.print()
    for fact in facts(look):
        console.print(fact, markup=False)
    console.print(answer(look), markup=False, style="bold")


def show_drift(look: DriftLook, models: Models) -> None:
    """Print how far each column is from the base in each slice of time, and how models trained on the base do."""
    from vitalfew.look.drift_page import column_table, drift_answer, drift_facts, model_table, slice_table

    console = _console()
    for seen in (slice_table(look), column_table(look), *([model_table(models)] if models else [])):
        words = sum(name not in seen.numeric for name in seen.columns)
        table = _table(
            *(name if "PSI" in name or "AUC" in name else name.lower() for name in seen.columns), right=words
        )
        table.collapse_padding = True
        for row in seen.rows:
            table.add_row(*(escape(cell.text) for cell in row))
        console.print()
        console.print(table)
    console.print()
    for fact in drift_facts(look):
        console.print(fact, markup=False)
    console.print(drift_answer(look), markup=False, style="bold")


def show_methods(methods: list[dict[str, str]]) -> None:
    """Print the methods that are built."""
    table = _table("job", "method", "what it does", "how to use it")
    for method in methods:
        table.add_row(method["job"], method["method"], method["does"], method["use"])
    _console().print(table)


def show_doctor(found: dict[str, Any]) -> None:
    """Print what was found, advice last."""
    console = _console()
    console.print(f"vitalfew {found['vitalfew']}")
    table = _table("", "")
    for key, value in found["machine"].items():
        table.add_row(str(key), str(value))
    for extra, packages in found["extras"].items():
        table.add_row(f"[{extra}]".replace("[", r"\["), ", ".join(f"{k} {v or 'missing'}" for k, v in packages.items()))
    for source in found["energy"]:
        table.add_row(f"energy: {source['source']}", escape(" ".join(filter(None, (source["how"], source["reason"])))))
    table.add_row("model families that generate from slots", ", ".join(found["model families"]))
    console.print(table)
    for line in found["advice"] or ["nothing to mend"]:
        console.print(f"advice: {line}", markup=False)
