from __future__ import annotations

import datetime as dt

import pyarrow as pa
import pytest

from vitalfew.core.errors import InputError
from vitalfew.data import Column, Schema, infer_schema, open_log

N = 400
CLICK = [i % 2 for i in range(N)]


def kinds(schema):
    return {column.name: column.kind for column in schema.columns}


def test_each_type_has_its_kind_and_reason(parquet):
    log = parquet(
        {
            "click": CLICK,
            "price": [i / 7 for i in range(N)],
            "user_id": [i % 50 for i in range(N)],
            "movieId": [i % 50 for i in range(N)],
            "weekday": [i % 7 for i in range(N)],
            "balance": [i % 7 - 3 for i in range(N)],
            "views": range(N),
            "row_id": range(N),
            "site": [f"s{i % 9}" for i in range(N)],
            "os": pa.array([f"o{i % 3}" for i in range(N)]).dictionary_encode(),
            "token": [f"t{i}" for i in range(N)],
            "country": ["ch"] * N,
            "mobile": [i % 3 == 0 for i in range(N)],
            "nothing": pa.nulls(N),
            "when": [dt.datetime(2024, 1, 1, tzinfo=dt.UTC) + dt.timedelta(i) for i in range(N)],
            "tags": [[i, i + 1] for i in range(N)],
            "vector": [[0.5] for _ in range(N)],
            "nested": [{"a": 1} for _ in range(N)],
        }
    )
    schema = infer_schema(log, label="click", crosses=[("site", "os")])
    assert kinds(schema) == {
        "click": "label",
        "price": "numeric",
        "user_id": "categorical",
        "movieId": "categorical",
        "weekday": "categorical",
        "balance": "numeric",
        "views": "numeric",
        "row_id": "ignored",
        "site": "categorical",
        "os": "categorical",
        "token": "ignored",
        "country": "ignored",
        "mobile": "categorical",
        "nothing": "ignored",
        "when": "ignored",
        "tags": "list",
        "vector": "ignored",
        "nested": "ignored",
    }
    assert schema.features == ("user_id", "movieId", "weekday", "site", "os", "mobile", "tags", "site x os")
    assert (schema.label, schema.time, schema.lists) == ("click", None, ("tags",))
    lines = dict(line.split(maxsplit=1) for line in schema.describe().splitlines())
    assert lines["token"] == "ignored      every value differs; looks like a row key"
    assert lines["when"].endswith("a time stamp; pass --time to split by it")
    assert lines["country"].endswith("one value in the first 400 rows")
    assert Schema.from_dict(schema.to_dict()) == schema


def test_what_is_asked_for_wins(parquet):
    log = parquet({"click": CLICK, "day": range(N), "views": range(N), "site": ["a"] * N, "x": [0.5] * N})
    schema = infer_schema(log, label="click", time="day", categorical=["views", "site"], numeric=[], ignore=["x"])
    assert kinds(schema) == {
        "click": "label",
        "day": "time",
        "views": "categorical",
        "site": "categorical",
        "x": "ignored",
    }


def test_a_numeric_text_column_may_start_with_whole_numbers(write):
    log = open_log(write("click,price,x\n" + "".join(f"{i % 2},{i},{i % 5}\n" for i in range(90_000)) + "1,0.5,1\n"))
    assert infer_schema(log, label="click", numeric=["price"]).numeric == ("price", "x")[:1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "clck"}, "`clck` is missing from .*did you mean `click`"),
        ({"label": "click", "time": "click"}, "`click` is asked for as label and as time"),
        ({"label": "click", "time": "day", "numeric": ["day"]}, "`day` is asked for as time and as numeric.*second"),
        ({"label": "click", "numeric": ["site"]}, "`site` is string, so it cannot be numeric"),
        ({"label": "click", "lists": ["site"]}, "`site` is string, not a list"),
        ({"label": "click", "categorical": ["tags"]}, "`tags` is list.*so it cannot be categorical.*list column"),
        ({"label": "click", "categorical": "site"}, r"are the text 'site'; pass a list: \['site'\]"),
        ({"label": "click", "crosses": [("site",)]}, "the cross `site` needs two different columns"),
        ({"label": "click", "crosses": [("site", "site")]}, "needs two different columns"),
        ({"label": "click", "crosses": [("site", "x")]}, "names `x`, which is numeric.*categorical columns only: site"),
        ({"label": "click", "crosses": [("site", "sit")]}, "names `sit`, which is absent"),
        ({"label": "x"}, r"the label `x` holds 0\.5 in row 1"),
        ({"label": "day"}, "the label `day` holds 2 in row 3; a label is 0 or 1"),
        ({"label": "site"}, "the label `site` holds 's0' in row 1"),
        ({"label": "holes"}, "the label `holes` is missing in row 2"),
    ],
)
def test_wrong_roles(parquet, options, message):
    log = parquet(
        {
            "click": CLICK,
            "day": range(N),
            "site": [f"s{i % 9}" for i in range(N)],
            "x": [0.5 + i for i in range(N)],
            "tags": [[i] for i in range(N)],
            "holes": [1, None] * (N // 2),
        }
    )
    with pytest.raises(InputError, match=message):
        infer_schema(log, **options)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([Column("a", "categorical")], "no column is the label"),
        ([Column("a", "label"), Column("b", "label")], "`a` and `b` are both the label"),
        ([Column("a", "label"), Column("b", "ignored", "one value")], r"no column .* is a feature \(`b`: one value\)"),
        ([Column("a", "label"), Column("b", "numeric"), Column("b", "numeric")], "`b` is named twice"),
        ([Column("a", "label"), Column("b", "text")], "column `b` is to be 'text'"),
    ],
)
def test_impossible_schemas(columns, message):
    with pytest.raises(InputError, match=message):
        Schema(tuple(columns))
    with pytest.raises(InputError, match="this is not a schema"):
        Schema.from_dict({"columns": [{}]})
