"""The receipt on the terminal."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from vitalfew.core import Receipt
from vitalfew.report.figures import clean, headline
from vitalfew.report.tables import Table, tables

if TYPE_CHECKING:
    import rich.console
    import rich.table

__all__ = ["show"]

_STYLES = {"saved": "bold green", "no saving": "bold", "quality lost": "bold red", "undecided": "bold yellow"}
# Long tables would push the verdict off the screen.
_MOST_ROWS = {"pairs": 8, "coverage": 8}


def show(receipt: Receipt, console: rich.console.Console | None = None) -> None:
    """Print the receipt, verdict first.

    Parameters
    ----------
    receipt
        What to print.
    console
        Where to; standard output by default, without styles where it is no terminal or ``NO_COLOR`` is set.

    Examples
    --------
    >>> from rich.console import Console
    >>> show(Receipt("demo", "fused rows", (), "undecided", "one pair has no spread"), Console(width=60))
    UNDECIDED  one pair has no spread
    <BLANKLINE>
    demo
    fused rows
    """
    from rich.console import Console
    from rich.text import Text

    if console is None:
        console = Console(highlight=False, color_system=None if os.environ.get("NO_COLOR") else "auto")

    def write(text: str, style: str = "") -> None:
        # Text takes brackets as they are, and a long word is folded rather than cut.
        console.print(Text(clean(text), style, overflow="fold"), highlight=False)

    claim = headline(receipt)
    console.print(
        Text.assemble(
            (receipt.verdict.upper(), _STYLES[receipt.verdict]),
            "  ",
            (clean(claim), "bold"),
            overflow="fold",
        ),
        highlight=False,
    )
    if receipt.why != claim:
        write(receipt.why)
    write("")
    write(receipt.title, "bold")
    write(receipt.method)
    if receipt.made:
        write(receipt.made, "dim")
    for table in tables(receipt).values():
        write("")
        write(table.title, "bold")
        most = _MOST_ROWS.get(table.key, len(table.rows))
        console.print(_grid(table, most), highlight=False)
        if len(table.rows) > most:
            write(f"and {len(table.rows) - most} more", "dim")
        for note in table.notes:
            write(note, "dim")
    for title, text in (("Rule", receipt.rule), ("Command", receipt.command), ("Notes", "\n".join(receipt.notes))):
        if text:
            write("")
            write(title, "bold")
            write(text)


def _grid(table: Table, most: int) -> rich.table.Table:
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="dim")
    for name in table.columns:
        side: Literal["left", "right"] = "right" if name in table.numeric else "left"
        # No word of a heading is broken; the cells may be.
        grid.add_column(name, justify=side, overflow="fold", min_width=max(map(len, name.split())))
    for row in table.rows[:most]:
        grid.add_row(*(Text(clean(cell.text), overflow="fold") for cell in row))
    return grid
