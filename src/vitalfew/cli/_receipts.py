"""The verbs about receipts."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated

import typer

from vitalfew.cli._flags import Output
from vitalfew.cli._output import Format, fail, print_json, print_receipt, say

__all__ = ["receipts"]

receipts = typer.Typer(no_args_is_help=True, help="Show, compare or check receipts.", rich_markup_mode=None)

_Path = Annotated[str, typer.Argument(metavar="RECEIPT", help="A receipt.json.")]


@receipts.command()
def show(
    path: _Path,
    html: Annotated[str | None, typer.Option(help="Write the report to this file instead.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    output: Output = Format.text,
) -> None:
    """Print a receipt, or write it as an HTML page."""
    from vitalfew import report
    from vitalfew.core import Receipt

    receipt = Receipt.load(path)
    if html:
        report.write_html(receipt, html)
        say(f"wrote {html}")
    elif markdown:
        sys.stdout.write(report.markdown(receipt))
    else:
        print_receipt(receipt, output)


@receipts.command()
def diff(
    before: _Path,
    after: Annotated[str, typer.Argument(metavar="OTHER", help="Another.")],
    output: Output = Format.text,
) -> None:
    """Say what changed between two receipts; exit 1 if anything did."""
    from vitalfew import report
    from vitalfew.core import Receipt

    changes = report.diff(Receipt.load(before), Receipt.load(after))
    if output is Format.json:
        print_json([dataclasses.asdict(change) for change in changes])
    else:
        sys.stdout.writelines(f"{change}\n" for change in changes)
    raise typer.Exit(1 if changes else 0)


@receipts.command()
def check(path: _Path, output: Output = Format.text) -> None:
    """Exit 0 if the receipt is as it was written, 1 if it was changed."""
    from vitalfew.core import InputError, Receipt

    receipt, changed = Receipt.load(path, verify=False), None
    try:
        Receipt.load(path)
    except InputError as error:
        changed = error
    if output is Format.json:
        print_json({"unchanged": changed is None, "verdict": receipt.verdict, "digest": receipt.digest()})
    elif changed is None:
        sys.stdout.write(f"unchanged: {receipt.verdict}, {receipt.digest()}\n")
    if changed is not None:
        fail(changed.message, changed.hint)
        raise typer.Exit(1)
