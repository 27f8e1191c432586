"""What every verb says, and where: data on stdout, the rest on stderr."""

from __future__ import annotations

import json
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitalfew.core import Receipt

__all__ = ["Format", "command_line", "fail", "print_json", "print_receipt", "save_report", "say"]


class Format(StrEnum):
    """How data is printed on stdout."""

    text = "text"
    json = "json"


def say(text: str) -> None:
    """Write a line to stderr."""
    sys.stderr.write(text + "\n")


def fail(message: str, hint: str | None = None) -> None:
    """Write one line that says what is wrong, and one that says what to do."""
    say(f"error: {' '.join(message.split())}")
    if hint:
        say(f"hint: {' '.join(hint.split())}")


def print_json(value: Any) -> None:
    """Write a JSON document to stdout."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def print_receipt(receipt: Receipt, output: Format) -> None:
    """Write a receipt to stdout."""
    if output is Format.json:
        print_json(receipt.to_dict())
        return
    from vitalfew.report import show

    show(receipt)


def save_report(receipt: Receipt, folder: Path, output: Format) -> None:
    """Print a receipt and write its page beside it."""
    from vitalfew.report import write_html

    write_html(receipt, folder / "report.html")
    print_receipt(receipt, output)
    say(f"receipt: {folder / 'receipt.json'}  report: {folder / 'report.html'}")


def command_line() -> str:
    """Return the command as it was typed."""
    return shlex.join(["vitalfew", *sys.argv[1:]])
