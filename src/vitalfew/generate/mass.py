"""How much of the attention kept tokens have: by layer and head, over which tokens, and what that bounds.

B rows, H key-value heads, Hq query heads (G per key-value head), n queries, m keys, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vitalfew.core.errors import InputError

if TYPE_CHECKING:
    from vitalfew.generate.scores import Logits

__all__ = ["LayerMass", "attention_mass", "coverage_curve", "kept_mask", "layer_mass", "output_bound", "slots_for_mass"]

_ELEMENTS = 1 << 22
"""Logits that exist at a time: never queries times keys of a long text."""


def attention_mass(
    query: torch.Tensor,
    keys: torch.Tensor,
    kept: torch.Tensor,
    form: Logits,
    *,
    key_pos: torch.Tensor,
    query_pos: torch.Tensor,
) -> torch.Tensor:
    """Return the share of the attention that kept keys have, ``(B, Hq)``, on average over the queries that see a key.

    The share is 1 less what dropped keys had, so a model's attention sinks, which nothing drops, count as kept.

    Parameters
    ----------
    query, keys
        ``(B, Hq, n, d)`` and ``(B, H, m, d)``, as they enter the product: after rotary embedding.
    kept
        Bool ``(B, H, m)``.
    form
        How logits are made.
    key_pos, query_pos
        Own positions ``(B, H, m)`` and ``(B, n)``; -1 is padding, which is neither seen nor counted.

    Examples
    --------
    >>> from vitalfew.generate.scores import Logits
    >>> keys, at = torch.zeros(1, 1, 4, 8), torch.arange(4)
    >>> kept = torch.tensor([[[True, False, False, True]]])
    >>> attention_mass(keys[:, :, 3:], keys, kept, Logits(1.0), key_pos=at.view(1, 1, 4), query_pos=at[3:][None]).item()
    0.5

    Notes
    -----
    Cost: one product of queries and keys, in blocks of queries.
    """
    rows, num_heads, n, size = query.shape
    heads, m = keys.shape[1], keys.shape[2]
    if kept.shape != (rows, heads, m) or num_heads % heads:
        raise InputError(
            f"kept has shape {tuple(kept.shape)} for {num_heads} query heads and keys {tuple(keys.shape)}",
            hint="pass one flag per row, key-value head and key",
        )
    grouped = query.reshape(rows, heads, -1, n, size).float()
    transposed = keys.float().mT.unsqueeze(2)
    near = key_pos[:, :, None, None, :]
    dropped = ~kept[:, :, None, None, :]
    lost = torch.zeros((rows, heads, num_heads // heads), dtype=torch.float64, device=query.device)
    block = max(1, _ELEMENTS // (rows * num_heads * m))
    for start in range(0, n, block):
        at = query_pos[:, None, None, start : start + block, None]
        x = (grouped[:, :, :, start : start + block] @ transposed) * form.scale
        if form.softcap is not None:
            x = torch.tanh(x / form.softcap) * form.softcap
        if form.slopes is not None:
            x = x + form.slopes.float().view(1, heads, -1, 1, 1) * (near - at)
        x = x.masked_fill((near < 0) | (near > at), -torch.inf)
        total = torch.logsumexp(x, -1, keepdim=True)
        if form.sinks is not None:
            total = torch.logaddexp(total, form.sinks.float().view(1, heads, -1, 1, 1))
        gone = (x - total).exp_().mul_(dropped).sum(-1)
        # A query that sees nothing has logits of minus infinity alone, and their difference is not a number.
        lost += gone.masked_fill(at.squeeze(-1) < 0, 0.0).sum(-1)
    seen = (query_pos >= 0).sum(1).clamp(min=1)
    return (1 - lost.flatten(1) / seen[:, None]).clamp_(0, 1).float()


def output_bound(mass: torch.Tensor, max_v: torch.Tensor | float) -> torch.Tensor:
    """Return how far the attention's output can lie from that over all keys, for one head and query: 2 (1 - m) max|v|.

    Parameters
    ----------
    mass
        Share of the attention that kept keys have.
    max_v
        The largest norm among all values; the bound is in the same norm.

    Examples
    --------
    >>> output_bound(torch.tensor([1.0, 0.75]), 2.0).tolist()
    [0.0, 1.0]

    Notes
    -----
    For a layer with unchanged inputs; it says nothing of what later layers make of the difference.
    """
    return 2 * (1 - mass) * max_v


def kept_mask(slot_pos: torch.Tensor, key_pos: torch.Tensor) -> torch.Tensor:
    """Return which keys lie in a slot: bool ``(B, H, m)`` from positions ``(B, H, C)`` and ``(B, H, m)``.

    Examples
    --------
    >>> kept_mask(torch.tensor([[[2, 0, -1]]]), torch.tensor([[[-1, 0, 1, 2]]])).tolist()
    [[[False, True, False, True]]]
    """
    size = int(torch.maximum(slot_pos.max(), key_pos.max())) + 2
    table = torch.zeros((*slot_pos.shape[:2], size), dtype=torch.bool, device=slot_pos.device)
    table.scatter_(2, slot_pos.long() + 1, True)
    table[..., 0] = False  # where empty slots and padding meet
    return table.gather(2, key_pos.long() + 1)


def coverage_curve(votes: torch.Tensor, first: torch.Tensor | None = None) -> torch.Tensor:
    """Return the share of the votes that the best 1, 2, ... n tokens of each head have, ``(B, H, n)``.

    Parameters
    ----------
    votes
        ``(B, H, n)``, not negative: attention summed over queries; 0 for padding.
    first
        Bool ``(B, H, n)``: tokens that stay in any case, and so come first.

    Examples
    --------
    >>> coverage_curve(torch.tensor([[[1.0, 6.0, 3.0]]])).tolist()
    [[[0.6000000238418579, 0.8999999761581421, 1.0]]]
    """
    if not bool(torch.isfinite(votes).all()) or bool((votes < 0).any()):
        raise InputError("votes must be finite and not negative", hint="pass sums of attention weights")
    order = votes if first is None else torch.where(first, torch.inf, votes)
    best = votes.gather(2, order.argsort(dim=2, descending=True, stable=True)).double()
    return (best.cumsum(2) / best.sum(2, keepdim=True).clamp(min=1e-30)).clamp(max=1).float()


def slots_for_mass(curve: torch.Tensor, mass: float) -> torch.Tensor:
    """Return the fewest tokens of each head that have this share, int64 ``(B, H)``.

    Examples
    --------
    >>> slots_for_mass(torch.tensor([[[0.6, 0.9, 1.0]]]), 0.9).item()
    2
    """
    if not 0 < mass <= 1:
        raise InputError(f"a mass must lie in (0, 1], got {mass}", hint="0.99 loses 1 % of the attention")
    return ((curve < mass - 1e-6).sum(2) + 1).clamp(max=curve.shape[2])


@dataclass(frozen=True, slots=True)
class LayerMass:
    """What the kept tokens of one layer had of the attention, and where in the text they lie.

    Attributes
    ----------
    layer
        Its index.
    lowest, p10, median
        Over rows and heads: the least, the tenth part from below, and the middle.
    spans
        Share of the kept tokens in each span, such as sinks, protected, recent and rest; they add up to 1.
    histogram
        Share of the kept tokens in equal parts of the text, first to last.
    """

    layer: int
    lowest: float
    p10: float
    median: float
    spans: Mapping[str, float]
    histogram: tuple[float, ...]


def layer_mass(
    layer: int,
    mass: torch.Tensor,
    pos: torch.Tensor,
    counts: Sequence[int],
    *,
    sinks: int = 0,
    protect: Sequence[slice] = (),
    recent: Sequence[int] | int = 0,
    bins: int = 10,
) -> LayerMass:
    """Return the account of one layer.

    Parameters
    ----------
    layer
        Its index.
    mass
        ``(B, H)`` or ``(B, Hq)``: share of the attention that kept tokens have.
    pos
        ``(B, H, C)``: positions of the kept tokens, -1 for none.
    counts
        Per row: its tokens.
    sinks, protect, recent
        First tokens, slices and latest tokens (one number, or one per row) that stay in any case; a token that is in
        several spans counts for the first of these.
    bins
        Parts of the histogram.

    Examples
    --------
    >>> layer_mass(0, torch.tensor([[0.9]]), torch.tensor([[[0, 5, 8, 9]]]), [10], sinks=1, recent=2, bins=2)
    LayerMass(layer=0, lowest=0.9, p10=0.9, median=0.9, spans={'sinks': 0.25, 'protected': 0.0, 'recent': 0.5, \
'rest': 0.25}, histogram=(0.25, 0.75))
    """
    live = pos >= 0
    total = int(live.sum())
    if not total:
        raise InputError(f"layer {layer} keeps no token", hint="ask after the prompt")
    length = torch.tensor(list(counts), device=pos.device)[:, None, None]
    window = torch.as_tensor(recent, device=pos.device)
    window = window[:, None, None] if window.ndim else window
    pinned = torch.zeros_like(live)
    for span in protect:
        for row, count in enumerate(counts):
            start, stop, _ = span.indices(count)
            pinned[row] |= (pos[row] >= start) & (pos[row] < stop)
    spans, left = {}, live
    for name, inside in (("sinks", pos < sinks), ("protected", pinned), ("recent", pos >= length - window)):
        spans[name] = int((left & inside).sum()) / total
        left = left & ~inside
    spans["rest"] = int(left.sum()) / total
    part = (pos.long() * bins // length).clamp(0, bins - 1)[live]
    histogram = torch.bincount(part, minlength=bins).tolist()
    values = mass.flatten().double()
    p10, median = torch.quantile(values, torch.tensor([0.1, 0.5], dtype=torch.float64, device=mass.device)).tolist()
    return LayerMass(
        layer, round(float(values.min()), 6), round(p10, 6), round(median, 6), spans,
        tuple(count / total for count in histogram),
    )  # fmt: skip
