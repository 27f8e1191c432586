"""The traces of the real logs have the counts of their source, and leave an optimal cache the hits known for them."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "tiers"


@pytest.fixture(scope="module")
def traces() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARKS / "traces.py"))


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "accesses", "distinct", "num_batches", "hits"),
    [
        ("amazon-book", 2 * 603_378, 135_268, 1179, (0.42, 0.54)),
        ("gowalla", 2 * 217_242, 68_404, 425, (0.40, 0.51)),
        ("video-games", 2 * 287_107, 54_728, 561, (0.43, 0.55)),
        ("retail", 908_576, 16_470, 173, (0.35, 0.59)),
        ("kosarak", 294_022, 17_034, 72, (0.42, 0.61)),
        ("frappe", 865_820, 5_328, 170, (0.31, 0.52)),
    ],
)
def test_real_logs(traces, name, accesses, distinct, num_batches, hits):
    if not traces["FOLDER"].is_dir():
        pytest.skip(f"the real logs are absent: {traces['FOLDER']} is no folder; set VITALFEW_DATA")
    trace = traces["TRACES"][name]()
    assert (len(trace.ids), trace.distinct, len(trace.batch_offsets) - 1) == (accesses, distinct, num_batches)
    assert 0 <= trace.ids.min() <= trace.ids.max() < trace.num_rows
    uses = sum(len(batch) for batch in trace.batches())
    bounds = runpy.run_path(str(BENCHMARKS / "bound.py"))["bounds"]
    capacities = [round(0.05 * distinct), round(0.1 * distinct)]
    found = [1 - reads / uses for reads in bounds(trace.ids, trace.batch_offsets, capacities)]
    assert found == pytest.approx(hits, abs=0.006)


def test_a_generated_log_fills_all_tables(traces):
    trace = traces["criteo_like"](num_batches=3, batch_size=100)
    assert np.array_equal(trace.batch_offsets, [0, 2600, 5200, 7800])
    rows = trace.ids.reshape(-1, 26)
    starts = np.concatenate([[0], np.cumsum(traces["CriteoLike"](0).cardinalities)])
    assert trace.num_rows == 33_762_577 == starts[-1]
    assert (rows >= starts[:-1]).all()
    assert (rows < starts[1:]).all()
