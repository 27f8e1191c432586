"""The terminal: verdict first, no codes where nobody asked for them."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from vitalfew.core import Receipt
from vitalfew.report import show


def test_verdict_comes_first(receipt: Receipt, capsys: pytest.CaptureFixture[str]) -> None:
    show(receipt)
    out, err = capsys.readouterr()
    assert out.startswith("SAVED  6.5x less time per epoch\n")
    assert err == ""
    for text in ("time per epoch", "look-ahead cache", "profiling pass", "45 W per busy core", "avx2, avx512f"):
        assert text in out


def test_no_codes_into_a_file(hostile: Receipt, capsys: pytest.CaptureFixture[str]) -> None:
    show(hostile)
    assert "\x1b" not in capsys.readouterr().out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_color_is_respected_on_a_terminal(receipt: Receipt, monkeypatch: pytest.MonkeyPatch, no_color: str) -> None:
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", no_color)
    show(receipt)
    assert ("\x1b" in out.getvalue()) == (not no_color)


def test_headings_are_not_broken_at_80_columns(receipt: Receipt) -> None:
    out = io.StringIO()
    show(receipt, Console(file=out, width=80))
    assert "Difference" in out.getvalue()
    assert "Tolerance" in out.getvalue()


def test_long_tables_are_cut_and_say_so(receipt: Receipt) -> None:
    out = io.StringIO()
    show(receipt, Console(file=out, width=80))
    assert "and 1 more" in out.getvalue()
