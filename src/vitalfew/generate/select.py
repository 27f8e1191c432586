"""Which tokens stay after the prompt, and which slot the next token takes: pure decisions on scores and positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vitalfew.core.errors import InputError

__all__ = ["next_slot", "prompt_tokens"]


def prompt_tokens(score: torch.Tensor, pos: torch.Tensor, keep: Sequence[int], recent: Sequence[int]) -> torch.Tensor:
    """Return the tokens of a prompt that stay, in order of their positions.

    Parameters
    ----------
    score
        ``(B, H, n)``; the lowest go, and infinity never goes.
    pos
        ``(B, H, n)``: own positions, -1 for padding and empty slots.
    keep
        How many stay, per row.
    recent
        How many of the latest stay in any case, per row.

    Returns
    -------
    torch.Tensor
        ``(B, H, max(keep))`` int64: indices into n; -1 at the end of a row that keeps fewer.

    Raises
    ------
    InputError
        If a score is NaN, or more tokens are protected than may stay.

    Examples
    --------
    >>> score = torch.tensor([[[0.1, 0.9, 0.5, 0.0]]])
    >>> prompt_tokens(score, torch.arange(4).expand(1, 1, 4), keep=[2], recent=[1])
    tensor([[[1, 3]]])

    Notes
    -----
    Between equal scores the older token stays. Cost: two sorts over n.
    """
    live = pos >= 0
    if bool((score.isnan() & live).any()):
        raise InputError("a score is NaN", hint="check the model's inputs, or use float32")
    kept = torch.tensor(keep, device=pos.device)[:, None, None]
    window = torch.tensor(recent, device=pos.device)[:, None, None]
    latest = pos > pos.amax(-1, keepdim=True) - window
    held = ((score == torch.inf) | latest) & live
    _check(held, live, keep, kept)
    # Ties stay in the order of positions, for both sorts are stable.
    order = pos.argsort(dim=-1, stable=True)
    score = score.clamp(min=torch.finfo(score.dtype).min).masked_fill(held, torch.inf).masked_fill(~live, -torch.inf)
    best = score.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices[..., : max(keep)]
    dropped = torch.arange(best.shape[-1], device=pos.device) >= kept
    ranks, _ = best.masked_fill(dropped, pos.shape[-1]).sort(-1)
    index = order.gather(-1, ranks.clamp(max=pos.shape[-1] - 1))
    return index.masked_fill(dropped, -1)


def _check(held: torch.Tensor, live: torch.Tensor, keep: Sequence[int], kept: torch.Tensor) -> None:
    """Refuse counts that cannot be honoured."""
    needed, have = held.sum(-1, keepdim=True), live.sum(-1, keepdim=True)
    if bool((kept > have).any()):
        row = int((kept > have).any(-1).any(-1).nonzero()[0])
        raise InputError(
            f"row {row} is to keep {keep[row]} tokens, but has {int(have[row].min())}", hint="keep at most all of them"
        )
    if bool((needed > kept).any()):
        row = int((needed > kept).any(-1).any(-1).nonzero()[0])
        raise InputError(
            f"row {row} keeps {keep[row]} tokens, but {int(needed[row].max())} are protected or recent",
            hint="raise the budget, protect fewer tokens, or choose a smaller recent window",
        )


def next_slot(score: torch.Tensor, pos: torch.Tensor, recent: torch.Tensor | int) -> torch.Tensor:
    """Return the slot that the next token takes: the lowest score outside the recent window.

    Parameters
    ----------
    score
        ``(B, H, C)``; infinity never goes.
    pos
        ``(B, H, C)``: own positions, -1 in an empty slot, which is never chosen.
    recent
        The window, per row ``(B,)`` or one for all, the next token included.

    Returns
    -------
    torch.Tensor
        ``(B, H)`` int64.

    Examples
    --------
    >>> score = torch.tensor([[[0.4, 0.1, 0.0]]])
    >>> next_slot(score, torch.tensor([[[3, 5, 6]]]), recent=2)
    tensor([[1]])

    Notes
    -----
    Between equal scores the older token goes. Where the window and infinity leave none, it is the oldest token that is
    not at infinity, and where all are at infinity the oldest.
    """
    last = pos.amax(-1, keepdim=True)
    window = recent[:, None, None] if isinstance(recent, torch.Tensor) else recent
    # The next token is at last + 1 and takes one place of the window.
    held = (pos > last + 1 - window) & (window > 1)
    free = score < torch.inf
    best = score.masked_fill(held, torch.inf).masked_fill(pos < 0, torch.inf)
    lowest = best.amin(-1, keepdim=True)
    # Outside the window; else what is not at infinity; else anything that lives.
    choice = torch.where(lowest < torch.inf, best == lowest, free & (pos >= 0))
    choice = torch.where(choice.any(-1, keepdim=True), choice, pos >= 0)
    slot: torch.Tensor = pos.masked_fill(~choice, torch.iinfo(pos.dtype).max).argmin(-1)
    return slot
