"""The page: nothing from outside, nothing unescaped, and the receipt's own numbers."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from vitalfew.core import InputError, Pair, Receipt
from vitalfew.report import html, write_html
from vitalfew.report.tables import work_of


def test_no_text_can_become_markup(hostile: Receipt) -> None:
    page = html(hostile)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search("[\x00-\x08\x0b-\x1f]", page)


def test_page_asks_the_network_for_nothing(receipt: Receipt) -> None:
    page = html(receipt).replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "http" not in page
    assert not re.search(r"src=|href=|url\(|@import|<link|<script|<iframe", page)


def test_numbers_are_the_receipts(receipt: Receipt) -> None:
    shown = {float(value) for value in re.findall(r'<data value="([^"]+)"', html(receipt))}
    expected: set[float | None] = set()
    for line in (*receipt.lines, *receipt.overhead):
        expected |= {line.before, line.after}
    for quality in receipt.quality:
        expected |= {quality.before, quality.after, quality.difference, quality.tolerance}
    for pair in receipt.pairs:
        expected |= {pair.base_cost, pair.few_cost, pair.base_quality, pair.few_quality}
    for prediction in receipt.predictions:
        expected |= {prediction.predicted, prediction.measured}
    for curve in receipt.curves:
        expected |= {curve.num_items, work_of(curve, 0.01), work_of(curve, 0.1)}
    assert shown == expected - {None}


def test_everything_said_is_on_the_page(receipt: Receipt) -> None:
    page = html(receipt)
    for text in ("6.5x less time per epoch", "Saved", "avx2, avx512f", "cpu.model", receipt.digest(), receipt.command):
        assert text.lower() in page.lower()
    for declined in receipt.declined:
        assert declined.reason in page
    for word in ("measured", "counted", "modelled"):
        assert f'<span class="how {word}">{word}</span>' in page


def test_pictures_speak_to_a_screen_reader(receipt: Receipt) -> None:
    page = html(receipt)
    figures = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    assert len(figures) == 4
    for figure in figures:
        assert re.search(r'role="img" aria-label="[^"]+"><title>[^<]+</title>', figure)
        assert "<figcaption>" in figure


def test_sixty_curves_and_two_hundred_pairs_stay_below_a_megabyte(receipt: Receipt) -> None:
    curves = tuple(dataclasses.replace(receipt.curves[-1], name=f"column {i}") for i in range(60))
    pairs = tuple(Pair(s, "base", 10.0 + s % 7, 2.0, 0.7, 0.7 + s / 1e6) for s in range(200))
    page = html(dataclasses.replace(receipt, curves=curves, pairs=pairs))
    assert len(page.encode()) < 1_000_000
    assert "200 rows" in page


@pytest.mark.parametrize(
    ("verdict", "ending"),
    [("saved", ""), ("no saving", "no saving"), ("quality lost", "lost"), ("undecided", "not yet proven")],
)
def test_only_a_saving_is_claimed_without_reserve(receipt: Receipt, verdict: str, ending: str) -> None:
    page = html(Receipt("t", "m", receipt.lines, verdict, "why"))  # type: ignore[arg-type]
    found = re.search(r'<p class="headline">6.5x less time per epoch(.*?)</p>', page)
    assert found
    assert found[1].endswith(ending)
    assert bool(found[1]) == bool(ending)


def test_equal_cost_is_told_as_work_done() -> None:
    pairs = tuple(Pair(s, "base", 10.0, 10.0, 0.7, 0.7, base_work=100.0, few_work=300.0 + s) for s in range(3))
    page = html(Receipt("t", "m", (), "saved", "3x", "At equal cost: ...", pairs=pairs))
    assert "work ratio, ours / baseline" in page
    assert '<td data-column="Ratio" class="number strong">3x</td>' in page


def test_an_empty_receipt_has_no_charts() -> None:
    page = html(Receipt("t", "m", (), "undecided", "no pair was run"))
    assert "<figure" not in page
    assert "<table" not in page


def test_file_is_whole_or_absent(receipt: Receipt, tmp_path: Path) -> None:
    write_html(receipt, tmp_path / "receipt.html")
    assert (tmp_path / "receipt.html").read_text() == html(receipt)
    with pytest.raises(InputError):
        write_html(receipt, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["receipt.html"]
