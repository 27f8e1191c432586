"""How much memory: what each policy would fetch is what training fetches, and the answer is enough."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vitalfew.core import InputError
from vitalfew.embeddings import jobs
from vitalfew.embeddings.options import LogOptions
from vitalfew.embeddings.settings import Settings
from vitalfew.embeddings.tiering import Tiering
from vitalfew.look import budgets as module
from vitalfew.look import look_at_budgets
from vitalfew.look.budgets import MemoryLook
from vitalfew.look.page import answer, budget_table, facts, write_page
from vitalfew.report.charts import miss_ratio_chart
from vitalfew.tiers.speed import Speed

SMALL = Settings(dim=4, bottom=(8,), top=(8,), batch_size=64)
OPTIONS = LogOptions("click")
DISK = Speed(page_reads=1e4, write_bytes=1e7, rows=1e6, page_bytes=4096, records_per_page=90, direct=True)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng = np.random.default_rng(0)
    rows = 6000
    columns = {
        "click": rng.integers(0, 2, rows),
        "user": rng.zipf(1.3, rows) % 2000,
        "item": [f"i{i}" for i in rng.zipf(1.2, rows) % 1000],
        "price": rng.normal(size=rows),
    }
    path = tmp_path_factory.mktemp("log") / "log.parquet"
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.fixture(autouse=True)
def one_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are those of one slow disk, so that nothing depends on the machine."""
    monkeypatch.setattr(module, "speed_of", lambda *args: DISK)
    monkeypatch.setattr(module, "step_seconds", lambda *args: 2e-3)


@pytest.fixture(scope="module")
def look(log: str, tmp_path_factory: pytest.TempPathFactory) -> MemoryLook:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "speed_of", lambda *args: DISK)
        patch.setattr(module, "step_seconds", lambda *args: 2e-3)
        folder = tmp_path_factory.mktemp("store")
        found = look_at_budgets(log, OPTIONS, SMALL, ["5%", "10%", "20%", "50%"], store=str(folder / "deep" / "down"))
        assert not list(folder.iterdir())
        return found


def test_more_memory_never_misses_more(look: MemoryLook) -> None:
    for policy in ("lru", "static", "belady"):
        ratios = [each.misses[policy] for each in look.budgets if not each.problem]
        assert ratios == sorted(ratios, reverse=True)
    assert look.lru == tuple(sorted(look.lru, key=lambda point: (point[0], -point[1])))
    assert look.lru[-1][1] == look.distinct / look.uses  # with room for all, first uses are left


def test_belady_is_the_best(look: MemoryLook) -> None:
    for each in look.budgets:
        if not each.problem:
            assert each.misses["belady"] == min(each.misses.values())
            assert each.misses["belady"] >= look.distinct / look.uses


def test_too_small_a_budget_is_said(look: MemoryLook) -> None:
    assert look.budgets[0].problem == f"a batch needs {look.largest:,} rows at a time"
    assert not look.budgets[0].misses
    assert not look.budgets[0].is_enough


def test_the_answer_is_enough_and_less_is_not(log: str, look: MemoryLook) -> None:
    assert look.policy == "lookahead"
    assert look.enough is not None
    assert look.enough.is_enough
    share = float(look.enough.budget[:-1])
    less = look_at_budgets(log, OPTIONS, SMALL, [f"{share / 1.1:.3g}%"], ["lookahead"]).budgets[0]
    assert not less.is_enough
    same = look_at_budgets(log, OPTIONS, SMALL, [look.enough.budget], ["lookahead"]).budgets[0]
    assert same.misses == {"lookahead": look.enough.misses["lookahead"]}


@pytest.mark.parametrize(("memory", "policy"), [("20%", "lookahead"), ("10%", "lru"), ("7.5MiB", "lfu")])
def test_what_is_foretold_is_what_training_fetches(log: str, tmp_path: Path, memory: str, policy: str) -> None:
    seen = look_at_budgets(log, OPTIONS, SMALL, [memory], [policy], ahead=1, depth=20).budgets[0]
    tiers = Tiering(memory, policy=policy, ahead=1, depth=20)
    receipt = jobs.train_log(log, OPTIONS, SMALL, tmp_path / "a", pairs=0, tiers=tiers)
    assert receipt.predictions[0].measured == seen.misses[policy]
    memory_line = next(line for line in receipt.lines if line.what == "memory")
    assert memory_line.after == seen.nbytes


def test_sizes_are_refined_as_sizes(log: str) -> None:
    found = look_at_budgets(log, OPTIONS, SMALL, ["6.8MiB", "64MiB"], ["lru"]).enough
    assert found is not None
    assert found.budget.endswith("iB")
    assert found.is_enough


def test_no_budget_is_enough(log: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Speed(1.0, 1.0, 1.0, 4096, 90, direct=True)
    monkeypatch.setattr(module, "speed_of", lambda *args: slow)
    found = look_at_budgets(log, OPTIONS, SMALL, ["10%"], ["lookahead"])
    assert found.enough is not None
    assert found.enough.rows < found.table_rows or found.enough.budget == "100%"
    assert "--memory" in answer(found)


def test_a_policy_that_train_does_not_have(log: str) -> None:
    found = look_at_budgets(log, OPTIONS, SMALL, ["20%"], ["static", "belady"])
    assert (found.policy, found.enough) == (None, None)
    assert found.budgets[0].seconds is None
    assert "nothing is said about the time" in answer(found)


def test_some_batches_only(log: str) -> None:
    found = look_at_budgets(log, OPTIONS, SMALL, ["20%"], ["lru"], most_batches=7)
    assert found.batches == 7


@pytest.mark.parametrize(
    ("budgets", "policies", "more", "message"),
    [
        (["abc"], ["lru"], {}, "cannot read the size 'abc'"),
        (["200%"], ["lru"], {}, "a share must lie in"),
        (["0%"], ["lru"], {}, "no row fits into a budget of 0%"),
        ([], ["lru"], {}, "there is no budget"),
        (["5%"], ["mru"], {}, "there is no policy 'mru'"),
        (["5%"], [], {}, "there is no policy to look at"),
        (["5%"], ["lru"], {"most_batches": 0}, "at least one batch"),
    ],
)
def test_refused(log: str, budgets: list[str], policies: list[str], more: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        look_at_budgets(log, OPTIONS, SMALL, budgets, policies, **more)


def test_the_page(look: MemoryLook, tmp_path: Path) -> None:
    write_page(tmp_path / "look.html", "How much <memory>?", memory=look)
    text = (tmp_path / "look.html").read_text()
    assert "How much &lt;memory&gt;?" in text
    assert "<script" not in text
    assert answer(look) in text
    assert look.enough is not None
    assert f"{look.enough.budget} is enough" in text
    assert all(fact.split(";")[0] in text for fact in facts(look))
    assert len(budget_table(look).rows) == 5
    start, stop = text.index("<svg", text.index("Rows that have")), text.index("</svg>") + 6
    labels = [e.text for e in ET.fromstring(text[start:stop]).iter() if "label" in e.get("class", "").split()]
    assert set(labels) == {"look-ahead", "LRU", "LFU", "static", "Belady"}


def test_names_never_touch_and_points_lie_right() -> None:
    lines = {name: [(0.01, 0.5), (0.1, 0.5 - 0.001 * i)] for i, name in enumerate(("lookahead", "lru", "lfu", "x"))}
    root = ET.fromstring(miss_ratio_chart(lines, [(0.02, 0.4), (1.0, 0.1)], (0.05, "5% is enough")))
    bases = sorted(float(e.get("y", 0)) for e in root.iter() if "label" in e.get("class", "").split())
    assert min(np.diff(bases)) >= 12
    dots = [(float(e.get("cx", 0)), float(e.get("cy", 0))) for e in root.iter() if "start" in e.get("class", "")]
    assert len(dots) == 8
    assert len({x for x, _ in dots}) == 2


@pytest.mark.parametrize("lines", [{}, {"lru": []}, {"lru": [(0.0, 1.0)]}])
def test_nothing_to_draw(lines: dict[str, list[tuple[float, float]]]) -> None:
    assert miss_ratio_chart(lines) == ""


@pytest.mark.parametrize("points", [[(1.0, 0.0)], [(1e-9, 1.0)], [(0.5, 0.5)]])
def test_extremes_are_drawn(points: list[tuple[float, float]]) -> None:
    ET.fromstring(miss_ratio_chart({"lru": points}, points, (points[0][0], "here")))
