"""The queries of one KV head over a prompt, in blocks: a block's logits give attention and votes, and are dropped."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from vitalfew.generate import _kernels_numba, _kernels_threads
from vitalfew.generate._calling import threads_for
from vitalfew.generate.noise import POOL, inverses

if TYPE_CHECKING:
    from vitalfew.generate.scores import Logits, Votes

__all__ = ["attend_head", "bend", "of_heads", "padding_of", "voting"]

BLOCK = 64
"""Queries whose logits exist at the same time, for the query heads of one KV head."""


def voting(query_pos: torch.Tensor, voters: int | None) -> torch.Tensor:
    """Return 1.0 for the queries ``(B, n)`` that vote."""
    real = query_pos >= 0
    if voters is not None:
        real &= query_pos > query_pos.amax(1, keepdim=True) - voters
    return real.float()


def padding_of(key_pos: torch.Tensor, query_pos: torch.Tensor) -> int | None:
    """Return the padding on the left of a row where all else stands in order and ends with the queries, else None."""
    m = key_pos.shape[-1]
    padding = int((key_pos[0] < 0).sum())
    ordered = torch.arange(-padding, m - padding, device=key_pos.device).clamp_(min=-1)
    same = (key_pos == ordered).all() & (query_pos == ordered[m - len(query_pos) :]).all()
    return padding if bool(same) else None


def of_heads(form: Logits, some: slice) -> Logits:
    """Return the form of the query heads of one KV head."""
    if form.slopes is None and form.sinks is None:
        return form
    slopes, sinks = (None if each is None else each[some].float()[:, None, None] for each in (form.slopes, form.sinks))
    return replace(form, slopes=slopes, sinks=sinks)


def attend_head(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, form: Logits, key_pos: torch.Tensor,
    query_pos: torch.Tensor, padding: int | None, first: int, out: torch.Tensor | None,
    cast: tuple[torch.Tensor, torch.Tensor] | None, votes: Votes | None, head: int,
) -> None:  # fmt: skip
    """Attend with the queries ``(G, n, d)`` of one KV head from the column `first` on, and add to `out` and `cast`."""
    group, count, _ = query.shape
    m = keys.shape[0]
    start = padding or 0
    first = max(first, start - (m - count))
    memory = keys.new_empty(group * min(BLOCK, count) * (m - start))
    for lo in range(first, count, BLOCK):
        hi = min(lo + BLOCK, count)
        # Where all stands in order, the keys after the block's last query are seen by none of it.
        end = m if padding is None else m - count + hi
        q = (query[:, lo:hi].float() * form.scale).reshape(group * (hi - lo), -1)
        flat = memory[: len(q) * (end - start)].view(len(q), end - start)
        torch.mm(q, keys[start:end].t(), out=flat)
        x = flat.view(group, hi - lo, end - start)
        at, seen_from = key_pos[start:end], query_pos[lo:hi, None]
        bend(x, form, at, seen_from)
        if padding is None:
            x.masked_fill_((at < 0) | (at > seen_from), -torch.inf)
        else:
            corner = x[..., lo - hi :]
            corner.masked_fill_(torch.ones(corner.shape[1:], dtype=torch.bool, device=x.device).triu(1), -torch.inf)
        total = x.logsumexp(-1, keepdim=True) if form.sinks is not None else None
        torch.softmax(x, -1, out=x)
        if padding is None:
            x.nan_to_num_(0.0)  # queries that see nothing
        if out is not None:
            part = torch.mm(flat, values[start:end]).view(group, hi - lo, -1)
            if total is not None and form.sinks is not None:
                part *= torch.sigmoid(total - form.sinks)
            out[lo:hi] = part.transpose(0, 1)
        if cast is not None and votes is not None:
            voices, got = cast[0][lo:hi].repeat(group), cast[1][start:end]
            if votes.noise is None:
                _add_votes(flat, votes.tau, voices, got)
            else:
                rows = votes.noise.starts(head + group, query_pos[None, lo:hi])[0, head:].flatten()
                _add_noisy_votes(flat, votes.noise.seed, rows, at, votes.tau, voices, got, padding is not None)


def _add_votes(weights: torch.Tensor, tau: float, voices: torch.Tensor, got: torch.Tensor) -> None:
    """Add to `got` (m) the votes of queries with these weights (n, m), which are spent on the way."""
    if tau != 1.0:
        # The softmax of logits / tau is the softmax to the power of 1 / tau, made to sum to 1 again.
        weights.pow_(1 / tau)
        voices = voices / weights.sum(-1).clamp_(min=torch.finfo(torch.float32).tiny)
    got.addmv_(weights.t(), voices)


def _add_noisy_votes(
    weights: torch.Tensor, seed: int, rows: torch.Tensor, key_pos: torch.Tensor, tau: float, voices: torch.Tensor,
    got: torch.Tensor, in_order: bool,
) -> None:  # fmt: skip
    """As `_add_votes`, with noise: the softmax of (x - log E) / tau is (softmax(x) / E) to the power of 1 / tau."""
    count = weights.shape[1]
    if in_order and weights.device.type == "cpu":
        draws = inverses(seed, weights.device, count)
        shares = np.empty(len(weights), np.float32)
        given = (weights.numpy(), draws.numpy(), rows.numpy(), np.float32(1 / tau), voices.numpy(), shares)
        threads = threads_for(len(weights), 4 * weights.numel())
        if threads > 1:
            _kernels_threads.noisy_votes(*given, got.numpy(), threads)
        else:
            _kernels_numba.add_noise(*given, 0, len(weights))
            _kernels_numba.add_votes(given[0], shares, got.numpy(), 0, count)
        return
    at = torch.arange(count, device=rows.device) if in_order else key_pos.to(torch.int64)
    weights *= inverses(seed, weights.device)[(rows[:, None] + at) & (POOL - 1)]
    weights.pow_(1 / tau)
    got.addmv_(weights.t(), voices / weights.sum(-1).clamp_(min=torch.finfo(torch.float32).tiny))


def bend(x: torch.Tensor, form: Logits, key_pos: torch.Tensor, query_pos: torch.Tensor) -> None:
    """Cap and bias scaled logits in place."""
    if form.softcap is not None:
        x.div_(form.softcap).tanh_().mul_(form.softcap)
    if form.slopes is not None:
        x += form.slopes * (key_pos - query_pos)
