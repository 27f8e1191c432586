# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, import-untyped, import-not-found"
# What stands under @triton.jit is Triton's language, to which Python's types do not apply.

"""Votes of one token over slots on a GPU, and the slot that goes next; `_kernels_reference` says what they mean.

As in `_kernels_triton`, the slots of a head are shared out among programs: the first kernel sums up what votes are
divided by, the second adds them to the scores and finds what goes first of its share, the third chooses among these.

Noise is taken from the pool that the CPU has too, in the device's memory, where its 256 KiB stay in the cache. A row
of it starts at a hash of the layer, head and position, made in the kernel; were the draws themselves made there, a
text would depend on the device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vitalfew.generate._kernels_triton import FUSED, inner, shares
from vitalfew.generate.noise import POOL, Noise, gumbel_table

__all__ = ["signed", "vote_and_mark"]

_MASK: tl.constexpr = tl.constexpr(POOL - 1)
_FAR: tl.constexpr = tl.constexpr(2**31 - 1)
_TILE = 1024
"""Logits, of all query heads of a KV head, that a program works on at a time."""


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
        cool = 1.0 / tl.load(cools + row).to(tl.float32)
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


@triton.jit(do_not_specialize=["key", "recent"])
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
        cool = 1.0 / tl.load(cools + row).to(tl.float32)
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


def signed(key: int) -> int:
    """Return the same 32 bits as a signed number, which every key is to a kernel."""
    return key - (key >> 31 << 32)


def vote_and_mark(
    score: torch.Tensor, logits: torch.Tensor, tau: torch.Tensor | float, noise: Noise | None, pos: torch.Tensor,
    query_pos: torch.Tensor, recent: torch.Tensor | int,
) -> torch.Tensor:  # fmt: skip
    """Add the votes to the scores in place, and return the slot that goes next, ``(B, H)``."""
    rows, heads, group, slots = logits.shape
    device = logits.device
    lines = triton.next_power_of_2(group)
    tile = max(64, _TILE // lines)
    splits, chunk = shares(slots, rows * heads, tile, device)
    top, total = torch.empty((2, rows, heads, splits, group), dtype=torch.float32, device=device)
    scores = torch.empty((rows, heads, splits), dtype=torch.float32, device=device)
    ranks, ages, picks = torch.empty((3, rows, heads, splits), dtype=torch.int32, device=device)
    marked = torch.empty((rows, heads), dtype=torch.int64, device=device)
    table = logits if noise is None else gumbel_table(noise.seed, device)
    key = 0 if noise is None else signed(noise.key)
    # What a caller slices out of something larger is laid out anew; what a step can capture is in one piece already.
    logits, query_pos = logits.contiguous(), query_pos.contiguous()
    cool, cools = (0.0, tau.contiguous()) if isinstance(tau, torch.Tensor) else (1 / tau, logits)
    window, windows = (0, recent.contiguous()) if isinstance(recent, torch.Tensor) else (recent, logits)
    sizes: dict[str, Any] = {
        "NOISY": noise is not None, "COOLS": cools is not logits, "GROUP": group, "LINES": lines, "TILE": tile,
        "num_warps": 4, **FUSED,
    }  # fmt: skip
    assert score.stride(-1) == 1, "scores are added to where they are"
    pos, width = inner(pos), triton.next_power_of_2(splits)
    with torch.cuda.device_of(logits):
        _ballot[(rows * heads, splits)](
            logits, pos, query_pos, table, key, cool, cools, top, total, *pos.stride()[:2], heads, slots, chunk, **sizes
        )
        _vote[(rows * heads, splits)](
            score, logits, pos, query_pos, table, key, cool, cools, window, windows, top, total, ranks, scores, ages,
            picks, *score.stride()[:2], *pos.stride()[:2], heads, slots, chunk, WINDOWS=windows is not logits,
            SPLITS=width, **sizes,
        )  # fmt: skip
        _mark[(rows * heads,)](ranks, scores, ages, picks, marked, splits, SPLITS=width, **FUSED)
    return marked
