"""`look --drift`: tables, a page, JSON, models that are followed; and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from .conftest import SMALL, Cli, clicks, listing

LOOK = ("--label", "click", "--time", "ts", *SMALL[:-2])


@pytest.fixture
def drifting(tmp_path: Path) -> Path:
    """A log whose prices rise in its second half."""
    columns = clicks()
    columns["price"] = columns["price"] + 2.0 * (np.arange(1200) >= 600)
    pq.write_table(pa.table(columns), tmp_path / "drifting.parquet")
    return tmp_path / "drifting.parquet"


def test_text_and_page(cli: Cli, drifting: Path, tmp_path: Path) -> None:
    before = listing(tmp_path)
    result = cli("look", drifting, *LOOK, "--drift", "--slices", 4, "--report", "out/drift.html")
    assert result.code == 0, result.err
    assert result.err == "report: out/drift.html\n"
    assert re.search(r"slice +from +to +rows +positive +AUC", result.out)
    assert re.search(r"column +finding +PSI 2 +PSI 3 +PSI 4 +new +usual +missing +AUC", result.out)
    assert re.search(r"^price +far ", result.out, re.MULTILINE)
    assert "1 of 3 columns drifts: price (PSI" in " ".join(result.out.split())
    assert set(listing(tmp_path)) - set(before) == {"out", "out/drift.html"}
    assert "How does drifting.parquet drift?" in (tmp_path / "out" / "drift.html").read_text()


def test_json_with_models(cli: Cli, drifting: Path) -> None:
    flags = ("--slices", 3, "--reference", 0.5, "--models", "dlrm,adrec")
    result = cli("look", drifting, *LOOK, "--drift", *flags, "--format", "json")
    assert result.code == 0, result.err
    found = result.json()
    assert found["drift"]["base"]["rows"] == 600
    assert {each["name"]: each["finding"] for each in found["drift"]["columns"]} | {"price": "far"} == {
        "price": "far",
        "user": "steady",
        "item": "steady",
    }
    assert [[each["rows"] for each in found["models"][name]] for name in ("dlrm", "adrec")] == [[300, 300]] * 2
    assert "memory" not in found


def test_one_page_for_memory_and_drift(cli: Cli, log: Path, tmp_path: Path) -> None:
    flags = ("--budget", "70%", "--policies", "lookahead", "--drift", "--slices", 3, "--report", "both.html")
    result = cli("look", log, *LOOK, *flags)
    assert result.code == 0, result.err
    page = (tmp_path / "both.html").read_text()
    assert "Rows that have to be fetched" in page
    assert "How far each column is from the base" in page


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--time", "ts", "--slices", 4), "--slices says nothing without --drift"),
        (("--time", "ts", "--reference", 0.5), "--reference says nothing without --drift"),
        (("--time", "ts", "--models", "dlrm"), "--models says nothing without --drift"),
        (("--drift",), "drift is a matter of time, and no column is the time"),
        (("--time", "ts", "--drift", "--slices", 1), "a log is compared over at least 2 slices, got 1"),
        (
            ("--time", "ts", "--drift", "--reference", 2),
            "the share of the first slice must lie between 0 and 1, got 2.0",
        ),
        (("--time", "ts", "--drift", "--models", "mlp"), "there is no model 'mlp'"),
    ],
)
def test_refused(refused: Any, log: Path, flags: tuple[object, ...], message: str) -> None:
    assert refused("look", log, "--label", "click", *SMALL[:-2], *flags) == message


def test_names_are_checked_before_the_log_is_read(refused: Any) -> None:
    flags = ("--label", "click", "--time", "ts", "--drift", "--models", "dlrm,mlp")
    assert refused("look", "absent.parquet", *flags) == "there is no model 'mlp'"
