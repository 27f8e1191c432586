"""Drift: what was planted is found, what does not drift is left alone, and odd logs say what is odd."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitalfew.core import InputError
from vitalfew.embeddings.options import LogOptions, silent
from vitalfew.embeddings.preparing import prepare
from vitalfew.embeddings.settings import Settings, build
from vitalfew.embeddings.slices import auc_by_slice, models_by_slice, quality_by_slice
from vitalfew.look.coding import Rows
from vitalfew.look.drift import ColumnDrift, DriftLook, look_at_drift
from vitalfew.look.drift_page import column_table, drift_answer, drift_facts
from vitalfew.look.page import write_page
from vitalfew.look.shift import chance_psi, domain_auc, new_id_share, psi
from vitalfew.report.charts import slices_chart

ROWS = 8000
OPTIONS = LogOptions("click", "ts", numeric=("price", "still"), lists=("tags",))
counts = st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=1, max_size=20)


@given(counts)
@settings(deadline=None, derandomize=True, database=None)
def test_index_is_a_distance(pairs: list[tuple[int, int]]) -> None:
    before, now = map(list, zip(*pairs, strict=True))
    assert psi(before, now) >= 0
    assert psi(before, now) == pytest.approx(psi(now, before))
    assert psi(before, before) == 0
    p, q = ((np.array(each) + 0.5) / (sum(each) + len(each) / 2) for each in (before, now))
    by_hand = sum((a - b) * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert psi(before, now) == pytest.approx(by_hand, abs=1e-12)


def test_index_without_drift_is_what_chance_gives() -> None:
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(80))
    found = [psi(rng.multinomial(20_000, shares), rng.multinomial(5_000, shares)) for _ in range(60)]
    assert np.mean(found) == pytest.approx(chance_psi(80, 20_000, 5_000), rel=0.15)


def test_new_share() -> None:
    assert new_id_share([3, 0, 0], [1, 2, 1]) == 0.75
    assert new_id_share([3, 1], [0, 0]) == 0


@pytest.mark.parametrize(("before", "now"), [([1, 2], [1]), ([], []), ([-1, 2], [1, 2]), ([1.0, math.nan], [1, 2])])
def test_counts_that_are_none_are_refused(before: list[float], now: list[float]) -> None:
    for measure in (psi, new_id_share):
        with pytest.raises(InputError):
            measure(before, now)


def test_classifier_knows_nothing_where_there_is_nothing() -> None:
    """The interval holds 0.5 about as often as it says, and a long tail of rare codes is not mistaken for drift."""
    inside, means = 0, []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        first, last = (np.column_stack([rng.integers(0, 9, 600), rng.integers(0, 10**6, 600)]) for _ in range(2))
        found = domain_auc(first, last, seed=seed)
        inside += found.low <= 0.5 <= found.high
        means.append(found.mean)
    assert inside >= 54
    assert abs(np.mean(means) - 0.5) < 0.01


def test_interval_of_a_classifier_stays_where_an_auc_can_be() -> None:
    rng = np.random.default_rng(0)
    found = domain_auc(rng.integers(0, 6, (60, 1)), rng.integers(5, 11, (60, 1)))
    assert 0.9 < found.mean <= found.high <= 1


def test_classifier_finds_what_only_columns_together_tell() -> None:
    rng = np.random.default_rng(0)
    weak = [domain_auc(*(rng.random((2000, 1)) < share for share in (0.5, 0.6)))]
    many = domain_auc(*(rng.random((2000, 12)) < share for share in (0.5, 0.6)))
    assert 0.52 < weak[0].mean < 0.58
    assert many.mean > 0.65
    assert many.low > 0.6


def test_classifier_agrees_with_a_peer() -> None:
    """scikit-learn 1.5+, one-hot codes, logistic regression, five folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.preprocessing import OneHotEncoder

    rng = np.random.default_rng(1)
    first = np.column_stack([rng.integers(0, 6, 3000), rng.integers(0, 4, 3000)])
    last = np.column_stack([rng.binomial(5, 0.6, 3000), rng.integers(0, 4, 3000)])
    codes, side = np.concatenate([first, last]), np.repeat([0, 1], 3000)
    hot = OneHotEncoder().fit_transform(codes)
    peer = cross_val_score(LogisticRegression(), hot, side, cv=5, scoring="roc_auc").mean()
    assert domain_auc(first, last).mean == pytest.approx(peer, abs=0.01)


@pytest.mark.parametrize(
    ("first", "last", "folds"),
    [((9, 1), (50, 1), 5), ((50, 2), (50, 1), 5), ((50, 0), (50, 0), 5), ((9, 1), (9, 1), 2)],
)
def test_classifier_refuses_what_it_cannot_compare(first: tuple[int, int], last: tuple[int, int], folds: int) -> None:
    with pytest.raises(InputError):
        domain_auc(np.zeros(first, int), np.zeros(last, int), folds=folds)


def columns(rows: int = ROWS, seed: int = 0) -> dict[str, Any]:
    """A log in which nothing drifts."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 4, rows)
    return {
        "ts": np.arange(rows),
        "click": rng.integers(0, 2, rows),
        "user": rng.integers(0, 10**6, rows),  # nearly every one is new
        "item": [f"i{i}" for i in rng.zipf(1.3, rows) % 400],
        "price": np.where(rng.random(rows) < 0.1, np.nan, rng.normal(size=rows)),
        "still": np.full(rows, 7.0),
        "tags": [[f"t{t}" for t in rng.integers(0, 9, n)] for n in lengths],
    }


Make = Callable[..., str]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a log, with some columns changed."""

    def make(rows: int = ROWS, order: Any = None, **changed: Any) -> str:
        values = columns(rows) | changed
        values["price"] = pa.array(values["price"], from_pandas=True)
        table = pa.table(values)
        pq.write_table(table if order is None else table.take(order), tmp_path / "log.parquet")
        return str(tmp_path / "log.parquet")

    return make


def by_name(look: DriftLook) -> dict[str, ColumnDrift]:
    return {column.name: column for column in look.columns}


def test_nothing_drifts_in_a_log_that_stays_as_it_is(make: Make) -> None:
    look = look_at_drift(make(), OPTIONS, 4)
    assert [each.rows for each in (look.base, *look.slices)] == [ROWS // 4] * 4
    assert [each.finding for each in look.columns] == ["steady"] * 5
    assert [each.name for each in look.columns] == ["price", "still", "user", "item", "tags"]
    assert [each.kind for each in look.columns] == ["numeric", "numeric", "categorical", "categorical", "list"]
    for each in look.slices:
        assert each.auc is not None
        assert each.auc.low < 0.5 < each.auc.high
    user = by_name(look)["user"]
    assert min(user.new) > 0.99
    assert user.usual_new > 0.99  # new, but as usual
    item = by_name(look)["item"]
    assert max(abs(new - item.usual_new) for new in item.new) < 0.02
    assert by_name(look)["still"].auc == (0.5, 0.5, 0.5)
    assert by_name(look)["price"].missing[0] == pytest.approx(0.1, abs=0.02)
    assert "none of 5 columns drifts" in drift_answer(look)


def test_chance_is_that_of_each_slice(make: Make) -> None:
    when = np.repeat([0, 1, 2], [ROWS // 2, ROWS // 2 - 20, 20])  # the last slice is small
    look = look_at_drift(make(ts=when), OPTIONS, 3)
    assert [each.rows for each in look.slices] == [ROWS // 2 - 20, 20]
    price = by_name(look)["price"]
    assert price.chance == tuple(chance_psi(price.bins, ROWS // 2, rows) for rows in (ROWS // 2 - 20, 20))
    # Drift of the large slice is not excused by what chance does to the small one.
    shifted = dataclasses.replace(price, psi=(0.3, 0.0))
    assert 2 * price.chance[1] > 0.3
    assert shifted.finding == "far"


@pytest.mark.parametrize("name", ["price", "user", "item", "tags"])
def test_what_drifts_is_found_and_nothing_else(make: Make, name: str) -> None:
    values, late = columns(), np.arange(ROWS) >= ROWS // 2
    rng = np.random.default_rng(9)
    changed: Any = {
        "price": values["price"] + late,
        "user": np.where(late, rng.integers(0, 50, ROWS), rng.integers(0, 100, ROWS)),
        "item": [f"i{i}" for i in np.where(late, rng.integers(0, 400, ROWS), rng.zipf(1.3, ROWS) % 400)],
        "tags": [[f"t{t % 3}" if at else f"t{t}" for t in range(4)] for at in late],
    }[name]
    look = look_at_drift(make(**{name: changed}), OPTIONS, 4)
    found = by_name(look)
    assert {each.name for each in look.columns if each.finding != "steady"} == {name}
    first, *later = found[name].psi
    assert first < 0.1 < min(later)
    assert found[name].auc[0] < 0.55 < min(found[name].auc[1:])
    assert look.slices[0].auc.low < 0.5
    assert look.slices[2].auc.low > 0.5
    assert found[name].name in drift_answer(look)


def test_values_that_the_base_has_not(make: Make) -> None:
    late = np.arange(ROWS) >= ROWS * 3 // 4
    item = np.where(late, "fresh", np.array(["a", "b"])[np.arange(ROWS) % 2])
    look = look_at_drift(make(item=item, price=np.where(late, 99.0, np.arange(ROWS) % 5)), OPTIONS, 4)
    for name in ("item", "price"):
        assert by_name(look)[name].new == (0, 0, 1)
        assert by_name(look)[name].usual_new == 0
        assert by_name(look)[name].finding == "far"
        assert by_name(look)[name].auc[2] == 1


def test_values_that_go_missing(make: Make) -> None:
    late = np.arange(ROWS) >= ROWS // 2
    item = pa.array([None if at else f"i{n % 7}" for n, at in enumerate(late)])
    look = look_at_drift(make(item=item, price=np.where(late, np.nan, 1.0)), OPTIONS, 4)
    for name in ("item", "price"):
        assert by_name(look)[name].missing == (0, 1, 1)
        assert by_name(look)[name].new == (0, 0, 0)
        assert by_name(look)[name].finding == "far"


def test_lists_that_become_empty(make: Make) -> None:
    """Nothing in a list is a value that is missing, also where all lists of a slice are empty."""
    tags = [[] if n >= ROWS * 3 // 4 else ["a", "b"][: 1 + n % 2] for n in range(ROWS)]
    found = by_name(look_at_drift(make(tags=pa.array(tags)), OPTIONS, 4))["tags"]
    assert found.missing == (0, 0, 1)
    assert found.finding == "far"
    empty = pa.array([[]] * ROWS, pa.list_(pa.string()))
    assert by_name(look_at_drift(make(tags=empty), OPTIONS, 4))["tags"].finding == "steady"


def test_values_that_the_base_lacks_altogether(make: Make) -> None:
    late = np.arange(ROWS) >= ROWS // 2
    item = pa.array(["a" if at else None for at in late])
    look = look_at_drift(make(item=item, price=np.where(late, 1.0, np.nan)), OPTIONS, 4)
    for name in ("item", "price"):
        assert by_name(look)[name].new == (0, 1, 1)
        assert by_name(look)[name].missing == (1, 0, 0)


def test_order_of_the_rows_does_not_matter_to_the_counts(make: Make) -> None:
    sorted_, mixed = (
        look_at_drift(make(order=order), OPTIONS, 4) for order in (None, np.random.default_rng(3).permutation(ROWS))
    )
    for first, last in zip(sorted_.columns, mixed.columns, strict=True):
        assert first.psi == last.psi
        assert first.new == last.new
    again = look_at_drift(make(), OPTIONS, 4)
    assert again == sorted_


def test_reference_is_the_share_of_the_base(make: Make) -> None:
    look = look_at_drift(make(), OPTIONS, 6, reference=0.5)
    assert look.base.rows == ROWS // 2
    assert [each.rows for each in look.slices] == [ROWS // 10] * 5


def test_rows_of_one_time_stay_together(make: Make) -> None:
    look = look_at_drift(make(ts=np.arange(ROWS) // (ROWS // 2)), OPTIONS, 8)
    assert (look.base.rows, [each.rows for each in look.slices]) == (ROWS // 2, [ROWS // 2])
    assert (look.base.start, look.slices[0].stop) == ("0", "1")


def test_one_label_is_no_matter(make: Make) -> None:
    look = look_at_drift(make(click=np.zeros(ROWS, int)), OPTIONS, 3)
    assert [each.click_rate for each in look.slices] == [0, 0]


def test_few_rows_have_no_classifier(make: Make) -> None:
    look = look_at_drift(make(rows=90), OPTIONS, 3)
    assert [each.auc for each in look.slices] == [None, None]
    assert by_name(look)["price"].auc == (None, None)
    assert "-" in [cell.text for cell in column_table(look).rows[0]]


def test_crosses_and_times(make: Make) -> None:
    when = np.datetime64("2024-05-01T12:00", "s") + np.arange(ROWS)
    options = LogOptions("click", "ts", lists=("tags",), crosses=(("user", "item"),), ignore=("still",))
    look = look_at_drift(make(ts=when), options, 3)
    assert look.columns[-1].kind == "cross"
    assert look.base.start == "2024-05-01 12:00"


@pytest.mark.parametrize(("options", "slices", "reference", "message"), [
    (LogOptions("click"), 8, None, "no column is the time"),
    (OPTIONS, 1, None, "at least 2 slices, got 1"),
    (OPTIONS, 4, 1.0, "between 0 and 1, got 1.0"),
    (LogOptions("click", "nope"), 4, None, "nope"),
])  # fmt: skip
def test_refused(make: Make, options: LogOptions, slices: int, reference: float | None, message: str) -> None:
    with pytest.raises(InputError) as caught:
        look_at_drift(make(), options, slices, reference=reference)
    assert message in caught.value.message
    assert caught.value.hint


def test_one_time_is_refused(make: Make) -> None:
    with pytest.raises(InputError, match="is 5 in every row"):
        look_at_drift(make(ts=np.full(ROWS, 5)), OPTIONS)


def test_sample_is_even() -> None:
    rng = np.random.default_rng(0)
    seen = np.zeros(1000, int)
    for _ in range(400):
        sample = Rows(100)
        for start in range(0, 1000, 130):
            sample.add(np.arange(start, min(start + 130, 1000))[:, None], rng)
        seen[sample.codes[:, 0]] += 1
        assert len(np.unique(sample.codes)) == 100
    halves = seen.reshape(2, 500).sum(axis=1)
    assert abs(halves[0] / halves[1] - 1) < 0.05
    assert seen.min() > 10


def test_auc_of_slices() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 4000)
    logit = label * 1.0 + rng.normal(size=4000)
    first, last, none = auc_by_slice(label, logit, np.repeat([0, 1], [3900, 100]), 3)
    assert none.rows == 0
    assert none.auc is None
    assert first.auc == pytest.approx(0.76, abs=0.02)  # Phi(1 / sqrt 2)
    assert last.high - last.low > 3 * (first.high - first.low)
    draws = [auc_by_slice(y := rng.integers(0, 2, 300), y + rng.normal(size=300), np.zeros(300), 1) for _ in range(200)]
    inside = np.mean([found.low < 0.76025 < found.high for (found,) in draws])
    assert 0.9 < inside < 0.99
    for place in (-1, 3):
        with pytest.raises(InputError, match="not all within 0 to 2"):
            auc_by_slice([0, 1], [0.0, 1.0], [0, place], 3)


def test_quality_needs_times(make: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    small = Settings(dim=4, bottom=(8,), top=(8,))
    job = prepare(make(), LogOptions("click", ignore=("ts",), lists=("tags",)), small, tmp_path / "out", silent)
    model = build(job.num_rows, job.train.num_dense, job.settings)
    with pytest.raises(InputError, match="the log has no times"):
        quality_by_slice(model, job.test, np.array([5]))


def test_models_over_slices(make: Make) -> None:
    rng = np.random.default_rng(0)
    user = rng.integers(0, 60, ROWS)
    late = np.arange(ROWS) >= ROWS * 3 // 4
    click = ((user % 2 == 0) ^ late ^ (rng.random(ROWS) < 0.1)).astype(int)
    small = Settings(dim=4, bottom=(8,), top=(8,), batch_size=64, lr=0.05)
    found = models_by_slice(make(user=user, click=click), OPTIONS, ["dlrm", "dcn", "adrec"], 4, settings=small)
    assert list(found) == ["dlrm", "dcn", "adrec"]
    for each in found.values():
        assert [slice_.rows for slice_ in each] == [ROWS // 4] * 3
        assert min(each[0].auc, each[1].auc) > 0.7 > 0.4 > each[2].auc  # what was learned is turned round
    with pytest.raises(InputError, match="no model 'mlp'"):
        models_by_slice(make(), OPTIONS, ["mlp"])
    with pytest.raises(InputError, match="no column is the time"):
        models_by_slice(make(), LogOptions("click"), ["dlrm"])


def test_the_page(make: Make, tmp_path: Path) -> None:
    look = look_at_drift(make(), OPTIONS, 4)
    models = {"dlrm": auc_by_slice([0, 1] * 3, [0.0, 1.0] * 3, [0, 0, 1, 1, 2, 2], 3)}
    write_page(tmp_path / "drift.html", "Does <it> drift?", drift=look, models=models)
    text = (tmp_path / "drift.html").read_text()
    assert "Does &lt;it&gt; drift?" in text
    assert "<script" not in text
    assert text.count("<svg") == 3
    for fact in drift_facts(look):
        assert fact.split(",")[0] in text


def test_the_chart() -> None:
    lines = {f"column {i}": [(i + k / 10, i - 1.0, i + 1.0) if k != 1 else None for k in range(4)] for i in range(6)}
    starts = ["a", "b", "c", "a very long name of a time"]
    root = ET.fromstring(slices_chart("title", lines, starts, what="<height>", marks={2.0: "here", 99.0: "far"}))
    words = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"column 0", "column 3", "here", "<height>"} <= set(words)
    assert not {"column 4", "far"} & set(words)
    assert len([element for element in root.iter() if element.tag.endswith("polyline")]) == 6
    assert slices_chart("title", {"a": [None]}, ["b"], what="c") == ""
