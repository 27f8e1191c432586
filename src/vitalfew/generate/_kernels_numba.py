# mypy: disable-error-code="assignment"
# A variable of a kernel has one machine type, which numba infers; mypy sees the widest of several.

"""One token over slots on a CPU: keys and values are read once for all query heads of a KV head.

B rows, H KV heads, G query heads per KV head, C slots, d head size. Keys and values come as tables of rows of d
numbers, with the steps between rows, heads and slots counted in such rows, so that slots in a larger memory and a
model's own layout are read in place. Each kernel has a plain twin in `_kernels_reference`, to which the tests compare.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from vitalfew.generate._prefetch import ask_for_rows

# Sums may be reordered, so that they run in vectors; infinity stays what it is.
_LOOSE = {"reassoc", "contract", "nsz", "arcp"}
_LOG2E = np.float32(1.4426950408889634)
_LOWEST = np.float32(-125.0)
_HALF = np.float32(0.5)
_C1, _C2, _C3 = np.float32(0.6931471805599453), np.float32(0.2402265069591007), np.float32(0.0555041086648216)
_C4, _C5, _C6 = np.float32(0.0096181291076285), np.float32(0.0013333558146428), np.float32(0.0001540353039338)
_ONE, _ZERO = np.float32(1.0), np.float32(0.0)
_AHEAD = 8
"""Rows between the one that is asked for and the one that is read: tried from 8 to 64, on one kind of machine."""


@njit(inline="always", fastmath=_LOOSE)
def _exp(x: Any, shift: Any, two: Any) -> Any:
    """Replace x by exp(x - shift), to 2e-7 near 1 and 1e-6 far below, and return the sum; at least 2**-125.

    The standard library's exp takes one number at a time. Here 2**v is 2**round(v), made of bits, times a polynomial.
    """
    bits = two.view(np.int32)
    for j in range(len(x)):
        v = (x[j] - shift) * _LOG2E
        v = v if v > _LOWEST else _LOWEST  # noqa: FURB136 - max would mind what is no number
        n = np.float32(np.floor(v + _HALF))
        f = v - n
        bits[j] = (np.int32(n) + np.int32(127)) << np.int32(23)
        x[j] = _ONE + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    total = _ZERO
    for j in range(len(x)):
        x[j] *= two[j]
        total += x[j]
    return total


@njit(inline="always", fastmath=_LOOSE)
def _highest(x: Any) -> Any:
    """Return the largest number, and 0 where there is none above minus infinity."""
    top = np.float32(-np.inf)
    for j in range(len(x)):
        top = x[j] if x[j] > top else top  # noqa: FURB136
    return top if top > np.float32(-np.inf) else _ZERO


@njit(inline="always", fastmath=_LOOSE)
def _add(out: Any, weights: Any, slot: Any, row: Any) -> None:
    for g in range(out.shape[0]):
        w = weights[g, slot]
        for j in range(out.shape[1]):
            out[g, j] += w * row[j]


@njit(inline="always", fastmath=_LOOSE)
def _dots(q: Any, table: Any, at: Any, step: Any, x: Any) -> None:
    """Fill x (G, C) with the products of queries and rows of a table, four rows at a time."""
    slots = x.shape[1]
    whole, last = slots - slots % 4, at + (slots - 1) * step
    for c in range(0, whole, 4):
        ask_for_rows(table, at + (c + _AHEAD) * step, step, 4, last)
        r0, r1 = table[at + c * step], table[at + (c + 1) * step]
        r2, r3 = table[at + (c + 2) * step], table[at + (c + 3) * step]
        for g in range(q.shape[0]):
            d0 = d1 = d2 = d3 = _ZERO
            for j in range(q.shape[1]):
                d0 += q[g, j] * r0[j]
                d1 += q[g, j] * r1[j]
                d2 += q[g, j] * r2[j]
                d3 += q[g, j] * r3[j]
            x[g, c], x[g, c + 1], x[g, c + 2], x[g, c + 3] = d0, d1, d2, d3
    for c in range(whole, slots):
        row = table[at + c * step]
        for g in range(q.shape[0]):
            dot = _ZERO
            for j in range(q.shape[1]):
                dot += q[g, j] * row[j]
            x[g, c] = dot


@njit(inline="always", fastmath=_LOOSE)
def _sum_rows(weights: Any, table: Any, at: Any, step: Any, pos: Any, out: Any) -> None:
    """Add to `out` (G, d) the rows of a table, weighted; an empty slot may hold anything, also what is no number."""
    slots = len(pos)
    whole, last = slots - slots % 4, at + (slots - 1) * step
    for c in range(0, whole, 4):
        ask_for_rows(table, at + (c + _AHEAD) * step, step, 4, last)
        if pos[c] < 0 or pos[c + 1] < 0 or pos[c + 2] < 0 or pos[c + 3] < 0:
            for k in range(c, c + 4):
                if pos[k] >= 0:
                    _add(out, weights, k, table[at + k * step])
            continue
        r0, r1 = table[at + c * step], table[at + (c + 1) * step]
        r2, r3 = table[at + (c + 2) * step], table[at + (c + 3) * step]
        for g in range(out.shape[0]):
            w0, w1, w2, w3 = weights[g, c], weights[g, c + 1], weights[g, c + 2], weights[g, c + 3]
            for j in range(out.shape[1]):
                out[g, j] += w0 * r0[j] + w1 * r1[j] + w2 * r2[j] + w3 * r3[j]
    for c in range(whole, slots):
        if pos[c] >= 0:
            _add(out, weights, c, table[at + c * step])


@njit(inline="always", fastmath=_LOOSE)
def _bend(x: Any, pos: Any, query_pos: Any, softcap: Any, slopes: Any) -> None:
    """Cap, bias and mask the scaled logits (G, C) of a KV head."""
    group, slots = x.shape
    if softcap > 0:
        for g in range(group):
            for c in range(slots):
                x[g, c] = softcap * math.tanh(x[g, c] / softcap)
    if len(slopes):
        for g in range(group):
            for c in range(slots):
                x[g, c] += slopes[g] * np.float32(pos[c] - query_pos)
    for c in range(slots):
        if pos[c] < 0:
            x[:, c] = -np.inf


@njit(inline="always", fastmath=_LOOSE)
def _weigh(x: Any, sinks: Any, weights: Any, two: Any, shares: Any) -> None:
    """Fill `weights` (G, C) with what is in proportion to the softmax of x, and `shares` (G) with the factors."""
    weights[:] = x
    for g in range(x.shape[0]):
        top = _highest(x[g])
        total = _exp(weights[g], top, two)
        if len(sinks):
            total += np.float32(math.exp(sinks[g] - top))
        shares[g] = _ONE / total


@njit(nogil=True, cache=True, fastmath=_LOOSE)
def attend(
    query: Any, keys: Any, key_steps: Any, values: Any, value_steps: Any, pos: Any, query_pos: Any, scale: Any,
    softcap: Any, slopes: Any, sinks: Any, out: Any, logits: Any, first: Any, end: Any,
) -> None:  # fmt: skip
    """Fill `out` (B, H, G, d) and `logits` (B, H, G, C) of one token; `softcap` 0 and empty arrays mean none.

    Of the pairs of a row and a head, counted row by row, those from `first` to `end` are done.
    """
    _, heads, group, d = query.shape
    slots = logits.shape[3]
    weights, two = np.empty((group, slots), np.float32), np.empty(slots, np.float32)
    q, shares = np.empty((group, d), np.float32), np.empty(group, np.float32)
    for pair in range(first, end):
        b, h = divmod(pair, heads)
        q[:] = query[b, h]
        q *= scale
        x = logits[b, h]
        _dots(q, keys, b * key_steps[0] + h * key_steps[1], key_steps[2], x)
        _bend(x, pos[b, h], query_pos[b], softcap, slopes[h * group :])
        o = out[b, h]
        o[:] = _ZERO
        _weigh(x, sinks[h * group :], weights, two, shares)
        _sum_rows(weights, values, b * value_steps[0] + h * value_steps[1], value_steps[2], pos[b, h], o)
        for g in range(group):
            o[g] *= shares[g]


@njit(inline="always")
def _mix(x: Any) -> Any:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


@njit(inline="always")
def _start(key: Any, head: Any, pos: Any) -> Any:
    """Return `noise.hashed` of a head and a position."""
    return _mix(_mix((key + head * 0x9E3779B9) & 0xFFFFFFFF) ^ np.int64(pos))


@njit(nogil=True, cache=True, fastmath=_LOOSE)
def vote_and_mark(
    score: Any, logits: Any, tau: Any, gumbel: Any, key: Any, pos: Any, query_pos: Any, recent: Any, marked: Any,
    first: Any, end: Any,
) -> None:  # fmt: skip
    """Add the votes of one token to `score` (B, H, C) and fill `marked` (B, H); an empty `gumbel` means no noise.

    `key` is the noise's; `tau` and `recent` hold one for each row, or one for all; `first` and `end` as in `attend`.
    """
    _, heads, group, slots = logits.shape
    mask = len(gumbel) - 1
    y, two, votes = np.empty(slots, np.float32), np.empty(slots, np.float32), np.empty(slots, np.float32)
    for pair in range(first, end):
        b, h = divmod(pair, heads)
        cooler, at = _ONE / tau[b % len(tau)], pos[b, h]
        votes[:] = _ZERO
        for g in range(group):
            x = logits[b, h, g]
            if len(gumbel):
                start = _start(key, h * group + g, query_pos[b])
                for c in range(slots):
                    y[c] = (x[c] + gumbel[(start + at[c]) & mask]) * cooler
            else:
                for c in range(slots):
                    y[c] = x[c] * cooler
            share = _ONE / (_exp(y, _highest(y), two) * np.float32(group))
            for c in range(slots):
                votes[c] += y[c] * share
        own = score[b, h]
        for c in range(slots):
            own[c] += votes[c]
        marked[b, h] = _next(own, at, recent[b % len(recent)])


@njit(nogil=True, cache=True)
def swap(
    keys: Any, key_steps: Any, values: Any, value_steps: Any, pos: Any, score: Any, slot: Any, key: Any, value: Any,
    at: Any, old_keys: Any, old_values: Any, old_pos: Any,
) -> None:  # fmt: skip
    """Put a token per row, at positions `at` (B), into slots (B, H) with a score of 0; what lay there becomes old."""
    for b in range(slot.shape[0]):
        for h in range(slot.shape[1]):
            c = slot[b, h]
            mine = keys[b * key_steps[0] + h * key_steps[1] + c * key_steps[2]]
            for j in range(len(mine)):
                old_keys[b, h, 0, j], mine[j] = mine[j], key[b, h, j]
            mine = values[b * value_steps[0] + h * value_steps[1] + c * value_steps[2]]
            for j in range(len(mine)):
                old_values[b, h, 0, j], mine[j] = mine[j], value[b, h, j]
            old_pos[b, h, 0], pos[b, h, c] = pos[b, h, c], at[b]
            score[b, h, c] = _ZERO


@njit(nogil=True, cache=True)
def mark(score: Any, pos: Any, recent: Any, marked: Any) -> None:
    """Fill `marked` (B, H) as `select.next_slot` does; `recent` holds one for each row, or one for all."""
    for b in range(pos.shape[0]):
        for h in range(pos.shape[1]):
            marked[b, h] = _next(score[b, h], pos[b, h], recent[b % len(recent)])


@njit(inline="always")
def _next(score: Any, pos: Any, recent: Any) -> Any:
    """Choose as `select.next_slot` does, for one row and head."""
    last = -1
    for c in range(len(pos)):
        last = max(last, pos[c])
    limit = last + 1 - recent if recent > 1 else last
    best, low = -1, np.float32(np.inf)
    spare, any_slot = -1, -1
    for c in range(len(pos)):
        p, s = pos[c], score[c]
        if p < 0:
            continue
        if p <= limit:
            if s < low or (s == low and best >= 0 and p < pos[best]):
                best, low = c, s
        elif s < np.float32(np.inf) and (spare < 0 or p < pos[spare]):
            spare = c
        if any_slot < 0 or p < pos[any_slot]:
            any_slot = c
    if best >= 0:
        return best
    return spare if spare >= 0 else any_slot


@njit(nogil=True, cache=True, fastmath=_LOOSE)
def add_noise(
    weights: Any, draws: Any, starts: Any, power: Any, voices: Any, shares: Any, first: Any, end: Any
) -> None:  # fmt: skip
    """Put noise on the queries from `first` to `end` of weights (n, m), and fill `shares` (n): the weight of a vote.

    `draws` are one over the pool's, repeated, so that a row is one piece; `voices` says how much each query counts.
    """
    for i in range(first, end):
        shares[i] = _ZERO
        if voices[i] == 0:
            continue
        row, noise = weights[i], draws[starts[i] : starts[i] + weights.shape[1]]
        total = _ZERO
        if power == 1:
            for j in range(len(row)):
                row[j] *= noise[j]
                total += row[j]
        else:
            for j in range(len(row)):
                row[j] = (row[j] * noise[j]) ** power
                total += row[j]
        shares[i] = voices[i] / total


@njit(nogil=True, cache=True, fastmath=_LOOSE)
def add_votes(weights: Any, shares: Any, cast: Any, first: Any, end: Any) -> None:
    """Add to the keys from `first` to `end` of `cast` (m) the votes of a block's queries."""
    some = cast[first:end]
    for i in range(weights.shape[0]):
        if shares[i] == 0:
            continue
        row, share = weights[i, first:end], shares[i]
        for j in range(len(row)):
            some[j] += row[j] * share
