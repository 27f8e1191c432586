"""The receipt as one HTML file: no script, no network, readable on a phone and on paper."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from functools import cache
from html import escape
from importlib.resources import files

from vitalfew.core import Receipt
from vitalfew.core.files import write_text
from vitalfew.core.receipt import SCHEMA_VERSION
from vitalfew.report.charts import coverage_chart, ladder_chart, pairs_chart, prediction_chart
from vitalfew.report.figures import amount, clean, headline
from vitalfew.report.tables import Cell, Table, gini, tables, work_of

__all__ = ["figure", "html", "page", "section", "write_html"]

_HOW = (
    '<ul class="legend"><li><span class="how measured">measured</span> a clock or a counter saw it</li>'
    '<li><span class="how counted">counted</span> exact arithmetic on what was done</li>'
    '<li><span class="how modelled">modelled</span> a formula</li></ul>'
)
# Each verdict has a shape of its own beside its colour: tick, equals, cross, question mark.
_MARKS = {
    "saved": ("saved", "M4 10l4 4 8-9"),
    "no saving": ("none", "M4 7h12M4 13h12"),
    "quality lost": ("lost", "M5 5l10 10M15 5L5 15"),
    "undecided": ("undecided", "M6 7a4 4 0 1 1 6 3.4c-1.4.8-2 1.5-2 3M10 17v.1"),
}
# Longer tables wait folded, so that the page stays one page.
_MOST_OPEN = 12
_PROSE = ("Reason", "Value")
_STRONG = ("Change", "Finding", "Ratio", "Measured is")


def _text(value: object) -> str:
    return escape(clean(value))


@cache
def _style() -> str:
    return (files("vitalfew.report") / "page.css").read_text(encoding="utf-8")


def _cell(cell: Cell, column: str, numeric: bool) -> str:
    content = _text(cell.text)
    if column == "How":
        content = f'<span class="how {content}">{content}</span>'
    elif cell.value is not None:
        content = f'<data value="{cell.value!r}">{content}</data>'
    if cell.note:
        content += f'<span class="note">{_text(cell.note)}</span>'
    classes = (
        ["number"] * numeric + ["prose"] * (column in _PROSE) + ["strong"] * (column in _STRONG and cell.text != "-")
    )
    # A phone shows each row as a card, and there the cell has to name its column itself.
    return f'<td data-column="{column}" class="{" ".join(classes)}">{content}</td>'


def _grid(table: Table) -> str:
    numeric = [name in table.numeric for name in table.columns]
    head = "".join(
        f'<th scope="col"{" class=number" if right else ""}>{name}</th>'
        for name, right in zip(table.columns, numeric, strict=True)
    )
    body = []
    for row in table.rows:
        first, *rest = map(_cell, row, table.columns, numeric)
        first = first.replace("<td", '<th scope="row"', 1).removesuffix("</td>") + "</th>"
        body.append(f"<tr>{first}{''.join(rest)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def section(table: Table | None, extra: str = "") -> str:
    """Return a table with its title, folded where it is long."""
    if table is None:
        return ""
    if len(table.rows) > _MOST_OPEN:
        count = f'<span class="quiet">{len(table.rows)} rows</span>'
        return f"<details><summary><h2>{table.title}</h2> {count}</summary>{_grid(table)}{extra}</details>"
    return f"<section><h2>{table.title}</h2>{_grid(table)}{extra}</section>"


def figure(title: str, svg: str, caption: str) -> str:
    """Return a picture with its title and caption; nothing without a picture."""
    return f"<figure><h2>{title}</h2>{svg}<figcaption>{caption}</figcaption></figure>" if svg else ""


def _banner(receipt: Receipt) -> str:
    tone, mark = _MARKS[receipt.verdict]
    rule = re.sub("`([^`]+)`", r"<em>\1</em>", _text(receipt.rule))
    rule = f'<p class="rule">The rule, fixed before the first run: {rule}</p>' if rule else ""
    claim = headline(receipt)
    why = f"<p>{_text(receipt.why)}</p>" if receipt.why != claim else ""
    return (
        f'<section class="verdict {tone}" aria-label="Verdict"><p class="word">'
        f'<svg class="mark" viewBox="0 0 20 20" aria-hidden="true"><path d="{mark}"/></svg>{receipt.verdict}</p>'
        f'<p class="headline">{_text(claim)}</p>{why}{rule}</section>'
    )


def _coverage_caption(receipt: Receipt) -> str:
    caption = "Dotted: if every item did the same work."
    if not receipt.curves:
        return caption
    top = min(receipt.curves, key=lambda curve: (-gini(curve), curve.name))
    for share in (0.01, 0.1):
        work = work_of(top, share)
        if work is not None:
            few = f"{amount(share, 'share')} of the {top.num_items:,} items of {top.name}"
            return f"{_text(few)} do {amount(work, 'share')} of the work. {caption}"
    return caption


def _charts(receipt: Receipt) -> str:
    quality = receipt.quality[0] if receipt.quality else None
    figures = [
        figure(
            "How many times less or more",
            ladder_chart(receipt.lines),
            "Ring: the baseline. Disc: ours, measured; square: counted; open disc: modelled. The axis is logarithmic.",
        ),
        figure(
            "Pair by pair",
            pairs_chart(receipt.pairs, quality, receipt.rule),
            "Disc: the baseline ran first; open disc: ours did. Diamond: the mean with its 95 % interval on the left"
            + (" and the rule's on the right. Shaded: the tolerance." if quality else "."),
        ),
        figure("Where the work goes", coverage_chart(receipt.curves), _coverage_caption(receipt)),
        figure(
            "Predicted and measured",
            prediction_chart(receipt.predictions),
            "Ring: the prediction. Disc: what was measured, in times of it, on a logarithmic axis.",
        ),
    ]
    shown = "".join(figures)
    return f'<div class="charts">{shown}</div>' if shown else ""


def html(receipt: Receipt) -> str:
    """Return the receipt as one page that needs nothing else: style and charts are inside.

    Examples
    --------
    >>> page = html(Receipt("demo", "fused rows", (), "undecided", "one pair has no spread"))
    >>> page.startswith("<!doctype html>"), "<script" in page, len(page) < 20_000
    (True, False, True)
    """
    shown = tables(receipt)
    made = f" &middot; {_text(receipt.made)}" if receipt.made else ""
    notes = "".join(f"<li>{_text(note)}</li>" for note in receipt.notes)
    parts = [
        f'<header><h1>{_text(receipt.title)}</h1><p class="quiet">{_text(receipt.method)}{made}</p></header><main>',
        _banner(receipt),
        section(shown.get("figures"), _HOW),
        _charts(receipt),
        *(section(shown.get(key)) for key in ("quality", "declined", "overhead", "predictions", "coverage", "pairs")),
        f"<section><h2>Notes</h2><ul>{notes}</ul></section>" if notes else "",
        section(shown.get("environment")),
        f"<section><h2>Command</h2><pre><code>{_text(receipt.command)}</code></pre></section>"
        if receipt.command
        else "",
        f"</main><footer>vitalfew receipt, schema version {SCHEMA_VERSION}<br><code>{receipt.digest()}</code></footer>",
    ]
    return page(f"{receipt.title}: {receipt.verdict}", parts)


def page(title: str, parts: Iterable[str]) -> str:
    """Return a whole page with the style inside.

    Examples
    --------
    >>> "<title>a &lt; b</title>" in page("a < b", ["<p>text</p>"])
    True
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title>\n<style>\n{_style()}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def write_html(receipt: Receipt, path: str | os.PathLike[str]) -> None:
    """Write the page in one step: the file is whole or absent.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "receipt.html"
    >>> write_html(Receipt("demo", "fused rows", (), "undecided", "one pair has no spread"), file)
    >>> file.stat().st_size < 20_000
    True
    """
    write_text(path, html(receipt))
