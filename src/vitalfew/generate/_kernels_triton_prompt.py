# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, import-untyped, import-not-found"
# What stands under @triton.jit is Triton's language, to which Python's types do not apply.

"""A prompt on a GPU: attention of many queries, then a second pass over the logits that adds up what each key got.

B rows, H KV heads, G query heads per KV head, n queries, m keys. The first pass goes by blocks of queries and leaves,
for each query, the logarithm of the sum by which its votes are divided; the second goes by blocks of keys, makes the
logits anew, and so needs neither atomics nor anything of the size n x m. Where votes have noise or a temperature of
their own, the first pass keeps two sums instead of one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from vitalfew.generate._kernels_triton import FUSED, _bent, column, inner, widths
from vitalfew.generate._kernels_triton_votes import _MASK, _starts, signed
from vitalfew.generate.noise import gumbel_table

if TYPE_CHECKING:
    from vitalfew.generate.scores import Logits, Votes

__all__ = ["attend_and_vote"]


@triton.jit
def _logits(q, k, at, here, bias, scale, softcap, CAPPED: tl.constexpr, SLOPED: tl.constexpr):
    """Return the logits of a block, minus infinity where a query does not see a key; keys stand along the columns."""
    x = tl.dot(q, k, input_precision="ieee") * scale
    x = _bent(x, softcap, bias, at[None, :], here[:, None], CAPPED, SLOPED)
    return tl.where((at >= 0)[None, :] & (at[None, :] <= here[:, None]), x, float("-inf"))


@triton.jit
def _cooled(x, gumbel, start, at, cool, NOISY: tl.constexpr):
    """Return what votes are made of: logits with noise, over temperature."""
    if NOISY:
        x += tl.load(gumbel + ((start[:, None] + at[None, :].to(tl.uint32)) & _MASK).to(tl.int32))
    return x * cool


@triton.jit
def _grown(x, high, whole):
    """Return a running maximum and sum of exponentials with a block of logits in, the block's part, and the fading."""
    new = tl.maximum(high, tl.max(x, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp(x - base[:, None])
    fade = tl.exp(high - base)
    return new, whole * fade + tl.sum(p, 1), p, fade


# A prompt of another length is no reason to compile anew.
@triton.jit(do_not_specialize=["key", "n", "m", "p_row", "p_head", "p2_row"])
def _attend(
    query, keys, values, key_pos, query_pos, slopes, sinks, gumbel, out, sums, key, cool,
    q_row, q_head, q_line, k_row, k_head, k_line, v_row, v_head, v_line, p_row, p_head, p2_row, o_row, o_line,
    n, m, scale, softcap,
    CAPPED: tl.constexpr, SLOPED: tl.constexpr, SINKS: tl.constexpr, NOISY: tl.constexpr, SECOND: tl.constexpr,
    ORDERED: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, OUT: tl.constexpr,
    OUT_WIDE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i, d, w = block * QUERIES + tl.arange(0, QUERIES), tl.arange(0, WIDE), tl.arange(0, OUT_WIDE)
    here = tl.load(query_pos + row * p2_row + i, mask=i < n, other=-1).to(tl.int32)
    line = i.to(tl.int64)[:, None]
    q = tl.load(
        query + row * q_row + head * q_head + line * q_line + d[None, :],
        mask=(i < n)[:, None] & (d < DIM)[None, :], other=0.0,
    )  # fmt: skip
    bias = tl.load(slopes + head) if SLOPED else 0.0
    start = _starts(key, head, here)
    keys += row * k_row + head // GROUP * k_head
    values += row * v_row + head // GROUP * v_head
    key_pos += row * p_row + head // GROUP * p_head
    high, high2 = tl.full([QUERIES], float("-inf"), tl.float32), tl.full([QUERIES], float("-inf"), tl.float32)
    whole, whole2 = tl.zeros([QUERIES], tl.float32), tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, OUT_WIDE], tl.float32)
    end = m
    if ORDERED:
        # The last keys are the queries' own, so that what comes after a block of queries is seen by none of it.
        end = tl.minimum(m, m - n + (block + 1) * QUERIES)
    for first in range(0, end, KEYS):
        j = first + tl.arange(0, KEYS)
        at = tl.load(key_pos + j, mask=j < m, other=-1)
        live, place = at >= 0, j.to(tl.int64)
        k = tl.load(keys + place[None, :] * k_line + d[:, None], mask=live[None, :] & (d < DIM)[:, None], other=0.0)
        x = _logits(q, k, at, here, bias, scale, softcap, CAPPED, SLOPED)
        high, whole, p, fade = _grown(x, high, whole)
        v = tl.load(values + place[:, None] * v_line + w[None, :], mask=live[:, None] & (w < OUT)[None, :], other=0.0)
        result = result * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        if SECOND:
            high2, whole2, _, _ = _grown(_cooled(x, gumbel, start, at, cool, NOISY), high2, whole2)
    if SECOND:
        seen, votes_high, votes_whole = whole2 > 0.0, high2, whole2
    else:
        seen, votes_high, votes_whole = whole > 0.0, high, whole
    # A query that sees nothing votes for nothing.
    log_sum = tl.where(seen, votes_high + tl.log(tl.where(seen, votes_whole, 1.0)), float("inf"))
    tl.store(sums + (row * tl.num_programs(1) + head) * n + i, log_sum, mask=i < n)
    if SINKS:
        sink = tl.load(sinks + head)
        top = tl.maximum(high, sink)
        fade = tl.exp(high - top)
        result *= fade[:, None]
        whole = whole * fade + tl.exp(sink - top)
    result = result / tl.where(whole > 0.0, whole, 1.0)[:, None]
    tl.store(
        out + row * o_row + line * o_line + head * OUT + w[None, :], result.to(out.dtype.element_ty),
        mask=(i < n)[:, None] & (w < OUT)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["key", "n", "m", "begin", "p_row", "p_head", "p2_row"])
def _cast(
    query, keys, key_pos, query_pos, slopes, gumbel, sums, voices, cast, key, cool,
    q_row, q_head, q_line, k_row, k_head, k_line, p_row, p_head, p2_row, n, m, begin, scale, softcap,
    CAPPED: tl.constexpr, SLOPED: tl.constexpr, NOISY: tl.constexpr, ORDERED: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, WIDE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    block, head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    pair = row * tl.num_programs(1) + head
    j, d = block * KEYS + tl.arange(0, KEYS), tl.arange(0, WIDE)
    at = tl.load(key_pos + row * p_row + head * p_head + j, mask=j < m, other=-1)
    k = tl.load(
        keys + row * k_row + head * k_head + j.to(tl.int64)[None, :] * k_line + d[:, None],
        mask=(at >= 0)[None, :] & (d < DIM)[:, None], other=0.0,
    )  # fmt: skip
    got = tl.zeros([KEYS], tl.float32)
    if ORDERED:
        begin = tl.maximum(begin, block * KEYS - (m - n))
    begin = begin // QUERIES * QUERIES
    for g in range(GROUP):
        mine = head * GROUP + g
        bias = tl.load(slopes + mine) if SLOPED else 0.0
        for first in range(begin, n, QUERIES):
            i = first + tl.arange(0, QUERIES)
            here = tl.load(query_pos + row * p2_row + i, mask=i < n, other=-1).to(tl.int32)
            q = tl.load(
                query + row * q_row + mine * q_head + i.to(tl.int64)[:, None] * q_line + d[None, :],
                mask=(i < n)[:, None] & (d < DIM)[None, :], other=0.0,
            )  # fmt: skip
            log_sum = tl.load(sums + (pair * GROUP + g) * n + i, mask=i < n, other=float("inf"))
            voice = tl.load(voices + row * n + i, mask=i < n, other=0.0)
            x = _logits(q, k, at, here, bias, scale, softcap, CAPPED, SLOPED)
            y = _cooled(x, gumbel, _starts(key, mine, here), at, cool, NOISY)
            got += tl.sum(tl.exp(y - log_sum[:, None]) * voice[:, None], 0)
    tl.store(cast + pair * m + j, got, mask=j < m)


def _order(key_pos: torch.Tensor, query_pos: torch.Tensor, voices: torch.Tensor | None) -> tuple[bool, int]:
    """Return whether the last keys are the queries' own tokens, in order but for padding, and the first that votes.

    Waits for the device.
    """
    count = query_pos.shape[1]
    own = (key_pos[:, :, key_pos.shape[2] - count :] == query_pos[:, None]).all()
    rising = (query_pos[:, 1:] > query_pos[:, :-1].cummax(1).values) | (query_pos[:, 1:] < 0)
    silent = query_pos[0].new_zeros(()) if voices is None else (voices.amax(0) > 0).cumsum(0).eq(0).sum()
    ordered, first = torch.stack((own & rising.all(), silent)).tolist()
    return bool(ordered), int(first)


def attend_and_vote(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, form: Logits, key_pos: torch.Tensor,
    query_pos: torch.Tensor, voices: torch.Tensor | None, votes: Votes | None, ordered: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Return the attention ``(B, n, Hq, d)`` of queries ``(B, Hq, n, d)``, and with `voices` the votes ``(B, H, m)``.

    `voices` ``(B, n)`` says how much each query counts. `ordered` promises that the last keys are the queries' own.
    """
    rows, all_heads, n, _ = query.shape
    heads, m = keys.shape[1:3]
    device, shape = query.device, widths(keys, values)
    query, keys, values, key_pos, query_pos = (inner(each) for each in (query, keys, values, key_pos, query_pos))
    begin = 0
    if ordered and votes is not None and votes.voters is not None:
        begin = max(0, n - votes.voters)
    elif not ordered and n <= m:
        ordered, begin = _order(key_pos, query_pos, voices)
    out = torch.empty((rows, n, all_heads, shape["OUT"]), dtype=query.dtype, device=device)
    sums = torch.empty((rows, all_heads, n), dtype=torch.float32, device=device)
    voting = votes if voices is not None else None
    noise, tau = (None, 1.0) if voting is None else (voting.noise, voting.tau)
    slopes, sinks = (sums if each is None else column(each) for each in (form.slopes, form.sinks))
    table = sums if noise is None else gumbel_table(noise.seed, device)
    key = 0 if noise is None else signed(noise.key)
    what: dict[str, Any] = {
        "CAPPED": form.softcap is not None, "SLOPED": form.slopes is not None, "NOISY": noise is not None,
        "ORDERED": ordered, "GROUP": all_heads // heads,
    }  # fmt: skip
    queries, block = (32, 32) if query.element_size() > 2 else (128, 64)
    over = max(1, max(shape["WIDE"], shape["OUT_WIDE"]) // 128)
    queries, block = max(16, queries // over), max(16, block // over)
    tile: dict[str, Any] = {"QUERIES": queries, "KEYS": block, "num_warps": 8 if queries == 128 else 4, **FUSED}
    scalars = (float(form.scale), float(form.softcap or 0.0))
    places = (*query.stride()[:3], *keys.stride()[:3])
    ats = (*key_pos.stride()[:2], query_pos.stride(0))
    with torch.cuda.device_of(query):
        _attend[(triton.cdiv(n, queries), all_heads, rows)](
            query, keys, values, key_pos, query_pos, slopes, sinks, table, out, sums, key, 1 / tau, *places,
            *values.stride()[:3], *ats, *out.stride()[:2], n, m, *scalars, SINKS=form.sinks is not None,
            SECOND=noise is not None or tau != 1.0, **what, **shape, **tile,
        )  # fmt: skip
        if voices is None:
            return out, None
        cast = torch.empty((rows, heads, m), dtype=torch.float32, device=device)
        _cast[(triton.cdiv(m, block), heads, rows)](
            query, keys, key_pos, query_pos, slopes, table, sums, voices.contiguous(), cast, key, 1 / tau, *places,
            *ats, n, m, begin, *scalars, **what, DIM=shape["DIM"], WIDE=shape["WIDE"], **tile,
        )  # fmt: skip
    return out, cast
