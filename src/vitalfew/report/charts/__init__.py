"""Charts as SVG texts: pure functions of the receipt's parts, coloured by the page they stand in."""

from __future__ import annotations

from vitalfew.report.charts.coverage import coverage_chart
from vitalfew.report.charts.frontier import frontier_chart
from vitalfew.report.charts.gallery import gallery_chart
from vitalfew.report.charts.misses import miss_ratio_chart
from vitalfew.report.charts.pairs import pairs_chart
from vitalfew.report.charts.ratios import ladder_chart, prediction_chart
from vitalfew.report.charts.slices import slices_chart

__all__ = [
    "coverage_chart",
    "frontier_chart",
    "gallery_chart",
    "ladder_chart",
    "miss_ratio_chart",
    "pairs_chart",
    "prediction_chart",
    "slices_chart",
]
