"""Laws that hold for every receipt there can be."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from vitalfew.core import Curve, Declined, Line, Pair, Prediction, Quality, Receipt
from vitalfew.report import diff, html, markdown, show

number = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([0.0, 1.0, -1.0, 5e-324, 1.7e308, -1.7e308])
)
positive = st.one_of(st.floats(5e-324, 1.7e308), st.sampled_from([1.0, 5e-324, 1.7e308]))
share = st.floats(0.0, 1.0)
word = st.text(max_size=12)
unit = st.sampled_from(["s", "B", "J", "share", "rows", "rows/s", "B/s", "", "/", "x/y/z"])
line = st.builds(
    Line,
    word,
    unit,
    st.none() | number,
    st.none() | number,
    st.sampled_from(["measured", "counted", "modelled"]),
    st.none() | number,
    st.none() | number,
    word,
)
quality = st.builds(
    Quality,
    word,
    number,
    number,
    number,
    st.none() | number,
    st.none() | number,
    st.one_of(positive, st.just(0.0)),
    st.sampled_from(["equivalent", "better", "worse", "unclear"]),
)
pair = st.builds(
    Pair,
    st.integers(0, 2**63),
    st.sampled_from(["base", "few"]),
    positive,
    positive,
    number,
    number,
    positive,
    positive,
)
curve = st.builds(Curve, word, st.lists(st.tuples(share, share), max_size=5).map(tuple), st.integers(0, 10**12))


def several(entry: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(entry, max_size=4).map(tuple)


receipts = st.builds(
    Receipt,
    word,
    word,
    several(line),
    st.sampled_from(["saved", "no saving", "quality lost", "undecided"]),
    word,
    rule=st.sampled_from(["", "At equal work: ...", "At equal cost: ..."]),
    quality=several(quality),
    pairs=several(pair) | st.lists(pair, min_size=13, max_size=20).map(tuple),
    overhead=several(line),
    declined=several(st.builds(Declined, word, word)),
    predictions=several(st.builds(Prediction, word, unit, number, number, word)),
    curves=several(curve) | st.lists(curve, min_size=6, max_size=9).map(tuple),
    notes=several(word),
    environment=st.dictionaries(word, st.none() | number | word | st.lists(word, max_size=2), max_size=3),
    command=word,
    made=word,
)
laws = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


class Balance(HTMLParser):
    """Check that every element is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@laws
@given(receipts)
def test_page_is_balanced_and_every_picture_stays_in_its_frame(receipt: Receipt) -> None:
    page = html(receipt)
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        root = ET.fromstring(svg)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for element in root.iter():
            for name, limit in {"x": width, "x1": width, "x2": width, "cx": width, "y": height, "cy": height}.items():
                assert -1 <= float(element.get(name, 0)) <= limit + 1


@laws
@given(receipts)
def test_terminal_keeps_to_its_width_and_sends_no_escape_codes(receipt: Receipt) -> None:
    out = io.StringIO()
    show(receipt, Console(file=out, width=80))
    assert "\x1b" not in out.getvalue()
    assert max(map(cell_len, out.getvalue().split("\n"))) <= 80


@laws
@given(receipts)
def test_markdown_tables_have_one_width(receipt: Receipt) -> None:
    for block in markdown(receipt).split("\n\n"):
        if block.startswith("| ") and "\n| --- |" in block:
            assert len({len(re.findall(r"(?<!\\)\|", row)) for row in block.split("\n")}) == 1


@laws
@given(receipts, receipts)
def test_diff_is_empty_exactly_where_nothing_differs(a: Receipt, b: Receipt) -> None:
    assert diff(a, a) == ()
    assert bool(diff(a, b)) == (a.to_dict() != b.to_dict())
    assert {change.where for change in diff(a, b)} == {change.where for change in diff(b, a)}
    assert all(str(change) for change in diff(a, b))


@laws
@given(receipts)
def test_a_saved_receipt_shows_the_same(receipt: Receipt) -> None:
    again = Receipt.from_dict(json.loads(json.dumps(receipt.to_dict())))
    assert html(again) == html(receipt)
