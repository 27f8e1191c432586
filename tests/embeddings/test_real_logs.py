"""The real logs as click logs: what is held back is later, and nothing tells the answer; the comparison on them."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from vitalfew.embeddings.options import silent
from vitalfew.embeddings.preparing import prepare

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "embeddings"

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def logs() -> dict[str, Any]:
    found = runpy.run_path(str(BENCHMARKS / "logs.py"))
    if not found["FOLDER"].is_dir():
        pytest.skip(f"the real logs are absent: {found['FOLDER']} is no folder; set VITALFEW_DATA")
    return found


@pytest.mark.parametrize(
    ("name", "features", "positive"),
    [
        ("frappe", 10, 1 / 3),
        ("amazon-book", 2, 0.2),
        ("gowalla", 2, 0.2),
        ("video-games", 3, 0.2),
        ("retail", 2, 0.2),
        ("kosarak", 2, 0.2),
        ("flights", 24, None),
    ],
)
def test_a_log_is_ready_to_train_on(logs, tmp_path, name, features, positive):
    log = logs["LOGS"][name](tmp_path, most=10_000)
    job = prepare(str(log.path), log.options, log.settings, tmp_path / "work", silent)
    assert len(job.num_rows) == features
    assert 9_900 < len(job.train) + len(job.test) <= 10_000
    assert len(job.test) / len(job.train) == pytest.approx(0.25, abs=0.03)
    for part in (job.train, job.test):
        assert positive is None or part.label_counts[1] / len(part) == pytest.approx(positive, abs=0.05)
    if log.options.time:
        time = [part.block(0, len(part)).time for part in (job.train, job.test)]
        assert time[0].max() < time[1].min()


def test_a_history_is_of_the_same_user_and_comes_before(logs, tmp_path):
    rows = pq.read_table(logs["LOGS"]["video-games"](tmp_path, most=5_000).path).to_pylist()
    seen: dict[int, list[int]] = {}
    for at in range(0, len(rows), 5):
        positive, *others = rows[at : at + 5]
        before = seen.setdefault(positive["user"], [])
        assert all(row["history"] == before[-10:] for row in (positive, *others))
        assert [row["label"] for row in (positive, *others)] == [1, 0, 0, 0, 0]
        before.append(positive["item"])
    for row in rows:
        assert row["label"] == (row["item"] in seen[row["user"]])


@pytest.mark.parametrize("name", ["retail", "kosarak"])
def test_a_basket_does_not_hold_the_item_to_predict(logs, tmp_path, name):
    table = pq.read_table(logs["LOGS"][name](tmp_path, most=5_000).path)
    ids, offsets = logs["read_bags"](next((logs["FOLDER"] / name).iterdir()))
    bags = [bag.tolist() for bag in np.split(ids, offsets[1:-1]) if len(bag) > 1]
    for row in table.to_pylist():
        bag = bags[row["time"]]
        assert (row["item"] in bag) == row["label"]
        assert row["item"] not in row["others"]
        assert 0 < len(row["others"]) <= 50
        assert set(row["others"]) <= set(bag)
    if name == "kosarak":
        assert table["item"].to_pylist()[::5] == [bag[-1] for bag in bags[: len(table) // 5]]


@pytest.mark.slow
def test_the_comparison_goes_on_where_it_ended(logs, tmp_path):
    def run(*more: str) -> dict[str, Any]:
        command = [sys.executable, str(BENCHMARKS / "methods.py"), "--quick", "--most", "4000", "--out", str(out)]
        ways = ["--ways", "in memory,prefetch,skip rows", "--folder", str(tmp_path)]
        subprocess.run([*command, *ways, *more], check=True, capture_output=True)
        return json.loads(out.read_text())

    out = tmp_path / "methods.json"
    first = run("--logs", "frappe")["results"]
    both = run("--resume")["results"]
    assert [result["log"] for result in both] == ["frappe", "kosarak"]
    assert both[0] == first[0]
    for result in both:
        ways = result["ways"]
        assert ways["prefetch"]["AUC"] == ways["in memory"]["AUC"]  # rows over tiers learn the same bits
        assert ways["prefetch"]["AUC difference"]["median"] == 0
        assert ways["prefetch"]["device bytes per sample"]["median"] > 0
        assert ways["in memory"]["device bytes per sample"]["median"] == 0
        assert ways["prefetch"]["times prefetch"] == {"median": 1, "low": 1, "high": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["methods.json"]
