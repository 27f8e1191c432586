# mypy: disable-error-code="assignment"
# A variable of a kernel has one machine type, which numba infers; mypy sees the widest of several.

"""One token over coded slots on a CPU: a few slots at a time become floats, which never leave the first-level cache.

The plain twin is `_kernels_reference.attend` over `Packed` keys and values.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from vitalfew.generate._kernels_numba import _LOOSE, _ZERO, _bend, _dots, _sum_rows, _weigh

__all__ = ["KINDS", "attend", "turn"]

KINDS = {"int8": 0, "int4": 1, "fp8": 2}
_BLOCK = 32
# A float with these many fewer in its exponent, once its bits stand where those of a float32 do.
_HALF, _E4M3 = np.float32(2.0**112), np.float32(2.0**120)
_EIGHT = np.float32(8)


@njit(nogil=True, cache=True)
def turn(x: Any) -> None:
    """Do `quant.hadamard` to the rows of x (n, d), in place and in the same order of additions."""
    d = x.shape[1]
    factor = np.float32(1 / math.sqrt(d))
    for i in range(x.shape[0]):
        row, width = x[i], 1
        while width < d:
            for start in range(0, d, 2 * width):
                for j in range(start, start + width):
                    a, b = row[j], row[j + width]
                    row[j], row[j + width] = a + b, a - b
            width *= 2
        for j in range(d):
            row[j] *= factor


# Without the liberties that its caller takes, and would pass on: two factors might become one that is infinite.
@njit(nogil=True, cache=True, fastmath=False)
def _decode(table: Any, at: Any, step: Any, kind: Any, group: Any, bits: Any, out: Any) -> None:
    """Fill `out` (n, d) with the vectors of n rows of a table of bytes, as `Codec.decode` does with ``turned=True``."""
    d = out.shape[1]
    half = d // 2
    start = half if kind == 1 else d
    groups = d // group
    floats = bits.view(np.float32)
    for c in range(out.shape[0]):
        row, x = table[at + c * step], out[c]
        for g in range(groups):
            word = np.int32(row[start + 2 * g]) | (np.int32(row[start + 2 * g + 1]) << np.int32(8))
            bits[g] = ((word & np.int32(0x7FFF)) << np.int32(13)) | ((word & np.int32(0x8000)) << np.int32(16))
        scale = floats[0] * _HALF
        if kind == 0:
            codes = row.view(np.int8)
            for j in range(d):
                x[j] = np.float32(codes[j]) * scale
        elif kind == 1:
            low, high = x[:half], x[half:]
            for j in range(half):
                low[j] = np.float32(np.int32(row[j]) & np.int32(15)) - _EIGHT
            for j in range(half):
                high[j] = np.float32(np.int32(row[j]) >> np.int32(4)) - _EIGHT
            for g in range(groups):
                scale = floats[g] * _HALF
                some = x[g * group : (g + 1) * group]
                for j in range(group):
                    some[j] *= scale
        else:
            for j in range(d):
                code = np.int32(row[j])
                bits[j] = ((code & np.int32(127)) << np.int32(20)) | ((code & np.int32(128)) << np.int32(24))
            for j in range(d):
                x[j] = floats[j] * _E4M3 * scale


@njit(nogil=True, cache=True, fastmath=_LOOSE)
def attend(
    query: Any, keys: Any, key_steps: Any, values: Any, value_steps: Any, kind: Any, groups: Any, pos: Any,
    query_pos: Any, scale: Any, softcap: Any, slopes: Any, sinks: Any, out: Any, logits: Any, first: Any, end: Any,
) -> None:  # fmt: skip
    """Fill `out` (B, H, G, dv) and `logits` (B, H, G, C) of one token, as `_kernels_numba.attend`.

    Queries come turned, and `out` is turned; `groups` are the channels per scale of keys and of values.
    """
    _, heads, group, d = query.shape
    slots, width = logits.shape[3], out.shape[3]
    weights, two = np.empty((group, slots), np.float32), np.empty(slots, np.float32)
    q, shares = np.empty((group, d), np.float32), np.empty(group, np.float32)
    bits = np.empty(max(d, width), np.int32)
    some_keys, some_values = np.empty((_BLOCK, d), np.float32), np.empty((_BLOCK, width), np.float32)
    for pair in range(first, end):
        b, h = divmod(pair, heads)
        q[:] = query[b, h]
        q *= scale
        x, at = logits[b, h], b * key_steps[0] + h * key_steps[1]
        for c in range(0, slots, _BLOCK):
            stop = min(c + _BLOCK, slots)
            block = some_keys[: stop - c]
            _decode(keys, at + c * key_steps[2], key_steps[2], kind, groups[0], bits, block)
            _dots(q, block, 0, 1, x[:, c:stop])
        _bend(x, pos[b, h], query_pos[b], softcap, slopes[h * group :])
        o, at = out[b, h], b * value_steps[0] + h * value_steps[1]
        o[:] = _ZERO
        _weigh(x, sinks[h * group :], weights, two, shares)
        for c in range(0, slots, _BLOCK):
            stop = min(c + _BLOCK, slots)
            block = some_values[: stop - c]
            _decode(values, at + c * value_steps[2], value_steps[2], kind, groups[1], bits, block)
            _sum_rows(weights[:, c:stop], block, 0, 1, pos[b, h, c:stop], o)
        for g in range(group):
            o[g] *= shares[g]
