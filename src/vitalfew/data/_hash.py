"""Kernels that turn values into 64-bit keys: a bijective mix for numbers, XXH64 for text."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["cross_into", "hash_strings", "mix", "mix_integers", "scale"]

Words = npt.NDArray[np.uint64]

# Numba turns a sum of an unsigned and a signed number into a float, so every constant is unsigned.
_P1 = np.uint64(0x9E3779B185EBCA87)
_P2 = np.uint64(0xC2B2AE3D27D4EB4F)
_P3 = np.uint64(0x165667B19E3779F9)
_P4 = np.uint64(0x85EBCA77C2B2AE63)
_P5 = np.uint64(0x27D4EB2F165667C5)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_0, _1, _2, _3, _4, _7, _8 = (np.uint64(i) for i in (0, 1, 2, 3, 4, 7, 8))
_16, _24, _32, _64 = (np.uint64(i) for i in (16, 24, 32, 64))
_LOW = np.uint64(0xFFFFFFFF)


@njit(cache=True, nogil=True)
def mix(x: np.uint64) -> np.uint64:
    """Scramble 64 bits, one to one (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * _M1
    x = (x ^ (x >> np.uint64(27))) * _M2
    return x ^ (x >> np.uint64(31))


@njit(cache=True, nogil=True)
def mix_integers(values: Words, seed: np.uint64) -> Words:
    """Scramble each value, one to one."""
    salt = mix(seed + _P1)
    out = np.empty(values.size, np.uint64)
    for i in range(values.size):
        out[i] = mix(values[i] ^ salt)
    return out


@njit(cache=True, nogil=True)
def cross_into(crossed: Words, part: Words) -> None:
    """Fold one more part into the keys of a combination."""
    for i in range(crossed.size):
        crossed[i] = mix(crossed[i] * _P1 + part[i] + _P3)


@njit(cache=True, nogil=True)
def scale(values: Words, limit: np.uint64, seed: np.uint64) -> npt.NDArray[np.int64]:
    """Spread keys evenly over 0 to limit - 1: the high half of a product of 128 bits."""
    salt = mix(seed + _P2)
    low_limit, high_limit = limit & _LOW, limit >> _32
    out = np.empty(values.size, np.int64)
    for i in range(values.size):
        x = mix(values[i] ^ salt)
        low, high = x & _LOW, x >> _32
        middle = high * low_limit + ((low * low_limit) >> _32)
        carry = (middle & _LOW) + low * high_limit
        out[i] = np.int64(high * high_limit + (middle >> _32) + (carry >> _32))
    return out


@njit(cache=True, nogil=True)
def _rotate(x: np.uint64, bits: np.uint64) -> np.uint64:
    return (x << bits) | (x >> (_64 - bits))


@njit(cache=True, nogil=True)
def _word4(data: npt.NDArray[np.uint8], at: np.uint64) -> np.uint64:
    return (
        np.uint64(data[at])
        | np.uint64(data[at + _1]) << _8
        | np.uint64(data[at + _2]) << _16
        | np.uint64(data[at + _3]) << _24
    )


@njit(cache=True, nogil=True)
def _word8(data: npt.NDArray[np.uint8], at: np.uint64) -> np.uint64:
    word: np.uint64 = _word4(data, at) | _word4(data, at + _4) << _32
    return word


@njit(cache=True, nogil=True)
def _round(lane: np.uint64, word: np.uint64) -> np.uint64:
    turned: np.uint64 = _rotate(lane + word * _P2, np.uint64(31))
    return turned * _P1


@njit(cache=True, nogil=True)
def _merge(x: np.uint64, lane: np.uint64) -> np.uint64:
    word: np.uint64 = _round(_0, lane)
    return (x ^ word) * _P1 + _P4


@njit(cache=True, nogil=True)
def _xxh64(data: npt.NDArray[np.uint8], at: np.uint64, end: np.uint64, seed: np.uint64) -> np.uint64:
    x: np.uint64
    length = end - at
    if length >= _32:
        a, b, c, d = seed + _P1 + _P2, seed + _P2, seed, seed - _P1
        while at + _32 <= end:
            a = _round(a, _word8(data, at))
            b = _round(b, _word8(data, at + _8))
            c = _round(c, _word8(data, at + _16))
            d = _round(d, _word8(data, at + _24))
            at += _32
        x = _rotate(a, _1) + _rotate(b, _7) + _rotate(c, np.uint64(12)) + _rotate(d, np.uint64(18))
        x = _merge(_merge(_merge(_merge(x, a), b), c), d)
    else:
        x = seed + _P5
    x += length
    while at + _8 <= end:
        x = _rotate(x ^ _round(_0, _word8(data, at)), np.uint64(27)) * _P1 + _P4
        at += _8
    if at + _4 <= end:
        x = _rotate(x ^ (_word4(data, at) * _P1), np.uint64(23)) * _P2 + _P3
        at += _4
    while at < end:
        x = _rotate(x ^ (np.uint64(data[at]) * _P5), np.uint64(11)) * _P1
        at += _1
    x = (x ^ (x >> np.uint64(33))) * _P2
    x = (x ^ (x >> np.uint64(29))) * _P3
    return x ^ (x >> _32)


@njit(cache=True, nogil=True)
def hash_strings(offsets: npt.NDArray[np.int64], data: npt.NDArray[np.uint8], seed: np.uint64) -> Words:
    """XXH64 of each text of an Arrow array: text i lies at offsets[i] to offsets[i + 1] of the data."""
    out = np.empty(offsets.size - 1, np.uint64)
    for i in range(out.size):
        out[i] = _xxh64(data, np.uint64(offsets[i]), np.uint64(offsets[i + 1]), seed)
    return out
