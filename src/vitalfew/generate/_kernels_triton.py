# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, import-untyped, import-not-found"
# What stands under @triton.jit is Triton's language, to which Python's types do not apply.

"""One token over slots on a GPU; `_kernels_reference` says what each function means.

B rows, H KV heads, G query heads per KV head, C slots, d head size. The slots of a head are shared out among programs,
a "split" each, whose partial results a second, small kernel puts together. A block of keys is loaded once for all
query heads. There are no atomics and the host is never waited for, so that a step can be captured and is repeatable.

Noise is taken from the pool that the CPU has too, in the device's memory, where its 256 KiB stay in the cache: a
generator in the kernel would save these loads, but then a text would depend on the device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from vitalfew.generate.noise import POOL, Noise, gumbel_table

__all__ = ["attend", "vote_and_mark", "write"]

_MASK: tl.constexpr = tl.constexpr(POOL - 1)
_FAR: tl.constexpr = tl.constexpr(2**31 - 1)
_MOST_SPLITS = 64
_TILE = 1024
"""Logits of one query head that a voting program works on at a time."""


@triton.jit
def _bent(x, softcap, slopes, at, here, CAPPED: tl.constexpr, SLOPED: tl.constexpr):
    """Cap and bias scaled logits; slopes stand along the lines, positions of keys along the columns."""
    if CAPPED:
        x = softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)
    if SLOPED:
        x += slopes * (at - here).to(tl.float32)
    return x


@triton.jit
def _attend(
    query, keys, values, pos, query_pos, slopes, logits, top, total, part,
    q_row, q_head, k_row, k_head, k_slot, v_row, v_head, v_slot, p_row, p_head, slots, chunk, scale, softcap,
    CAPPED: tl.constexpr, SLOPED: tl.constexpr, GROUP: tl.constexpr, LINES: tl.constexpr, DIM: tl.constexpr,
    WIDE: tl.constexpr, OUT: tl.constexpr, OUT_WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    heads = tl.num_programs(1)
    g, d, w = tl.arange(0, LINES), tl.arange(0, WIDE), tl.arange(0, OUT_WIDE)
    mine = head * GROUP + g
    q = tl.load(
        query + row * q_row + mine[:, None] * q_head + d[None, :],
        mask=(g < GROUP)[:, None] & (d < DIM)[None, :], other=0.0,
    )  # fmt: skip
    here = tl.load(query_pos + row).to(tl.int32)
    bias = tl.load(slopes + mine, mask=g < GROUP, other=0.0)[:, None] if SLOPED else 0.0
    keys += row * k_row + head * k_head
    values += row * v_row + head * v_head
    pos += row * p_row + head * p_head
    line = (row * heads + head) * GROUP + g
    high = tl.full([LINES], float("-inf"), tl.float32)
    whole = tl.zeros([LINES], tl.float32)
    out = tl.zeros([LINES, OUT_WIDE], tl.float32)
    end = tl.minimum((split + 1) * chunk, slots)
    for start in range(split * chunk, end, BLOCK):
        c = start + tl.arange(0, BLOCK)
        at = tl.load(pos + c, mask=c < end, other=-1)
        live = at >= 0
        # What an empty slot holds, which may be no number, is not loaded.
        k = tl.load(keys + c[:, None] * k_slot + d[None, :], mask=live[:, None] & (d < DIM)[None, :], other=0.0)
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        x = _bent(x, softcap, bias, at[None, :], here, CAPPED, SLOPED)
        x = tl.where(live[None, :], x, float("-inf"))
        tl.store(logits + line[:, None] * slots + c[None, :], x, mask=(g < GROUP)[:, None] & (c < end)[None, :])
        new = tl.maximum(high, tl.max(x, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp(x - base[:, None])
        fade = tl.exp(high - base)
        v = tl.load(values + c[:, None] * v_slot + w[None, :], mask=live[:, None] & (w < OUT)[None, :], other=0.0)
        whole = whole * fade + tl.sum(p, 1)
        out = out * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        high = new
    place = ((row * heads + head) * tl.num_programs(2) + split) * GROUP + g
    tl.store(top + place, high, mask=g < GROUP)
    tl.store(total + place, whole, mask=g < GROUP)
    tl.store(part + place[:, None] * OUT + w[None, :], out, mask=(g < GROUP)[:, None] & (w < OUT)[None, :])


@triton.jit
def _combine(
    top, total, part, sinks, out, splits, heads,
    SINKS: tl.constexpr, GROUP: tl.constexpr, OUT: tl.constexpr, OUT_WIDE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    pair, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s, w = tl.arange(0, SPLITS), tl.arange(0, OUT_WIDE)
    place = (pair * splits + s) * GROUP + g
    tops = tl.load(top + place, mask=s < splits, other=float("-inf"))
    high = tl.max(tops, 0)
    sink = float("-inf")
    if SINKS:
        sink = tl.load(sinks + (pair % heads) * GROUP + g)
        high = tl.maximum(high, sink)
    high = tl.where(high == float("-inf"), 0.0, high)
    share = tl.exp(tops - high)
    whole = tl.sum(share * tl.load(total + place, mask=s < splits, other=0.0), 0)
    if SINKS:
        whole += tl.exp(sink - high)
    parts = tl.load(
        part + place[:, None] * OUT + w[None, :], mask=(s < splits)[:, None] & (w < OUT)[None, :], other=0.0
    )
    result = tl.sum(share[:, None] * parts, 0) / tl.where(whole > 0.0, whole, 1.0)
    tl.store(out + (pair * GROUP + g) * OUT + w, result.to(out.dtype.element_ty), mask=w < OUT)


@triton.jit
def _mix(x):
    """Mix 32 bits, as `noise` does."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _starts(key, head, pos):
    """Return where in the pool the rows of queries start, as `Noise.starts` does."""
    return _mix(_mix(key.to(tl.uint32) + head.to(tl.uint32) * 0x9E3779B9) ^ pos.to(tl.uint32))


@triton.jit
def _cooled(
    logits, pos, gumbel, start, c, end, slots, cool, line, NOISY: tl.constexpr, GROUP: tl.constexpr, LINES: tl.constexpr
):
    """Return logits with noise over temperature, for all query heads of a KV head, and positions."""
    g = tl.arange(0, LINES)
    at = tl.load(pos + c, mask=c < end, other=-1)
    mask = (g < GROUP)[:, None] & (at >= 0)[None, :]
    y = tl.load(logits + line[:, None] * slots + c[None, :], mask=mask, other=float("-inf"))
    if NOISY:
        y += tl.load(gumbel + ((start[:, None] + at[None, :].to(tl.uint32)) & _MASK).to(tl.int32), mask=mask, other=0.0)
    return y * cool, at


@triton.jit(do_not_specialize=["key"])
def _ballot(
    logits, pos, query_pos, gumbel, key, cool, cools, top, total, p_row, p_head, heads, slots, chunk,
    NOISY: tl.constexpr, COOLS: tl.constexpr, GROUP: tl.constexpr, LINES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sum the exponentials of a split, from their largest."""
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = pair // heads, pair % heads
    g = tl.arange(0, LINES)
    if COOLS:
        cool = 1.0 / tl.load(cools + row)
    start = _starts(key, head * GROUP + g, tl.load(query_pos + row))
    pos += row * p_row + head * p_head
    high = tl.full([LINES], float("-inf"), tl.float32)
    whole = tl.zeros([LINES], tl.float32)
    end = tl.minimum((split + 1) * chunk, slots)
    for first in range(split * chunk, end, TILE):
        c = first + tl.arange(0, TILE)
        y, _ = _cooled(logits, pos, gumbel, start, c, end, slots, cool, pair * GROUP + g, NOISY, GROUP, LINES)
        new = tl.maximum(high, tl.max(y, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        whole = whole * tl.exp(high - base) + tl.sum(tl.exp(y - base[:, None]), 1)
        high = new
    place = (pair * tl.num_programs(1) + split) * GROUP + g
    tl.store(top + place, high, mask=g < GROUP)
    tl.store(total + place, whole, mask=g < GROUP)


@triton.jit
def _pick(rank, score, at, slot):
    """Return what goes first: the lowest rank, of these the lowest score, of these the oldest."""
    low = tl.min(rank, 0)
    least = tl.min(tl.where(rank == low, score, float("inf")), 0)
    same = (rank == low) & (score == least)
    oldest = tl.min(tl.where(same, at, _FAR), 0)
    return low, least, oldest, tl.min(tl.where(same & (at == oldest), slot, _FAR), 0)


@triton.jit(do_not_specialize=["key"])
def _vote(
    score, logits, pos, query_pos, gumbel, key, cool, cools, recent, recents, top, total, ranks, scores, ages, picks,
    s_row, s_head, p_row, p_head, heads, slots, chunk,
    NOISY: tl.constexpr, COOLS: tl.constexpr, WINDOWS: tl.constexpr, GROUP: tl.constexpr, LINES: tl.constexpr,
    SPLITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add a split's votes to its scores, and find what goes first of it."""
    pair, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row, head = pair // heads, pair % heads
    g, s = tl.arange(0, LINES), tl.arange(0, SPLITS)
    if COOLS:
        cool = 1.0 / tl.load(cools + row)
    if WINDOWS:
        recent = tl.load(recents + row).to(tl.int32)
    here = tl.load(query_pos + row)
    start = _starts(key, head * GROUP + g, here)
    # The newest token in a slot is the one that votes, and the next one takes a place of the window.
    limit = here.to(tl.int32) + 1 - tl.maximum(recent, 1)
    score += row * s_row + head * s_head
    pos += row * p_row + head * p_head
    place = (pair * splits + s)[:, None] * GROUP + g[None, :]
    inside = (s < splits)[:, None] & (g < GROUP)[None, :]
    tops = tl.load(top + place, mask=inside, other=float("-inf"))
    high = tl.max(tops, 0)
    high = tl.where(high == float("-inf"), 0.0, high)
    whole = tl.sum(tl.exp(tops - high[None, :]) * tl.load(total + place, mask=inside, other=0.0), 0)
    share = 1.0 / (GROUP * tl.where(whole > 0.0, whole, 1.0))
    best_rank = tl.full([TILE], 3, tl.int32)
    best_score = tl.full([TILE], float("inf"), tl.float32)
    best_at, best_slot = tl.full([TILE], _FAR, tl.int32), tl.full([TILE], _FAR, tl.int32)
    end = tl.minimum((split + 1) * chunk, slots)
    for first in range(split * chunk, end, TILE):
        c = first + tl.arange(0, TILE)
        y, at = _cooled(logits, pos, gumbel, start, c, end, slots, cool, pair * GROUP + g, NOISY, GROUP, LINES)
        live = at >= 0
        own = tl.load(score + c, mask=live, other=0.0) + tl.sum(tl.exp(y - high[:, None]) * share[:, None], 0)
        tl.store(score + c, own, mask=live)
        # Outside the window; else what is not at infinity; else anything that lives.
        loose = own < float("inf")
        rank = tl.where(loose & (at <= limit), 0, tl.where(loose, 1, 2))
        rank = tl.where(live, rank, 3)
        own = tl.where(rank == 0, own, 0.0)
        sooner = (own < best_score) | ((own == best_score) & (at < best_at))
        better = (rank < best_rank) | ((rank == best_rank) & sooner)
        best_rank, best_score = tl.where(better, rank, best_rank), tl.where(better, own, best_score)
        best_at, best_slot = tl.where(better, at, best_at), tl.where(better, c, best_slot)
    low, least, oldest, slot = _pick(best_rank, best_score, best_at, best_slot)
    one = pair * splits + split
    tl.store(ranks + one, low)
    tl.store(scores + one, least)
    tl.store(ages + one, oldest)
    tl.store(picks + one, slot)


@triton.jit
def _mark(ranks, scores, ages, picks, marked, splits, SPLITS: tl.constexpr):
    pair, s = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS)
    place, inside = pair * splits + s, s < splits
    rank = tl.load(ranks + place, mask=inside, other=3)
    score = tl.load(scores + place, mask=inside, other=float("inf"))
    at, slot = tl.load(ages + place, mask=inside, other=_FAR), tl.load(picks + place, mask=inside, other=_FAR)
    _, _, _, chosen = _pick(rank, score, at, slot)
    tl.store(marked + pair, chosen.to(tl.int64))


@triton.jit
def _write(
    keys, values, pos, score, marked, key, value, new_pos, k_row, k_head, k_slot, v_row, v_head, v_slot,
    p_row, p_head, s_row, s_head, n_row, n_head, m_row, m_head,
    DIM: tl.constexpr, WIDE: tl.constexpr, OUT: tl.constexpr, OUT_WIDE: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(marked + row * tl.num_programs(1) + head)
    d, w = tl.arange(0, WIDE), tl.arange(0, OUT_WIDE)
    k = tl.load(key + row * n_row + head * n_head + d, mask=d < DIM)
    v = tl.load(value + row * m_row + head * m_head + w, mask=w < OUT)
    tl.store(keys + row * k_row + head * k_head + slot * k_slot + d, k, mask=d < DIM)
    tl.store(values + row * v_row + head * v_head + slot * v_slot + w, v, mask=w < OUT)
    tl.store(pos + row * p_row + head * p_head + slot, tl.load(new_pos + row).to(tl.int32))
    tl.store(score + row * s_row + head * s_head + slot, 0.0)


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def _shares(slots: int, pairs: int, block: int, device: torch.device) -> tuple[int, int]:
    """Return how many programs share the slots of a head, and how many slots each has."""
    wanted = max(1, min(_MOST_SPLITS, -(-4 * _processors(device) // pairs)))
    chunk = -(-slots // wanted)
    chunk += -chunk % block
    return -(-slots // chunk), chunk


def _inner(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def widths(keys: torch.Tensor, values: torch.Tensor) -> dict[str, int]:
    """Return the sizes of a head, and the powers of two that cover them."""
    dim, out = keys.shape[-1], values.shape[-1]
    wide, out_wide = (max(16, triton.next_power_of_2(size)) for size in (dim, out))
    return {"DIM": dim, "WIDE": wide, "OUT": out, "OUT_WIDE": out_wide}


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pos: torch.Tensor, query_pos: torch.Tensor,
    scale: float, softcap: float | None, slopes: torch.Tensor | None, sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return attention ``(B, H, G, d)`` in the dtype of the query, and logits ``(B, H, G, C)`` in float32."""
    rows, heads, group, _ = query.shape
    slots, shape = keys.shape[2], widths(keys, values)
    query, keys, values, pos = (_inner(each) for each in (query.flatten(1, 2), keys, values, pos))
    block = 64 if max(shape["WIDE"], shape["OUT_WIDE"]) * keys.element_size() <= 256 else 32
    splits, chunk = _shares(slots, rows * heads, block, query.device)
    logits = torch.empty((rows, heads, group, slots), dtype=torch.float32, device=query.device)
    top, total = torch.empty((2, rows, heads, splits, group), dtype=torch.float32, device=query.device)
    part = torch.empty((rows, heads, splits, group, shape["OUT"]), dtype=torch.float32, device=query.device)
    out = torch.empty((rows, heads, group, shape["OUT"]), dtype=query.dtype, device=query.device)
    with torch.cuda.device_of(query):
        _attend[(rows, heads, splits)](
            query, keys, values, pos, query_pos, logits if slopes is None else slopes.float(), logits, top, total, part,
            *query.stride()[:2], *keys.stride()[:3], *values.stride()[:3], *pos.stride()[:2], slots, chunk,
            float(scale), float(softcap or 0.0), CAPPED=softcap is not None, SLOPED=slopes is not None, GROUP=group,
            LINES=triton.next_power_of_2(group), **shape, BLOCK=block, num_warps=4, num_stages=3,
        )  # fmt: skip
        _combine[(rows * heads, group)](
            top, total, part, top if sinks is None else sinks.float(), out, splits, heads, SINKS=sinks is not None,
            GROUP=group, OUT=shape["OUT"], OUT_WIDE=shape["OUT_WIDE"], SPLITS=triton.next_power_of_2(splits),
        )  # fmt: skip
    return out, logits


def vote_and_mark(
    score: torch.Tensor, logits: torch.Tensor, tau: torch.Tensor | float, noise: Noise | None, pos: torch.Tensor,
    query_pos: torch.Tensor, recent: torch.Tensor | int,
) -> torch.Tensor:  # fmt: skip
    """Add the votes to the scores in place, and return the slot that goes next, ``(B, H)``."""
    rows, heads, group, slots = logits.shape
    device = logits.device
    lines = triton.next_power_of_2(group)
    tile = max(64, _TILE // lines)
    splits, chunk = _shares(slots, rows * heads, tile, device)
    top, total = torch.empty((2, rows, heads, splits, group), dtype=torch.float32, device=device)
    scores = torch.empty((rows, heads, splits), dtype=torch.float32, device=device)
    ranks, ages, picks = torch.empty((3, rows, heads, splits), dtype=torch.int32, device=device)
    marked = torch.empty((rows, heads), dtype=torch.int64, device=device)
    table = logits if noise is None else gumbel_table(noise.seed, device)
    key = 0 if noise is None else noise.key - (noise.key >> 31 << 32)
    cool, cools = (0.0, tau) if isinstance(tau, torch.Tensor) else (1 / tau, logits)
    window, windows = (0, recent) if isinstance(recent, torch.Tensor) else (recent, logits)
    sizes: dict[str, Any] = {
        "NOISY": noise is not None, "COOLS": cools is tau, "GROUP": group, "LINES": lines, "TILE": tile, "num_warps": 4
    }  # fmt: skip
    pos, width = _inner(pos), triton.next_power_of_2(splits)
    with torch.cuda.device_of(logits):
        _ballot[(rows * heads, splits)](
            logits, pos, query_pos, table, key, cool, cools, top, total, *pos.stride()[:2], heads, slots, chunk, **sizes
        )
        _vote[(rows * heads, splits)](
            score, logits, pos, query_pos, table, key, cool, cools, window, windows, top, total, ranks, scores, ages,
            picks, *score.stride()[:2], *pos.stride()[:2], heads, slots, chunk, WINDOWS=windows is recent,
            SPLITS=width, **sizes,
        )  # fmt: skip
        _mark[(rows * heads,)](ranks, scores, ages, picks, marked, splits, SPLITS=width)
    return marked


def write(
    keys: torch.Tensor, values: torch.Tensor, pos: torch.Tensor, score: torch.Tensor, marked: torch.Tensor,
    key: torch.Tensor, value: torch.Tensor, new_pos: torch.Tensor,
) -> None:  # fmt: skip
    """Put one token per row, ``(B, H, d)`` at positions ``(B,)``, into the marked slots ``(B, H)``."""
    key, value = _inner(key), _inner(value)
    with torch.cuda.device_of(keys):
        _write[tuple(key.shape[:2])](
            keys, values, pos, score, marked, key, value, new_pos, *keys.stride()[:3], *values.stride()[:3],
            *pos.stride()[:2], *score.stride()[:2], *key.stride()[:2], *value.stride()[:2], **widths(keys, values),
        )  # fmt: skip
