"""`look --budget`: a table, an answer that works for `train`, a page; and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vitalfew.core import Receipt

from .conftest import SMALL, Cli, listing

LOOK = ("--label", "click", "--time", "ts", *SMALL[:-2])


def test_text_and_page(cli: Cli, log: Path, tmp_path: Path) -> None:
    before = listing(tmp_path)
    result = cli("look", log, *LOOK, "--budget", "5%,70%,64MiB", "--report", "out/look.html", "--store", tmp_path)
    assert result.code == 0, result.err
    assert result.err == "report: out/look.html\n"
    assert re.search(r"budget +memory +rows +static +lru +lfu +lookahead +belady +step +slower", result.out)
    assert "5%: a batch needs" in result.out
    assert "modelled: the time of a step with lookahead" in result.out
    assert set(listing(tmp_path)) - set(before) == {"out", "out/look.html"}
    assert "70%" in (tmp_path / "out" / "look.html").read_text()


def test_json_is_what_train_does(cli: Cli, log: Path, tmp_path: Path) -> None:
    flags = ("--ahead", 1, "--depth", 9)
    look = cli("look", log, *LOOK, "--budget", "70%", "--policies", "lookahead", *flags, "--format", "json")
    assert look.code == 0, look.err
    memory = look.json()["memory"]
    (seen,) = memory["budgets"]
    assert memory["how"] == {"misses": "counted", "seconds": "modelled", "speed": "measured"}
    assert memory["enough"]["budget"].endswith("%")
    train = cli("train", log, *LOOK, "--pairs", 0, "--memory", "70%", *flags, "--out", "a")
    assert train.code == 0, train.err
    miss = Receipt.load(tmp_path / "a" / "receipt.json").predictions[0]
    assert miss.predicted == miss.measured == seen["misses"]["lookahead"]


def test_without_a_budget_as_before(cli: Cli, log: Path) -> None:
    result = cli("look", log, "--label", "click", "--format", "json")
    assert result.code == 0
    assert "memory" not in result.json()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--budget", "abc"), "cannot read the size 'abc'"),
        (("--budget", "5%,200%"), "a share must lie in [0, 1], got 2.0"),
        (("--budget", "0%"), "no row fits into a budget of 0%"),
        (("--budget", ","), "there is no budget to look at"),
        (("--budget", "5%", "--policies", "lru,mru"), "there is no policy 'mru'"),
        (("--budget", "5%", "--batches", 0), "at least one batch must be read, got 0"),
        (("--budget", "5%", "--ahead", -1), "ahead must not be negative, got -1"),
        (("--budget", "5%", "--depth", 0), "depth must be at least 1, got 0"),
        (("--policies", "lru"), "--policies says nothing without --budget"),
        (("--report", "a.html"), "--report says nothing without --budget"),
    ],
)
def test_refused(refused: Any, log: Path, flags: tuple[object, ...], message: str) -> None:
    assert refused("look", log, *LOOK, *flags) == message
