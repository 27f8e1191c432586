"""One token over slots in plain torch: what runs on a GPU and in half precision, and what the fast kernels equal."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from vitalfew.generate.noise import Noise, exponential
from vitalfew.generate.select import next_slot

__all__ = ["attend", "attend_blocks", "later_votes", "vote_and_mark"]


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pos: torch.Tensor, query_pos: torch.Tensor,
    scale: float, softcap: float | None, slopes: torch.Tensor | None, sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return attention and logits, ``(B, H, G, d)`` and ``(B, H, G, C)``, of queries ``(B, H, G, d)``."""
    x, weights = weigh(query.float() @ keys.float().transpose(-1, -2) * scale, pos, query_pos, softcap, slopes, sinks)
    # An empty slot may hold anything, also what is no number.
    return weights @ values.float().masked_fill((pos < 0)[..., None], 0.0), x


def attend_blocks(
    query: torch.Tensor, keys: Iterable[torch.Tensor], values: Iterable[torch.Tensor], pos: torch.Tensor,
    query_pos: torch.Tensor, scale: float, softcap: float | None, slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Do what `attend` does with keys and values that come some slots at a time, each in float32."""
    raw = torch.cat([query @ some.transpose(-1, -2) for some in keys], -1) * scale
    x, weights = weigh(raw, pos, query_pos, softcap, slopes, sinks)
    out, done = None, 0
    for some in values:
        part = slice(done, done + some.shape[2])
        sums = weights[..., part] @ some.masked_fill((pos[..., part] < 0)[..., None], 0.0)
        out, done = sums if out is None else out + sums, part.stop
    assert out is not None
    return out, x


def weigh(
    x: torch.Tensor, pos: torch.Tensor, query_pos: torch.Tensor, softcap: float | None, slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return logits, capped and biased and masked, and their weights, of scaled products ``(B, H, G, C)``."""
    heads = x.shape[1]
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    if slopes is not None:
        x = x + slopes.float().view(heads, -1, 1) * (pos - query_pos[:, None, None])[:, :, None]
    x = x.masked_fill((pos < 0)[:, :, None], -torch.inf)
    weights = x.softmax(-1)
    if sinks is not None:
        weights = weights * torch.sigmoid(x.logsumexp(-1, keepdim=True) - sinks.float().view(heads, -1, 1))
    return x, weights


def later_votes(
    logits: torch.Tensor, tau: torch.Tensor | float, noise: Noise | None, pos: torch.Tensor, query_pos: torch.Tensor
) -> torch.Tensor:
    """Return the votes ``(B, H, C)`` of one token from its logits ``(B, H, G, C)``."""
    if noise is not None:
        heads, group = logits.shape[1:3]
        draws = exponential(noise, heads * group, query_pos[:, None], pos)
        logits = logits - draws.view_as(logits).log()
    cooled = logits / (tau.view(-1, 1, 1, 1) if isinstance(tau, torch.Tensor) else tau)
    return cooled.softmax(-1).mean(2)


def vote_and_mark(
    score: torch.Tensor, logits: torch.Tensor, tau: torch.Tensor | float, noise: Noise | None, pos: torch.Tensor,
    query_pos: torch.Tensor, recent: torch.Tensor | int,
) -> torch.Tensor:  # fmt: skip
    """Add the votes to the scores in place, and return the slot that goes next, ``(B, H)``."""
    score += later_votes(logits, tau, noise, pos, query_pos)
    return next_slot(score, pos, recent)
