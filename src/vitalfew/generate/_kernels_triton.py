# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, import-untyped, import-not-found"
# What stands under @triton.jit is Triton's language, to which Python's types do not apply.

"""One token over slots on a GPU; `_kernels_reference` says what each function means.

B rows, H KV heads, G query heads per KV head, C slots, d head size. The slots of a head are shared out among programs,
a "split" each, whose partial results a second, small kernel puts together. A block of keys is loaded once for all
query heads. There are no atomics and the host is never waited for, so that a step can be captured and is repeatable.

What the token votes for is in `_kernels_triton_votes`, what a prompt does in `_kernels_triton_prompt`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["FUSED", "attend", "column", "inner", "shares", "widths", "write"]

FUSED: dict[str, Any] = {"enable_fp_fusion": True}
"""Said at each launch: what Triton does by itself is to change, of which it warns."""

_MOST_SPLITS = 64
_TILE_BYTES = 1 << 14
"""Of keys that a program loads at a time; as many of values, and what is fetched ahead, share its fast memory."""


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
        live, place = at >= 0, c.to(tl.int64)[:, None]
        # What an empty slot holds, which may be no number, is not loaded.
        k = tl.load(keys + place * k_slot + d[None, :], mask=live[:, None] & (d < DIM)[None, :], other=0.0)
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        x = _bent(x, softcap, bias, at[None, :], here, CAPPED, SLOPED)
        x = tl.where(live[None, :], x, float("-inf"))
        tl.store(logits + line[:, None] * slots + c[None, :], x, mask=(g < GROUP)[:, None] & (c < end)[None, :])
        new = tl.maximum(high, tl.max(x, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp(x - base[:, None])
        fade = tl.exp(high - base)
        v = tl.load(values + place * v_slot + w[None, :], mask=live[:, None] & (w < OUT)[None, :], other=0.0)
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


def shares(slots: int, pairs: int, block: int, device: torch.device) -> tuple[int, int]:
    """Return how many programs share the slots of a head, and how many slots each has."""
    wanted = max(1, min(_MOST_SPLITS, -(-4 * _processors(device) // pairs)))
    chunk = -(-slots // wanted)
    chunk += -chunk % block
    return -(-slots // chunk), chunk


def inner(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose last dimension is one piece of memory."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def column(tensor: torch.Tensor) -> torch.Tensor:
    """Return one float32 number per head in one piece of memory, whatever a model keeps."""
    return tensor.float().contiguous()


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
    query, keys, values, pos = (inner(each) for each in (query.flatten(1, 2), keys, values, pos))
    query_pos = query_pos.contiguous()  # one column of many, where several tokens come one after another
    block = min(64, max(16, _TILE_BYTES // (max(shape["WIDE"], shape["OUT_WIDE"]) * keys.element_size())))
    splits, chunk = shares(slots, rows * heads, block, query.device)
    logits = torch.empty((rows, heads, group, slots), dtype=torch.float32, device=query.device)
    top, total = torch.empty((2, rows, heads, splits, group), dtype=torch.float32, device=query.device)
    part = torch.empty((rows, heads, splits, group, shape["OUT"]), dtype=torch.float32, device=query.device)
    out = torch.empty((rows, heads, group, shape["OUT"]), dtype=query.dtype, device=query.device)
    with torch.cuda.device_of(query):
        _attend[(rows, heads, splits)](
            query, keys, values, pos, query_pos, logits if slopes is None else column(slopes), logits, top, total, part,
            *query.stride()[:2], *keys.stride()[:3], *values.stride()[:3], *pos.stride()[:2], slots, chunk,
            float(scale), float(softcap or 0.0), CAPPED=softcap is not None, SLOPED=slopes is not None, GROUP=group,
            LINES=triton.next_power_of_2(group), **shape, BLOCK=block, num_warps=4, num_stages=3, **FUSED,
        )  # fmt: skip
        _combine[(rows * heads, group)](
            top, total, part, top if sinks is None else column(sinks), out, splits, heads, SINKS=sinks is not None,
            GROUP=group, OUT=shape["OUT"], OUT_WIDE=shape["OUT_WIDE"], SPLITS=triton.next_power_of_2(splits), **FUSED,
        )  # fmt: skip
    return out, logits


def write(
    keys: torch.Tensor, values: torch.Tensor, pos: torch.Tensor, score: torch.Tensor, marked: torch.Tensor,
    key: torch.Tensor, value: torch.Tensor, new_pos: torch.Tensor,
) -> None:  # fmt: skip
    """Put one token per row, ``(B, H, d)`` at positions ``(B,)``, into the marked slots ``(B, H)``."""
    for each in (keys, values, pos, score):
        assert each.stride(-1) == 1, "slots are written where they are"
        assert 0 not in each.stride(), "no two heads share a slot"
    key, value, marked, new_pos = inner(key), inner(value), marked.contiguous(), new_pos.contiguous()
    with torch.cuda.device_of(keys):
        _write[tuple(key.shape[:2])](
            keys, values, pos, score, marked, key, value, new_pos, *keys.stride()[:3], *values.stride()[:3],
            *pos.stride()[:2], *score.stride()[:2], *key.stride()[:2], *value.stride()[:2],
            **widths(keys, values), **FUSED,
        )  # fmt: skip
