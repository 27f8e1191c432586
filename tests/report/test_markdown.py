"""Markdown: texts are shown, never obeyed."""

from __future__ import annotations

import dataclasses

from vitalfew.core import Declined, Receipt
from vitalfew.report import markdown


def test_figures_are_there(receipt: Receipt) -> None:
    text = markdown(receipt)
    assert "| time per epoch | 41.2 s | 6.3 s (6.24 to 6.37 s) | 6.5x less | measured |" in text
    assert "**SAVED**: 6.5x less time per epoch" in text
    assert receipt.digest() in text


def test_special_characters_are_escaped(receipt: Receipt) -> None:
    row = Declined("a|b", "*bold* <img> [link](x)\nsecond line")
    text = markdown(dataclasses.replace(receipt, declined=(row,)))
    assert r"| a\|b | \*bold\* &lt;img&gt; \[link\](x) second line |" in text


def test_command_stays_in_its_fence(receipt: Receipt) -> None:
    text = markdown(dataclasses.replace(receipt, command="echo ```` # x"))
    assert "\n`````\necho ```` # x\n`````\n" in text


def test_hostile_texts_make_no_markup(hostile: Receipt) -> None:
    outside = markdown(hostile).split("```")
    assert all("<script" not in part for part in (outside[0], outside[-1]))
