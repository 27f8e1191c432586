"""From logits to tokens, for all rows at once; a row's choice depends on its own numbers alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["best", "draw"]


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
    [1, 0]
    """
    tokens: list[int] = logits.argmax(-1).tolist()
    rows = [row for row, heat in enumerate(temperature) if heat > 0]
    if rows:
        heat, share, point = (
            torch.tensor([of[row] for row in rows], dtype=torch.float32, device=logits.device)[:, None]
            for of in (temperature, top_p, uniform)
        )
        chances, order = (logits[rows] / heat).softmax(-1).sort(dim=-1, descending=True, stable=True)
        upto = chances.cumsum(-1)
        inside = upto - chances < share  # the token that reaches the share is still in
        inside[:, 0] = True
        upto = upto.masked_fill(~inside, 0.0).cummax(-1).values
        at = torch.searchsorted(upto, point * upto[:, -1:], right=True)
        at = torch.minimum(at, inside.sum(-1, keepdim=True) - 1)  # the product may round up to the end
        for row, token in zip(rows, order.gather(-1, at)[:, 0].tolist(), strict=True):
            tokens[row] = token
    return tokens


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
