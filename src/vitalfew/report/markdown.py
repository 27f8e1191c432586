"""The receipt as Markdown, for a pull request or a README."""

from __future__ import annotations

import re

from vitalfew.core import Receipt
from vitalfew.report.figures import clean, headline
from vitalfew.report.tables import Table, tables

__all__ = ["markdown"]

_SPECIAL = re.compile(r"([\\`*_\[\]|~#$])")


def _plain(text: str) -> str:
    """Return a text that Markdown shows as it is, on one line."""
    one_line = " ".join(clean(text).split())
    safe = one_line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", safe)


def _grid(table: Table) -> str:
    head = "| " + " | ".join(table.columns) + " |"
    rule = "| " + " | ".join("--:" if name in table.numeric else "---" for name in table.columns) + " |"
    body = ["| " + " | ".join(_plain(cell.text) for cell in row) + " |" for row in table.rows]
    return "\n".join([head, rule, *body])


def _code(text: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{clean(text)}\n{fence}"


def _bullets(texts: list[str]) -> str:
    return "\n".join(f"- {_plain(text)}" for text in texts)


def markdown(receipt: Receipt) -> str:
    """Return the receipt as Markdown (the GitHub flavour, for its tables).

    Examples
    --------
    >>> print(markdown(Receipt("demo", "fused rows", (), "undecided", "one pair has no spread")).splitlines()[2])
    **UNDECIDED**: one pair has no spread
    """
    claim = headline(receipt)
    parts = [
        f"# {_plain(receipt.title)}",
        f"**{receipt.verdict.upper()}**: {_plain(claim)}",
        _plain(receipt.why) if receipt.why != claim else "",
        _plain(f"{receipt.method}. {receipt.made}") if receipt.made else _plain(receipt.method),
    ]
    for table in tables(receipt).values():
        parts += [f"## {table.title}", _grid(table), _bullets(table.notes)]
    if receipt.rule:
        parts += ["## Rule", _plain(receipt.rule)]
    if receipt.command:
        parts += ["## Command", _code(receipt.command)]
    if receipt.notes:
        parts += ["## Notes", _bullets(list(receipt.notes))]
    parts.append(f"Digest `{receipt.digest()}`")
    return "\n\n".join(part for part in parts if part) + "\n"
