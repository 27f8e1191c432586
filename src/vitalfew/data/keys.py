"""Every categorical value becomes a 64-bit key, so that all later work is on arrays of numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vitalfew.core.errors import InputError
from vitalfew.data._hash import cross_into, hash_strings, mix_integers

__all__ = ["cross", "keys", "kind_of"]

Keys = npt.NDArray[np.uint64]
Valid = npt.NDArray[np.bool_]


def kind_of(type: pa.DataType) -> str:  # noqa: A002
    """Return how values of a type become keys: "integer", "text", or "" where they cannot.

    Examples
    --------
    >>> kind_of(pa.int32()), kind_of(pa.dictionary(pa.int8(), pa.string())), kind_of(pa.list_(pa.int64()))
    ('integer', 'text', '')
    """
    is_a = pa.types
    if is_a.is_dictionary(type):
        return kind_of(type.value_type)
    if is_a.is_integer(type) or is_a.is_boolean(type) or is_a.is_floating(type) or is_a.is_decimal(type):
        return "integer"
    if is_a.is_temporal(type) and not is_a.is_interval(type):
        return "integer"
    texts = (is_a.is_string, is_a.is_large_string, is_a.is_string_view)
    bytes_ = (is_a.is_binary, is_a.is_large_binary, is_a.is_binary_view, is_a.is_fixed_size_binary)
    return "text" if any(test(type) for test in texts + bytes_) else ""


def keys(array: pa.Array, *, seed: int = 0, column: str = "values") -> tuple[Keys, Valid]:
    """Return a 64-bit key for each value, and which values are there at all.

    Parameters
    ----------
    array
        Whole numbers, truth values, text, or a dictionary of these. Floats must be whole numbers.
    seed
        Another seed gives other keys.
    column
        The name to use in messages.

    Returns
    -------
    keys, valid
        Null, NaN and the empty text are not valid; their keys mean nothing.

    Raises
    ------
    InputError
        If a value is a fraction, or the type has no keys.

    Examples
    --------
    >>> values, valid = keys(pa.array(["ann", None, "", "ann"]))
    >>> bool(values[0] == values[3]), valid.tolist()
    (True, [True, False, False, True])

    Notes
    -----
    Keys of whole numbers differ whenever the numbers differ: the mix is a bijection of 64 bits. Keys of text are
    XXH64 of its bytes: for n distinct texts some two share a key with a chance of about n^2 / 2^65. The number 12
    and the text "12" have different keys.
    """
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if pa.types.is_dictionary(array.type):
        return _dictionary_keys(array, seed, column)
    if pa.types.is_null(array.type):
        return np.zeros(len(array), np.uint64), np.zeros(len(array), np.bool_)
    kind = kind_of(array.type)
    if kind == "integer":
        return _integer_keys(array, seed, column)
    if kind == "text":
        return _text_keys(array, seed)
    raise InputError(
        f"column `{column}` is {array.type}, which cannot be categorical",
        hint="name it a list column, or ignore it",
    )


def cross(parts: Sequence[Keys]) -> Keys:
    """Return one key for each combination of values; the order of the parts matters.

    Examples
    --------
    >>> user, item = np.array([1, 1, 2], np.uint64), np.array([1, 2, 1], np.uint64)
    >>> np.unique(cross([user, item])).size
    3
    """
    crossed = np.zeros(len(parts[0]), np.uint64)
    for part in parts:
        cross_into(crossed, part)
    return crossed


def whole_numbers(array: pa.Array, column: str = "values") -> tuple[npt.NDArray[np.int64], Valid]:
    """Return the values as 64-bit whole numbers and which of them are there; fractions are refused."""
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    type_ = array.type
    if pa.types.is_floating(type_) or pa.types.is_decimal(type_):
        values = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        valid = valid & ~np.isnan(values)
        wrong = valid & ~((values == np.floor(values)) & (np.abs(values) < 2.0**53))
        if wrong.any():
            raise InputError(
                f"column `{column}` holds {values[wrong][0]:g}, which is no whole number, so it cannot be categorical",
                hint="name it a numeric column, or write its values as whole numbers or text",
            )
        return np.where(valid, values, 0).astype(np.int64), valid
    if pa.types.is_boolean(type_):
        array = array.cast(pa.uint8())
    elif pa.types.is_date(type_) or pa.types.is_timestamp(type_):
        # One unit, so that the same day has the same key however a file stores it.
        zone = type_.tz if pa.types.is_timestamp(type_) else None
        array = array.cast(pa.timestamp("us", zone), safe=False).cast(pa.int64())
    elif pa.types.is_temporal(type_):
        array = array.cast(pa.int32() if type_.bit_width == 32 else pa.int64())
    values = (array.fill_null(0) if array.null_count else array).to_numpy()
    return values.astype(np.int64, copy=False), valid


def _integer_keys(array: pa.Array, seed: int, column: str) -> tuple[Keys, Valid]:
    values, valid = whole_numbers(array, column)
    return mix_integers(values.view(np.uint64), np.uint64(seed)), valid


def _text_keys(array: pa.Array, seed: int) -> tuple[Keys, Valid]:
    type_ = array.type
    if pa.types.is_string_view(type_) or pa.types.is_binary_view(type_) or pa.types.is_fixed_size_binary(type_):
        array = array.cast(pa.large_binary())
    is_large = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    if len(array) == 0:
        return np.zeros(0, np.uint64), valid
    _, offset_buffer, data_buffer = array.buffers()
    offsets: npt.NDArray[np.int64] = np.frombuffer(offset_buffer, np.int64 if is_large else np.int32)
    offsets = offsets[array.offset : array.offset + len(array) + 1]
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None and data_buffer.size else _NO_BYTES
    # Read-only views only, so that the kernel is compiled once for each width of the offsets.
    offsets.flags.writeable = data.flags.writeable = False
    return hash_strings(offsets, data, np.uint64(seed)), valid & (offsets[1:] > offsets[:-1])


def _dictionary_keys(array: pa.DictionaryArray, seed: int, column: str) -> tuple[Keys, Valid]:
    word_keys, word_valid = keys(array.dictionary, seed=seed, column=column)
    valid = array.indices.is_valid().to_numpy(zero_copy_only=False)
    if not len(word_keys):
        return np.zeros(len(array), np.uint64), np.zeros(len(array), np.bool_)
    indices = array.indices.fill_null(0).to_numpy()
    return word_keys[indices], valid & word_valid[indices]


_NO_BYTES = np.zeros(0, np.uint8)
