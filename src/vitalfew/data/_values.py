"""Labels, times and numbers out of Arrow columns; whatever cannot be used is named with its row."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vitalfew.core.errors import InputError

__all__ = ["compress", "labels", "numbers", "times"]

_MOST_SECONDS = 9.2e12  # as microseconds they still fit in 64 bits
_MICROSECONDS = 1_000_000


def compress(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return sign(x) * log(1 + |x|): it tames long tails, and negative numbers keep their side.

    Examples
    --------
    >>> compress(np.array([0.0, np.e - 1, 1 - np.e])).round(6) + 0.0
    array([ 0.,  1., -1.])
    """
    return np.copysign(np.log1p(np.abs(values)), values)


def labels(array: pa.Array, column: str, first_row: int = 0) -> npt.NDArray[np.float32]:
    """Return -1, 0 or 1 for each row.

    Examples
    --------
    >>> labels(pa.array([True, False]), "click")
    array([1., 0.], dtype=float32)
    """
    array = _plain(array)
    if kind_is_text(array.type):
        words = array.dictionary_encode(null_encoding="encode")
        meaning = [_WORDS.get(str(word).strip().lower(), np.inf) for word in words.dictionary.to_pylist()]
        values: npt.NDArray[np.float64] = np.array(meaning, np.float64)[words.indices.to_numpy()]
    else:
        values = _floats(array, column)
    allowed = (values == 0) | (values == 1) | (values == -1)
    if not allowed.all():
        at = int(np.argmin(allowed))
        value = array[at].as_py()
        if value is None or np.isnan(values[at]):
            raise InputError(
                f"the label `{column}` is missing in row {first_row + at + 1}", hint="leave out rows without a label"
            )
        raise InputError(
            f"the label `{column}` holds {value!r} in row {first_row + at + 1}",
            hint="a label is 0 or 1, true or false, or -1 or 1",
        )
    return values.astype(np.float32)


def numbers(array: pa.Array, column: str, first_row: int = 0) -> npt.NDArray[np.float64]:
    """Return the numbers of a column, NaN where one is missing; infinities are refused.

    Examples
    --------
    >>> numbers(pa.array([1, None]), "price")
    array([ 1., nan])
    """
    values = _floats(_plain(array), column)
    infinite = np.isinf(values)
    if infinite.any():
        row = first_row + int(np.argmax(infinite)) + 1
        raise InputError(
            f"column `{column}` is infinite in row {row}", hint="repair the value or leave it empty (missing)"
        )
    return values


def times(array: pa.Array, column: str, first_row: int = 0) -> npt.NDArray[np.int64]:
    """Return times in order-preserving 64-bit numbers.

    Time stamps and dates, also as ISO text, become microseconds; whole numbers stay as they are; floats are taken
    as seconds and become microseconds, so that fractions of a second keep their order.

    Examples
    --------
    >>> times(pa.array(["1970-01-01 00:00:01"]), "when")
    array([1000000])
    """
    array = _plain(array)
    missing = array.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
    if missing.any():
        row = first_row + int(np.argmax(missing)) + 1
        raise InputError(f"the time `{column}` is missing in row {row}", hint="leave out rows without a time")
    if kind_is_text(array.type):
        array = _parsed(array, column)
    if pa.types.is_timestamp(array.type) or pa.types.is_date(array.type):
        zone = array.type.tz if pa.types.is_timestamp(array.type) else None
        array = array.cast(pa.timestamp("us", zone), safe=False)
        return np.asarray(array.cast(pa.int64()).to_numpy())
    if pa.types.is_integer(array.type):
        try:
            return np.asarray(array.cast(pa.int64()).to_numpy())
        except pa.ArrowInvalid:
            raise InputError(
                f"the time `{column}` holds a number above 2^63", hint="pass times as seconds or time stamps"
            ) from None
    if pa.types.is_floating(array.type) or pa.types.is_decimal(array.type):
        seconds = _floats(array, column)
        if not (np.abs(seconds) < _MOST_SECONDS).all():
            row = first_row + int(np.argmin(np.abs(seconds) < _MOST_SECONDS)) + 1
            raise InputError(
                f"the time `{column}` holds {seconds[row - 1 - first_row]:g} in row {row}",
                hint=f"a float is a number of seconds below {_MOST_SECONDS:g}",
            )
        return np.round(seconds * _MICROSECONDS).astype(np.int64)
    raise InputError(
        f"the time `{column}` is {array.type}", hint="a time is a time stamp, a date, a number or ISO text"
    )


def kind_is_text(type: pa.DataType) -> bool:  # noqa: A002
    """Return whether a column holds text."""
    return bool(pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type))


def _parsed(array: pa.Array, column: str) -> pa.Array:
    """Read ISO text, with or without a time zone."""
    for type_ in (pa.timestamp("us"), pa.timestamp("us", "UTC")):
        try:
            return array.cast(pa.string()).cast(type_)
        except pa.ArrowInvalid as error:
            message = str(error)
    raise InputError(
        f"the time `{column}` holds text that is no ISO time ({message.splitlines()[0]})",
        hint="write times like 2024-05-31 12:00:00, or as numbers",
    )


def _floats(array: pa.Array, column: str) -> npt.NDArray[np.float64]:
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_decimal(array.type)):
        raise InputError(
            f"column `{column}` is {array.type}, which is no number", hint="name it a categorical column, or ignore it"
        )
    values: npt.NDArray[np.float64] = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return values


def _plain(array: pa.Array) -> pa.Array:
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


_WORDS = {"0": 0.0, "1": 1.0, "-1": -1.0, "true": 1.0, "false": 0.0, "none": np.nan, "": np.nan}
