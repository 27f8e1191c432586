"""From logits to tokens, for all rows at once; a row's choice depends on its own numbers alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["best", "draw"]

_COLD = 1e-5
"""At and below this temperature the likeliest token is all but certain, and the division would overflow."""
_FEW = 1024
"""Tokens that mostly have the share that is drawn from: to sort all takes ten times as long as to find so many."""


def draw(
    logits: torch.Tensor, temperature: Sequence[float], top_p: Sequence[float], uniform: Sequence[float]
) -> list[int]:
    """Return one token per row.

    Parameters
    ----------
    logits
        ``(rows, vocabulary)``, float32.
    temperature
        Per row; 0 takes the likeliest token.
    top_p
        Per row: the likeliest tokens that together have this probability are drawn from.
    uniform
        Per row: a number in [0, 1) that decides.

    Examples
    --------
    >>> logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0]])
    >>> draw(logits, temperature=[0, 1], top_p=[1, 1], uniform=[0.5, 0.95])
    [1, 2]
    """
    tokens: list[int] = logits.argmax(-1).tolist()
    warm = [row for row, heat in enumerate(temperature) if heat > _COLD]
    # Who draws from all tokens needs no order of them.
    for cut in (False, True):
        rows = [row for row in warm if (top_p[row] < 1) is cut]
        if rows:
            heat, share, point = (
                torch.tensor([of[row] for row in rows], dtype=torch.float32, device=logits.device)[:, None]
                for of in (temperature, top_p, uniform)
            )
            chances = (logits[rows] / heat).softmax(-1)
            drawn = _of_likeliest(chances, share, point, _FEW) if cut else _at(chances, point)
            for row, token in zip(rows, drawn[:, 0].tolist(), strict=True):
                tokens[row] = token
    return tokens


def _of_likeliest(chances: torch.Tensor, share: torch.Tensor, point: torch.Tensor, most: int) -> torch.Tensor:
    """Return the tokens that points fall on among the likeliest that have a share of the chances, ``(rows, 1)``."""
    size = chances.shape[-1]
    top, order = chances.topk(min(most, size))
    outside = top.cumsum(-1) - top >= share  # the token that reaches the share is still in
    outside[:, 0] = False
    tokens = order.gather(-1, _at(top.masked_fill(outside, 0.0), point))
    flat = (top.sum(-1) < share[:, 0]).nonzero()[:, 0]
    if most < size and len(flat):
        tokens[flat] = _of_likeliest(chances[flat], share[flat], point[flat], size)
    return tokens


def _at(chances: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    """Return where a point in [0, 1) falls among chances, ``(rows, 1)``."""
    upto = chances.cumsum(-1)
    total = upto[:, -1:].contiguous()
    last = torch.searchsorted(upto, total)  # with any chance: the product below may round up to the end
    return torch.minimum(torch.searchsorted(upto, point * total, right=True), last)


def best(logits: torch.Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Return the log probability of a token, and the likeliest tokens with theirs, from one row of logits.

    Examples
    --------
    >>> chosen, top = best(torch.tensor([0.0, 0.0]), token=1, count=1)
    >>> round(chosen, 3), top[0][0]
    (-0.693, 0)
    """
    chances = logits.log_softmax(-1)
    values, tokens = chances.topk(min(count, len(chances)))
    return float(chances[token]), list(zip(tokens.tolist(), values.tolist(), strict=True))
