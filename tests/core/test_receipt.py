from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitalfew.core import Curve, Declined, InputError, Line, Pair, Prediction, Quality, Receipt

FULL = Receipt(
    title="fused rows on the night log",
    method="fused rows",
    lines=(Line("time", "s", 10, 2.5, "measured", 2.0, 3.0, "median of 5"), Line("rows", "1", None, 3, "counted")),
    verdict="saved",
    why="4.00x (at least 3.10x)",
    rule="at equal work",
    quality=(Quality("AUC", 0.7, 0.701, 0.001, -0.001, 0.003, 0.005, "equivalent"),),
    pairs=(Pair(3, "base", 10.0, 2.5, 0.7, 0.701), Pair(4, "few", 11, 3, 0.7, 0.702, 5.0, 5.0)),
    pairs_needed=7,
    overhead=(Line("look", "s", None, 0.5, "modelled"),),
    declined=(Declined("stale rows", "0.3 % are stale"),),
    predictions=(Prediction("time", "s", 2.4, 2.5, "roofline"),),
    curves=(Curve("user", ((0, 0), (0.1, 0.8), (1, 1.0)), 100),),
    notes=("naïve ≠ tuned", ""),
    environment={"cpu": {"cores": 2, "name": "x"}, "gpu": None, "turbo": True, "loads": [0.5, 1]},
    command="vitalfew look log.parquet",
    made="2025-01-01T00:00:00Z",
)


def leaves(value, path=()):
    """Yield the path to every leaf, empty lists and dicts included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    deeper = [leaf for key, item in items for leaf in leaves(item, (*path, key))]
    return deeper or [path]


def at(document, path):
    for key in path:
        document = document[key]
    return document


def edit(document, path, change):
    edited = copy.deepcopy(document)
    inner = at(edited, path[:-1])
    change(inner, path[-1])
    return edited


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("receipt") / "receipt.json"
    FULL.save(path)
    return path


DOCUMENT = json.loads(json.dumps({"schema": "vitalfew/receipt", "version": 1, "digest": "", **FULL.to_dict()}))


def test_a_receipt_comes_back_as_it_was(saved):
    assert Receipt.load(saved) == FULL
    assert Receipt.load(saved).digest() == FULL.digest()
    document = json.loads(saved.read_text(encoding="utf-8"))
    assert document == DOCUMENT | {"digest": FULL.digest()}
    assert Receipt.from_dict(FULL.to_dict()) == FULL


def others(value):
    """Say what a hand might write in place of a leaf."""
    if isinstance(value, bool):
        return [not value, None]
    if isinstance(value, int | float):
        return [value + 1, -value - 1, value * 1.0001 + 1e-9, str(value), None]
    if isinstance(value, str):
        return [value + "x", value.upper() + ".", None, 3, [value]]
    return [0, 1.5, "x", False, [1]]


@pytest.mark.parametrize("path", leaves(DOCUMENT), ids=lambda path: ".".join(map(str, path)))
def test_a_receipt_edited_by_hand_fails_wherever_the_edit_is(path, saved, tmp_path):
    document = json.loads(saved.read_text(encoding="utf-8"))
    old = at(document, path)
    edits = [edit(document, path, lambda inner, key, new=new: inner.__setitem__(key, new)) for new in others(old)]
    if isinstance(at(document, path[:-1]), list):
        edits.append(edit(document, path, lambda inner, key: inner.pop(key)))
        edits.append(edit(document, path, lambda inner, key: inner.append(inner[key])))
    for edited in edits:
        file = tmp_path / "edited.json"
        file.write_text(json.dumps(edited, ensure_ascii=False), encoding="utf-8")
        with pytest.raises(InputError) as caught:
            Receipt.load(file)
        assert caught.value.hint


@pytest.mark.parametrize("within", [(), ("lines", 0), ("quality", 0), ("curves", 0), ("pairs", 1), ("environment",)])
def test_a_key_added_by_hand_fails(within, saved, tmp_path):
    document = json.loads(saved.read_text(encoding="utf-8"))
    at(document, within)["remark"] = "checked"
    (tmp_path / "edited.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(InputError, match="was changed"):
        Receipt.load(tmp_path / "edited.json")


def test_a_key_written_twice_fails(saved, tmp_path, refuses):
    text = saved.read_text(encoding="utf-8")
    (tmp_path / "edited.json").write_text(text.replace("{", '{ "verdict": "no saving",', 1), encoding="utf-8")
    with refuses("'verdict' twice"):
        Receipt.load(tmp_path / "edited.json")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_no_number_fails(number, saved, tmp_path, refuses):
    text = saved.read_text(encoding="utf-8")
    assert "0.701" in text
    (tmp_path / "edited.json").write_text(text.replace("0.701", number), encoding="utf-8")
    with refuses(number):
        Receipt.load(tmp_path / "edited.json")


def test_the_layout_may_change_and_the_content_may_be_read_without_the_check(saved, tmp_path, refuses):
    document = json.loads(saved.read_text(encoding="utf-8"))
    file = tmp_path / "edited.json"
    file.write_text(json.dumps(document, sort_keys=True, indent=7), encoding="utf-8")
    assert Receipt.load(file) == FULL
    file.write_text(json.dumps(document | {"title": "better"}), encoding="utf-8")
    assert Receipt.load(file, verify=False) == replace(FULL, title="better")
    with refuses(str(file)):
        Receipt.load(file)
    del document["digest"]
    file.write_text(json.dumps(document), encoding="utf-8")
    with refuses("None"):
        Receipt.load(file)


NUMBERS = st.integers(-(10**6), 10**6) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(max_size=20)
LINES = st.builds(Line, TEXTS, TEXTS, NUMBERS, NUMBERS | st.none(), st.sampled_from(["measured", "counted"]))
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
RECEIPTS = st.builds(
    Receipt,
    TEXTS,
    TEXTS,
    st.lists(LINES, max_size=3).map(tuple),
    st.sampled_from(["saved", "no saving", "quality lost", "undecided"]),
    TEXTS,
    curves=st.lists(
        st.builds(Curve, TEXTS, st.lists(st.tuples(NUMBERS, NUMBERS), max_size=3).map(tuple), st.integers(0, 9)),
        max_size=2,
    ).map(tuple),
    notes=st.lists(TEXTS, max_size=2).map(tuple),
    environment=st.dictionaries(TEXTS, JSON, max_size=3),
)


@given(RECEIPTS)
def test_any_receipt_keeps_its_digest_through_json(receipt):
    again = Receipt.from_dict(json.loads(json.dumps(receipt.to_dict())))
    assert again == receipt
    assert again.digest() == receipt.digest()


@given(RECEIPTS, RECEIPTS)
def test_two_receipts_share_a_digest_only_when_they_share_their_content(one, two):
    assert (one.digest() == two.digest()) == (one.to_dict() == two.to_dict())


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path):
    receipt = replace(
        FULL,
        lines=(Line("time", "s", np.float32(2.5), np.int64(3), "measured"),),
        pairs=(Pair(np.int64(3), "base", np.float64(2), np.float32(1), 0.5, np.float32(0.5)),),
        environment={"cores": np.int32(2)},
    )
    receipt.save(tmp_path / "receipt.json")
    again = Receipt.load(tmp_path / "receipt.json")
    assert (again.lines[0].before, again.lines[0].after, again.pairs[0].seed) == (2.5, 3, 3)
    assert again.environment == {"cores": 2}


def test_what_json_cannot_hold_is_refused(tmp_path, refuses):
    with refuses("{1}"):
        replace(FULL, environment={"devices": {1}}).save(tmp_path / "receipt.json")
    with pytest.raises(ValueError, match="JSON compliant"):
        replace(FULL, predictions=(Prediction("time", "s", math.nan, 1.0),)).save(tmp_path / "receipt.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["before", "after", "low", "high"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_line_holds_figures_or_none(name, value, refuses):
    with refuses(value):
        replace(FULL.lines[0], **{name: value})


def test_a_line_says_where_it_comes_from_and_a_verdict_is_one_of_four(refuses):
    with refuses("'guessed'"):
        Line("time", "s", 1.0, 2.0, "guessed")
    with refuses("'great'"):
        replace(FULL, verdict="great")


@pytest.mark.parametrize(
    ("before", "after", "ratio"),
    [(10, 2, 5), (2, 10, 0.2), (None, 2, None), (2, None, None), (0, 2, None), (2, 0, None), (-4, -2, None)],
)
def test_a_ratio_needs_two_positive_figures(before, after, ratio):
    assert Line("time", "s", before, after, "measured").ratio == ratio


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ({}, "title"),
        ({"title": "only"}, "verdict"),
        (FULL.to_dict() | {"colour": "red"}, "colour"),
        (FULL.to_dict() | {"lines": [{"what": "time"}]}, "before"),
        (FULL.to_dict() | {"lines": 3}, "int"),
        (FULL.to_dict() | {"curves": [{"name": "x"}]}, "points"),
        (FULL.to_dict() | {"curves": [{"name": "x", "points": [1], "num_items": 1}]}, "int"),
        (FULL.to_dict() | {"pairs": [FULL.to_dict()["pairs"][0] | {"few_cost": -1}]}, "-1"),
    ],
)
def test_what_is_no_receipt_is_refused(body, shown, refuses):
    with refuses(shown):
        Receipt.from_dict(body)
