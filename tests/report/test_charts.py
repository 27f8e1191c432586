"""The charts put what they are given in the right places."""

from __future__ import annotations

import itertools
import math
from xml.etree import ElementTree as ET

import pytest

from vitalfew.core import Curve, Line, Pair, Prediction, Quality
from vitalfew.report.charts import coverage_chart, ladder_chart, pairs_chart, prediction_chart
from vitalfew.report.charts.gallery import Cell, gallery_chart
from vitalfew.report.charts.svg import Axis, spaced, text_width


def elements(svg: str, tag: str, class_: str) -> list[ET.Element]:
    root = ET.fromstring(svg)
    return [e for e in root.iter("{http://www.w3.org/2000/svg}" + tag) if class_ in e.get("class", "").split()]


def test_less_lies_left_and_more_lies_right_of_before() -> None:
    svg = ladder_chart([Line("time", "s", 10.0, 2.0, "measured"), Line("speed", "rows/s", 2.0, 10.0, "measured")])
    before = {e.get("cx") for e in elements(svg, "circle", "base")}
    assert len(before) == 1
    middle = float(before.pop() or 0)
    less, more = (float(e.get("cx", 0)) for e in elements(svg, "circle", "ours"))
    assert math.isclose(middle - less, more - middle, abs_tol=0.2)
    assert less < middle


def test_origin_has_a_shape_of_its_own() -> None:
    svg = ladder_chart([Line(how, "s", 4.0, 2.0, how) for how in ("measured", "counted", "modelled")])
    assert len(elements(svg, "rect", "ours")) == 1
    assert len(elements(svg, "circle", "hollow")) == 1
    assert len(elements(svg, "circle", "ours")) == 2


@pytest.mark.parametrize("before", [None, 0.0, -1.0])
def test_a_line_without_a_factor_is_left_to_the_table(before: float | None) -> None:
    assert ladder_chart([Line("time", "s", before, 2.0, "measured")]) == ""


def test_a_perfect_prediction_lies_on_the_centre() -> None:
    svg = prediction_chart([Prediction("time", "s", 3.0, 3.0)])
    assert elements(svg, "circle", "ours")[0].get("cx") == elements(svg, "circle", "base")[0].get("cx")


def test_band_is_the_tolerance() -> None:
    pairs = [Pair(s, "base", 10.0, 2.0, 0.7, 0.7 + d) for s, d in enumerate((-0.001, 0.001, 0.0))]
    svg = pairs_chart(pairs, Quality("AUC", 0.7, 0.7, 0.0, None, None, 0.001, "unclear"))
    band = elements(svg, "rect", "band")[0]
    left = float(band.get("x", 0))
    right = left + float(band.get("width", 0))
    places = [float(e.get("cx", 0)) for e in elements(svg, "circle", "dot")][1::2]
    assert places == pytest.approx([left, right, (left + right) / 2], abs=0.2)


def test_who_ran_first_is_seen() -> None:
    pairs = [Pair(0, "base", 10.0, 2.0, 0.7, 0.7), Pair(1, "few", 10.0, 2.0, 0.7, 0.7)]
    assert len(elements(pairs_chart(pairs), "circle", "hollow")) == 2


def zipf(name: str, n: int, slope: float) -> Curve:
    weights = [(k + 1) ** -slope for k in range(n)]
    covered = list(itertools.accumulate(weights))
    return Curve(name, tuple(((k + 1) / n, c / covered[-1]) for k, c in enumerate(covered)), n)


def test_most_skewed_curves_are_named_and_no_names_collide() -> None:
    svg = coverage_chart([zipf(f"column {i:02}", 200, i / 20) for i in range(40)])
    labels = elements(svg, "text", "label")
    assert [label.text for label in labels] == ["column 39", "column 38", "column 37", "column 36"]
    boxes = [(float(e.get("x", 0)), float(e.get("y", 0)), text_width(e.text or "", 12.0)) for e in labels]
    for (x0, y0, w0), (x1, y1, w1) in itertools.combinations(boxes, 2):
        assert x0 + w0 < x1 or x1 + w1 < x0 or abs(y0 - y1) >= 12
    assert len(elements(svg, "polyline", "other")) == 36


@pytest.mark.parametrize("points", [(), ((0.0, 0.5),)])
def test_curves_without_a_place_make_no_chart(points: tuple[tuple[float, float], ...]) -> None:
    assert coverage_chart([Curve("nothing", points, 0)]) == ""


@pytest.mark.parametrize(
    ("low", "high"), [(-1.7e308, 1.7e308), (0.0, 0.0), (0.0, 5e-324), (1e17, 1e17 + 16), (-1, 1e9)]
)
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    axis = Axis.over([low, high], 0.0, 100.0)
    ticks = axis.ticks(4)
    assert 1 <= len(ticks) <= 8
    assert all(0 <= axis.place(tick) <= 100 for tick in ticks)


def test_labels_never_touch() -> None:
    kept = spaced([(float(x), f"{x}x more") for x in range(0, 480, 7)], (0.0, 480.0))
    for (_, a, first), (_, b, second) in itertools.pairwise(sorted(kept)):
        assert b - a >= (text_width(first, 11.0) + text_width(second, 11.0)) / 2


def gallery(logs: int, methods: int) -> dict[str, dict[str, Cell]]:
    def cell(i: int, j: int) -> Cell:
        times = 2.0 ** ((i + 2 * j) % 5 - 2)
        return Cell(times, 0.9 * times, 1.2 * times, -0.004 if (i + j) % 3 == 0 else 0.0004)

    return {f"log {i}": {f"method {j}": cell(i, j) for j in range(methods)} for i in range(logs)}


def test_faster_lies_right_and_slower_left_on_one_scale() -> None:
    svg = gallery_chart({"a": {"x": Cell(2.0, 2.0, 2.0), "y": Cell(0.5, 0.5, 0.5)}}, 0.001)
    faster, slower = elements(svg, "rect", "ours")
    middle = float(elements(svg, "line", "centre")[0].get("x1", 0))
    assert float(faster.get("x", 0)) == pytest.approx(middle, abs=0.1)
    assert float(slower.get("x", 0)) + float(slower.get("width", 0)) == pytest.approx(middle, abs=0.1)
    assert faster.get("width") == slower.get("width")


def test_a_difference_is_marked_where_it_exceeds_the_tolerance() -> None:
    cells = {str(d): Cell(1.2, 1.1, 1.3, d) for d in (None, 0.0, 0.001, -0.0011, 0.002)}
    svg = gallery_chart({"log": cells}, 0.001)
    assert len(elements(svg, "rect", "ours")) == 5
    assert len(elements(svg, "rect", "hollow")) == 2
    assert [e.text for e in elements(svg, "text", "tick") if (e.text or " ")[0] in "+-"] == ["-.001", "+.002"]


@pytest.mark.parametrize("logs", [1, 4, 9])
def test_bars_stay_in_their_column(logs: int) -> None:
    svg = gallery_chart(gallery(logs, 7), 0.001)
    middles = {float(e.get("x1", 0)) for e in elements(svg, "line", "centre")}
    assert len(middles) == logs
    half = (480 - 92) / logs / 2
    for bar in elements(svg, "rect", "ours"):
        x, width = float(bar.get("x", 0)), float(bar.get("width", 0))
        assert any(middle - half <= x and x + width <= middle + half for middle in middles)


def test_a_method_that_a_log_lacks_leaves_a_gap() -> None:
    svg = gallery_chart({"a": {"x": Cell(1, 1, 1), "y": Cell(1, 1, 1)}, "b": {"y": Cell(1, 1, 1)}}, 0.001)
    assert len(elements(svg, "rect", "ours")) == 3
    assert [e.text for e in elements(svg, "text", "name")] == ["x", "y"]
