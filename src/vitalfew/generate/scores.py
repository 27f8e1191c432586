"""Attention that also counts votes: in full over a prompt, then for one token over slots; no gradients.

B rows, H KV heads, G query heads per KV head, Hq = H * G, n queries, m keys, d head size, C slots. Logits and votes
are float32 whatever the model's dtype. A prompt is worked on in blocks of queries, so no n x n tensor ever exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from vitalfew.core.errors import InputError, need
from vitalfew.generate import _kernels_numba, _kernels_reference, _kernels_threads
from vitalfew.generate._blocks import attend_head, bend, of_heads, padding_of, voting
from vitalfew.generate._calling import NONE, array, tables, threads_for
from vitalfew.generate.noise import Noise, gumbels
from vitalfew.generate.select import next_slot

__all__ = [
    "Logits", "Votes", "attend_masked", "attend_prompt", "attend_slots", "later_votes", "mark", "on_gpu",
    "vote_and_mark",
]  # fmt: skip


@dataclass(frozen=True)
class Logits:
    """How logits are made of queries and keys.

    Attributes
    ----------
    scale
        The factor of the products.
    softcap
        Logits are squashed into (-softcap, softcap) by tanh.
    slopes
        Per query head: the bias is slope times (key position - query position), added last (ALiBi).
    sinks
        Per query head: one more logit in the softmax's denominator. It takes weight from the output, not from votes.
    """

    scale: float
    softcap: float | None = None
    slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        """Nothing but a scale."""
        return self.softcap is None and self.slopes is None and self.sinks is None


@dataclass(frozen=True)
class Votes:
    """Which queries of a prompt vote and how: each row's last `voters` (None: all), with a temperature and noise."""

    voters: int | None
    tau: float = 1.0
    noise: Noise | None = None


@torch.no_grad()
def attend_prompt(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, form: Logits, key_pos: torch.Tensor,
    query_pos: torch.Tensor, votes: Votes | None, causal: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Return the attention of many queries at once, and the votes that each key got.

    A key is seen by the queries at its position and later; what has position -1 is padding or an empty slot, which
    neither sees, is seen, nor votes.

    Parameters
    ----------
    query
        ``(B, Hq, n, d)``.
    keys, values
        ``(B, H, m, d)``.
    form
        How logits are made.
    key_pos, query_pos
        Own positions in each row, ``(B, H, m)`` and ``(B, n)``.
    votes
        Who votes, and how; None for no votes.
    causal
        A promise that there is no padding and that both positions are 0, 1, ..., n - 1.

    Returns
    -------
    tuple
        Attention ``(B, n, Hq, d)`` in the dtype of the query, and votes ``(B, H, m)`` in float32: summed over voters,
        averaged over the query heads of a KV head; or None.

    Examples
    --------
    >>> q, k, v = torch.ones(1, 2, 3, 4), torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4)
    >>> at = torch.arange(3)
    >>> out, cast = attend_prompt(q, k, v, Logits(0.5), at.expand(1, 1, 3), at[None], Votes(None), causal=True)
    >>> cast  # the first query sees one key, the second two
    tensor([[[1.8333, 0.8333, 0.3333]]])

    Notes
    -----
    Logits are made in blocks of queries, used for both, and dropped.
    """
    rows, all_heads, count, _ = query.shape
    heads, m = keys.shape[1:3]
    weights, cast, first = None, None, 0
    if votes is not None:
        cast = torch.zeros((rows, heads, m), dtype=torch.float32, device=keys.device)
        if votes.voters != 0:
            weights = voting(query_pos, votes.voters) / (all_heads // heads)
    few = weights is None or (votes is not None and votes.voters is not None and 4 * votes.voters < count)
    if causal and form.plain and query.shape[-1] == values.shape[-1] and few:
        out = functional.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=form.scale, enable_gqa=all_heads != heads
        ).transpose(1, 2)
        if votes is None or not votes.voters:
            return out, cast
        first, made = count - votes.voters, None
    else:
        out = made = query.new_zeros((rows, count, all_heads, values.shape[-1]))
    if on_gpu(query):
        from vitalfew.generate import _kernels_triton_prompt as gpu

        late, got = gpu.attend_and_vote(
            query[:, :, first:], keys, values, form, key_pos, query_pos[:, first:],
            None if weights is None else weights[:, first:], votes, causal,
        )  # fmt: skip
        return (out if made is None else late), (cast if got is None else got)
    for row in range(rows):
        padding = 0 if causal else padding_of(key_pos[row], query_pos[row])
        for head in range(heads):
            some = slice(head * (all_heads // heads), (head + 1) * (all_heads // heads))
            attend_head(
                query[row, some], keys[row, head].float(), values[row, head].float(), of_heads(form, some),
                key_pos[row, head], query_pos[row], padding, first, None if made is None else made[row, :, some],
                None if weights is None or cast is None else (weights[row], cast[row, head]), votes, some.start,
            )  # fmt: skip
    return out, cast


@torch.no_grad()
def attend_slots(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, form: Logits, pos: torch.Tensor,
    query_pos: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the attention of one token over slots, and its logits.

    Parameters
    ----------
    query
        ``(B, Hq, 1, d)``.
    keys, values
        ``(B, H, C, d)``; may be views of a larger memory.
    form
        How logits are made.
    pos, query_pos
        Own positions, ``(B, H, C)`` with -1 in an empty slot, and ``(B,)``.

    Returns
    -------
    tuple
        Attention ``(B, 1, Hq, d)`` in the dtype of the query, and logits ``(B, H, G, C)`` in float32, minus infinity
        in an empty slot.

    Examples
    --------
    >>> q, k = torch.ones(1, 2, 1, 4), torch.ones(1, 1, 3, 4)
    >>> at = torch.tensor([[[0, 2, -1]]], dtype=torch.int32)
    >>> out, logits = attend_slots(q, k, k, Logits(0.5), at, torch.tensor([2]))
    >>> out.shape, logits[0, 0, 0]
    (torch.Size([1, 1, 2, 4]), tensor([2., 2., -inf]))
    """
    rows, all_heads, _, d = query.shape
    heads, slots, width = keys.shape[1], keys.shape[2], values.shape[-1]
    q = query.reshape(rows, heads, -1, d)
    if on_gpu(query):
        from vitalfew.generate import _kernels_triton as gpu

        out, logits = gpu.attend(q, keys, values, pos, query_pos, form.scale, form.softcap, form.slopes, form.sinks)
        return out.reshape(rows, 1, all_heads, width), logits
    held = tables(keys, values) if query.device.type == "cpu" and keys.dtype == torch.float32 else None
    if held is None:
        out, logits = _kernels_reference.attend(
            q, keys, values, pos, query_pos, form.scale, form.softcap, form.slopes, form.sinks
        )
        return out.reshape(rows, 1, all_heads, width).to(query.dtype), logits
    out = torch.empty((rows, 1, all_heads, width))
    logits = torch.empty((rows, heads, all_heads // heads, slots))
    slopes, sinks = (NONE if each is None else array(each) for each in (form.slopes, form.sinks))
    given = (
        array(q), *held[0], *held[1], array(pos, torch.int32), array(query_pos, torch.int64),
        np.float32(form.scale), np.float32(form.softcap or 0.0), slopes, sinks,
        out.view(rows, heads, -1, width).numpy(), logits.numpy(), 0, rows * heads,
    )  # fmt: skip
    threads = threads_for(rows * heads, 4 * rows * heads * slots * (d + width))
    _kernels_threads.attend(*given, threads) if threads > 1 else _kernels_numba.attend(*given)
    return out, logits


def on_gpu(tensor: torch.Tensor) -> bool:
    """Return whether Triton's kernels are to be used."""
    return tensor.device.type == "cuda" and bool(need("triton"))


def later_votes(
    logits: torch.Tensor, tau: torch.Tensor | float, noise: Noise | None, pos: torch.Tensor, query_pos: torch.Tensor
) -> torch.Tensor:
    """Return the votes ``(B, H, C)`` of one token, mean over query heads, from its logits ``(B, H, G, C)``.

    Examples
    --------
    >>> logits = torch.tensor([[[[0.0, 0.0, -torch.inf]]]])
    >>> later_votes(logits, 1.0, None, torch.tensor([[[4, 6, -1]]]), torch.tensor([6]))
    tensor([[[0.5000, 0.5000, 0.0000]]])
    """
    return _kernels_reference.later_votes(logits, tau, noise, pos, query_pos)


def vote_and_mark(
    score: torch.Tensor, logits: torch.Tensor, tau: torch.Tensor | float, noise: Noise | None, pos: torch.Tensor,
    query_pos: torch.Tensor, recent: torch.Tensor | int,
) -> torch.Tensor:  # fmt: skip
    """Add one token's votes to the scores in place, and return the slot that the next token takes.

    It is `later_votes` and `vitalfew.generate.select.next_slot` in one pass, for policies that sum votes.

    Parameters
    ----------
    score
        ``(B, H, C)`` float32; may be a view of a larger memory.
    logits
        ``(B, H, G, C)``, as from `attend_slots`.
    tau, noise
        Temperature of the votes, per row ``(B,)`` or one for all, and their noise.
    pos, query_pos
        As in `attend_slots`.
    recent
        The recent window, per row ``(B,)`` or one for all.

    Returns
    -------
    torch.Tensor
        ``(B, H)`` int64.

    Examples
    --------
    >>> score, at = torch.zeros(1, 1, 2), torch.tensor([[[4, 6]]], dtype=torch.int32)
    >>> vote_and_mark(score, torch.tensor([[[[0.0, 2.0]]]]), 1.0, None, at, torch.tensor([6]), recent=0)
    tensor([[0]])
    """
    if on_gpu(score):
        from vitalfew.generate import _kernels_triton_votes as gpu

        return gpu.vote_and_mark(score, logits, tau, noise, pos, query_pos, recent)
    if score.device.type != "cpu" or torch.compiler.is_compiling():
        return _kernels_reference.vote_and_mark(score, logits, tau, noise, pos, query_pos, recent)
    rows, heads = logits.shape[:2]
    draws, key = (NONE, 0) if noise is None else (gumbels(noise.seed), noise.key)
    cool = tau.numpy() if isinstance(tau, torch.Tensor) else np.array([tau], np.float32)
    marked = torch.empty((rows, heads), dtype=torch.int64)
    given = (
        score.numpy(), array(logits), cool, draws, key, array(pos, torch.int32), array(query_pos, torch.int64),
        _windows(recent), marked.numpy(), 0, rows * heads,
    )  # fmt: skip
    threads = threads_for(rows * heads, 64 * logits.numel())  # as long as reading so much takes
    _kernels_threads.vote_and_mark(*given, threads) if threads > 1 else _kernels_numba.vote_and_mark(*given)
    return marked


def mark(score: torch.Tensor, pos: torch.Tensor, recent: torch.Tensor | int) -> torch.Tensor:
    """Return what `vitalfew.generate.select.next_slot` does, in one pass on a CPU.

    Examples
    --------
    >>> mark(torch.tensor([[[0.4, 0.1, 0.0]]]), torch.tensor([[[3, 5, 6]]], dtype=torch.int32), recent=2)
    tensor([[1]])
    """
    if score.device.type != "cpu" or torch.compiler.is_compiling():
        return next_slot(score, pos, recent)
    marked = torch.empty(pos.shape[:2], dtype=torch.int64)
    _kernels_numba.mark(score.numpy(), array(pos, torch.int32), _windows(recent), marked.numpy())
    return marked


def _windows(recent: torch.Tensor | int) -> npt.NDArray[np.int64]:
    found: npt.NDArray[np.int64] = (
        array(recent, torch.int64) if isinstance(recent, torch.Tensor) else np.array([recent])
    )
    return found


@torch.no_grad()
def attend_masked(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, form: Logits, mask: torch.Tensor
) -> torch.Tensor:
    """Return attention ``(B, n, Hq, d)`` under a given mask ``(B, 1, n, m)``, as sliding layers have it."""
    if form.slopes is not None:
        raise InputError("ALiBi cannot be had with a mask alone", hint="use attend_prompt, which knows positions")
    if form.plain:
        out = functional.scaled_dot_product_attention(
            query, keys, values, mask, scale=form.scale, enable_gqa=query.shape[1] != keys.shape[1]
        )
        return out.transpose(1, 2)
    rows, all_heads, count, _ = query.shape
    heads, group = keys.shape[1], query.shape[1] // keys.shape[1]
    q = query.float().reshape(rows, heads, group * count, -1)
    x = (q @ keys.float().transpose(-1, -2)).view(rows, heads, group, count, -1) * form.scale
    bend(x, form, x, x)
    mask = mask[:, :, None]
    x = x.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else x + mask
    p = x.softmax(-1)
    if form.sinks is not None:
        p *= torch.sigmoid(x.logsumexp(-1, keepdim=True) - form.sinks.float().view(heads, group, 1, 1))
    p.nan_to_num_(0.0)
    out = (p.flatten(2, 3) @ values.float()).view(rows, all_heads, count, -1)
    return out.transpose(1, 2).to(query.dtype)
