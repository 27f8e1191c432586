"""Guess what each column of a log is for, and say why."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from vitalfew.core.errors import InputError
from vitalfew.data._values import labels
from vitalfew.data.keys import kind_of
from vitalfew.data.readers import LogReader, unknown_column
from vitalfew.data.schema import Column, Kind, Schema

__all__ = ["infer_schema"]

_SAMPLE_ROWS = 100_000
_FEW_DISTINCT = 256
_SEEN_EACH = 10  # a code comes back; a measurement of few rows has few values too, but seldom the same ones
_KEY_ROWS = 100  # fewer rows may all differ by chance
_ID_WORDS = re.compile(
    "ids?|code|key|hash|user|item|product|movie|ads?|advertiser|campaign|creative|site|app|device|category|brand|"
    "shop|zip|postcode"
)


def infer_schema(
    reader: LogReader,
    *,
    label: str,
    time: str | None = None,
    numeric: Collection[str] | None = None,
    categorical: Collection[str] | None = None,
    lists: Collection[str] | None = None,
    ignore: Collection[str] | None = None,
    crosses: Sequence[Sequence[str]] = (),
) -> Schema:
    """Return what each column is for: as asked, else by its type and the first 100,000 rows.

    - floats are numeric, text and truth values categorical, lists of ids or text lists;
    - whole numbers are categorical if their name ends in a word like id, code, key, user or item, or if they are
      not negative and take at most 256 values, each ten times on average; otherwise numeric;
    - time stamps, columns with one value only, and text or ids that never repeat (row keys) are ignored.

    Raises
    ------
    InputError
        If a column is absent, is asked for in two roles, or cannot play its role.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from vitalfew.data.readers import open_log
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "log.csv"
    >>> _ = file.write_text("click,user_id,price,site" + chr(10) + "1,7,0.5,a" + chr(10) + "0,8,1.5,a")
    >>> print(infer_schema(open_log(file), label="click").describe())
    click    label        the column to predict
    user_id  categorical  whole numbers, named like an id
    price    numeric      floats
    site     ignored      one value in the first 2 rows
    """
    asked = _asked(reader, label, time, numeric, categorical, lists, ignore)
    sample = _sample(reader, [name for name, kind in asked.items() if kind == "numeric"])
    labels(sample.column(label), label)
    columns = tuple(
        Column(name, asked[name], _ASKED[asked[name]])
        if name in asked
        else Column(name, *_guess(name, reader.types[name], sample.column(name)))
        for name in reader.columns
    )
    for column in columns:
        _check(column, reader.types[column.name])
    return Schema(columns, tuple(tuple(cross) for cross in crosses))


def _asked(
    reader: LogReader,
    label: str,
    time: str | None,
    numeric: Collection[str] | None,
    categorical: Collection[str] | None,
    lists: Collection[str] | None,
    ignore: Collection[str] | None,
) -> dict[str, Kind]:
    sets: list[tuple[Kind, Collection[str]]] = [
        ("label", [label]),
        ("time", [] if time is None else [time]),
        ("numeric", numeric or ()),
        ("categorical", categorical or ()),
        ("list", lists or ()),
        ("ignored", ignore or ()),
    ]
    asked: dict[str, Kind] = {}
    for kind, names in sets:
        if isinstance(names, str):
            raise InputError(f"the {kind} columns are the text {names!r}", hint=f"pass a list: [{names!r}]")
        for name in names:
            if name not in reader.types:
                raise unknown_column(name, reader.columns, f"`{reader.name}`")
            if name in asked:
                hint = (
                    "copy the time into a second column to use it as a feature too"
                    if asked[name] == "time"
                    else "name it in one role"
                )
                raise InputError(f"column `{name}` is asked for as {asked[name]} and as {kind}", hint=hint)
            asked[name] = kind
    return asked


def _sample(reader: LogReader, numeric: Collection[str]) -> pa.Table:
    # A text column that starts with whole numbers may go on with fractions.
    types = {name: pa.float64() for name in numeric} if reader.is_text else None
    batches, num_rows = [], 0
    for batch in reader.batches(types=types, batch_rows=_SAMPLE_ROWS):
        batches.append(batch)
        num_rows += batch.num_rows
        if num_rows >= _SAMPLE_ROWS:
            break
    return pa.Table.from_batches(batches).slice(0, _SAMPLE_ROWS)


def _guess(name: str, type_: pa.DataType, values: pa.ChunkedArray) -> tuple[Kind, str]:
    is_a = pa.types
    if is_a.is_dictionary(type_):
        type_ = type_.value_type
        values = pa.chunked_array([chunk.dictionary_decode() for chunk in values.chunks], type_)
    if is_a.is_list(type_) or is_a.is_large_list(type_) or is_a.is_fixed_size_list(type_):
        if kind_of(type_.value_type) and not is_a.is_floating(type_.value_type):
            return "list", f"a list of {type_.value_type}"
        return "ignored", f"lists of {type_.value_type} are not supported"
    if is_a.is_temporal(type_):
        return "ignored", "a time stamp; pass --time to split by it"
    number = is_a.is_integer(type_) or is_a.is_floating(type_) or is_a.is_decimal(type_)
    if not (number or kind_of(type_)):
        return "ignored", f"values of type {type_} are not supported"
    num_rows = len(values)
    distinct = pc.count_distinct(values, mode="only_valid").as_py()
    if distinct == 0:
        return "ignored", f"no value in the first {num_rows:,} rows"
    if distinct == 1 and not values.null_count:
        return "ignored", f"one value in the first {num_rows:,} rows"
    if is_a.is_floating(type_) or is_a.is_decimal(type_):
        return "numeric", "floats"
    named_like_id = _ID_WORDS.fullmatch(_last_word(name)) is not None
    is_key = distinct == num_rows >= _KEY_ROWS
    if is_a.is_integer(type_):
        if named_like_id:
            return _KEY if is_key else ("categorical", "whole numbers, named like an id")
        few = distinct <= _FEW_DISTINCT and distinct * _SEEN_EACH <= num_rows
        if few and pc.min(values).as_py() >= 0:
            return "categorical", f"whole numbers with {distinct} values in the first {num_rows:,} rows"
        return "numeric", "whole numbers with many values"
    if is_key:
        return _KEY
    return "categorical", "truth values" if is_a.is_boolean(type_) else "text"


def _last_word(name: str) -> str:
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
    return words[-1].lower() if words else ""


def _check(column: Column, type_: pa.DataType) -> None:
    is_a = pa.types
    plain = type_.value_type if is_a.is_dictionary(type_) else type_
    is_list = is_a.is_list(plain) or is_a.is_large_list(plain) or is_a.is_fixed_size_list(plain)
    if column.kind == "numeric" and not (
        is_a.is_integer(plain) or is_a.is_floating(plain) or is_a.is_decimal(plain) or is_a.is_boolean(plain)
    ):
        raise InputError(
            f"column `{column.name}` is {plain}, so it cannot be numeric", hint="name it a categorical column"
        )
    if column.kind == "list" and not (is_list and kind_of(plain.value_type)):
        raise InputError(
            f"column `{column.name}` is {plain}, not a list of ids or text",
            hint="lists come from Parquet; in a text file name it a categorical column",
        )
    if column.kind == "categorical" and not kind_of(plain):
        hint = "name it a list column" if is_list else "ignore it"
        raise InputError(f"column `{column.name}` is {plain}, so it cannot be categorical", hint=hint)


_KEY: tuple[Kind, str] = ("ignored", "every value differs; looks like a row key")
_ASKED: dict[Kind, str] = {
    "label": "the column to predict",
    "time": "orders the rows; the later ones are for testing",
    "numeric": "asked for",
    "categorical": "asked for",
    "list": "asked for",
    "ignored": "asked for",
}
