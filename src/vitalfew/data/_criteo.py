"""The Criteo layout: tab separated, no header, and rows that leave out trailing empty fields."""

from __future__ import annotations

import string
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from numba import njit

__all__ = ["criteo_types", "whole_rows"]

_TAB, _NEWLINE, _RETURN = 9, 10, 13
_HASH_DIGITS = 8


def criteo_types(head: bytes) -> dict[str, pa.DataType]:
    r"""Return the columns of a Criteo file, judging from its first rows whether it starts with the label.

    The published test files leave the label out. Then the fourteenth field is the first hashed category, eight
    hexadecimal digits; with a label it is the last of the counts, which is never that long.

    Examples
    --------
    >>> list(criteo_types(b"0\t1\t1\n"))[:3]
    ['label', 'I1', 'I2']
    """
    rows = (line.rstrip(b"\r").split(b"\t") for line in head.split(b"\n")[:1000])
    unlabelled = any(len(row) <= 39 and len(row) > 13 and _is_hash(row[13]) for row in rows)
    types = {} if unlabelled else {"label": pa.int64()}
    types |= {f"I{i}": pa.float64() for i in range(1, 14)}
    return types | {f"C{i}": pa.string() for i in range(1, 27)}


def _is_hash(field: bytes) -> bool:
    return len(field) == _HASH_DIGITS and all(chr(c) in string.hexdigits for c in field)


def whole_rows(stream: pa.NativeFile, num_fields: int, block_bytes: int) -> Iterator[bytes]:
    """Cut a stream into blocks of whole lines, each line filled up with tabs to `num_fields` fields."""
    rest = b""
    while block := stream.read(block_bytes):
        cut = block.rfind(b"\n") + 1
        if cut:
            yield _filled(rest + block[:cut], num_fields)
            rest = block[cut:]
        else:
            rest += block
    if rest.strip():
        yield _filled(rest + b"\n", num_fields)


def _filled(block: bytes, num_fields: int) -> bytes:
    source = np.frombuffer(block, np.uint8)
    size = source.size + int((source == _NEWLINE).sum()) * (num_fields - 1)
    target = np.empty(size, np.uint8)
    return target[: _fill(source, target, num_fields - 1)].tobytes()


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator, unused-ignore]
def _fill(source: npt.NDArray[np.uint8], target: npt.NDArray[np.uint8], num_tabs: int) -> int:
    size = tabs = length = 0
    for i in range(source.size):
        byte = source[i]
        if byte == _NEWLINE:
            # The carriage return of a Windows line end stays behind the tabs that are filled in.
            ends_in_return = length > 0 and source[i - 1] == _RETURN
            if ends_in_return:
                size -= 1
                length -= 1
            if length > 0:  # an empty line stays empty, so that it is passed over
                for _ in range(num_tabs - tabs):
                    target[size] = _TAB
                    size += 1
            if ends_in_return:
                target[size] = _RETURN
                size += 1
            tabs = 0
            length = -1
        tabs += byte == _TAB
        target[size] = byte
        size += 1
        length += 1
    return size
