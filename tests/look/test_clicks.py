"""Looking counts right, changes nothing, and takes every kind of log."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vitalfew.embeddings.options import LogOptions
from vitalfew.embeddings.settings import Settings
from vitalfew.look import look_at_log

SMALL = Settings(dim=4, bottom=(8,), top=(8,))


def columns(rows: int = 400) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "click": rng.integers(0, 2, rows),
        "user": rng.zipf(1.3, rows) % 90,
        "item": [f"i{i}" for i in rng.integers(0, 30, rows)],
        "tags": [[f"t{t}" for t in rng.integers(0, 9, rng.integers(0, 4))] for _ in range(rows)],
        "price": rng.normal(size=rows),
    }


@pytest.fixture
def log(tmp_path: Path) -> str:
    pq.write_table(pa.table(columns()), tmp_path / "log.parquet")
    return str(tmp_path / "log.parquet")


def listing(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_counts(log: str, tmp_path: Path) -> None:
    before = listing(tmp_path)
    look = look_at_log(log, LogOptions("click"), SMALL)
    assert listing(tmp_path) == before
    full = columns()
    assert look.num_rows == 400
    assert look.click_rate == full["click"].mean()
    by_name = {column.name: column for column in look.columns}
    assert set(by_name) == {"user", "item", "tags"}
    for name, values in (
        ("user", full["user"].tolist()),
        ("item", full["item"]),
        ("tags", [tag for tags in full["tags"] for tag in tags]),
    ):
        counts = np.array(sorted(Counter(values).values(), reverse=True))
        assert by_name[name].lookups == len(values)
        assert by_name[name].rows_for_90 == np.searchsorted(counts.cumsum(), 0.9 * len(values)) + 1
        assert by_name[name].missing == 0
    assert look.table_rows == sum(column.num_rows for column in look.columns)
    assert look.table_bytes == look.table_rows * (4 * 4 + 4 * 4)
    assert 0 < look.rows_for_90 < look.table_rows


def test_the_payoff_is_foretold_and_labelled(log: str) -> None:
    found = look_at_log(log, LogOptions("click"), SMALL).to_dict()["predicted"]
    assert found["how"] == "modelled"
    assert found["factor"] > 0
    assert found["lookups"] == 400 * 3  # the log is smaller than a batch


@pytest.mark.parametrize(
    "options",
    [
        LogOptions("click", hash_rows=50),
        LogOptions("click", direct=("user",)),
        LogOptions("click", min_count=3),
        LogOptions("click", crosses=(("user", "item"),)),
        LogOptions("click", ignore=("price", "tags")),
    ],
    ids=["hashed", "direct", "rare", "cross", "two columns"],
)
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_every_kind_of_log(log: str, options: LogOptions, optimizer: str) -> None:
    look = look_at_log(log, options, Settings(dim=4, bottom=(8,), top=(8,), optimizer=optimizer))
    assert look.payoff.ratio > 0
    assert look.table_rows > 0


def test_missing_values_share_a_row(tmp_path: Path) -> None:
    full = columns()
    full["item"] = [None if i % 4 == 0 else item for i, item in enumerate(full["item"])]
    pq.write_table(pa.table(full), tmp_path / "log.parquet")
    look = look_at_log(str(tmp_path / "log.parquet"), LogOptions("click"), SMALL)
    assert next(column.missing for column in look.columns if column.name == "item") == 0.25


def test_an_empty_list_column_is_no_hindrance(tmp_path: Path) -> None:
    full = columns()
    full["tags"] = pa.array([[]] * 400, pa.list_(pa.string()))
    pq.write_table(pa.table(full), tmp_path / "log.parquet")
    look = look_at_log(str(tmp_path / "log.parquet"), LogOptions("click", lists=("tags",)), SMALL)
    assert next(column.lookups for column in look.columns if column.name == "tags") == 0
