"""Masked attention between the fields: which crosses a model may use is named, inspectable, and may be learned."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalfew.core import InputError
from vitalfew.embeddings.models._base import Bags, ClickModel, check_top, linear
from vitalfew.embeddings.models._base import layers as chain

__all__ = ["AdRec", "Mask"]

# B samples, T tokens (the dense inputs, then the features), D width of the rows, H heads

Pair: TypeAlias = tuple[int | str, int | str]
Mask: TypeAlias = Literal["none", "triangular", "learned"] | Sequence[Pair]

DENSE = "(dense)"
"""The name of the token that the dense inputs make."""
_KEEP = 0.5


class _Layer(nn.Module):
    """A pre-norm transformer layer whose attention is masked."""

    def __init__(self, dim: int, heads: int, feed_forward: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_feed = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_key_value = linear(dim, 3 * dim, generator)
        self.out = linear(dim, dim, generator)
        self.feed = nn.Sequential(
            linear(dim, feed_forward * dim, generator), nn.ReLU(), linear(feed_forward * dim, dim, generator)
        )

    def forward(self, tokens_BTD: Tensor, allowed_TT: Tensor, leaning_TT: Tensor | None) -> Tensor:
        samples, tokens, dim = tokens_BTD.shape
        parts = self.query_key_value(self.norm_attention(tokens_BTD)).view(
            samples, tokens, 3, self.heads, dim // self.heads
        )
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed_TT)
        if leaning_TT is not None:
            # Adds exactly nothing, but carries a gradient to the logit of every pair, pruned ones included: without
            # it a pair that is out could never come back.
            soft = F.scaled_dot_product_attention(q.detach(), k.detach(), v.detach(), attn_mask=leaning_TT.to(q.dtype))
            found = found + (soft - soft.detach())
        mixed = tokens_BTD + self.out(found.transpose(1, 2).reshape(samples, tokens, dim))
        fed: Tensor = mixed + self.feed(self.norm_feed(mixed))
        return fed


class AdRec(ClickModel):
    """Transformer layers over the fields, with a mask that says which pairs of fields may meet.

    A reconstruction after Ad-Rec (arXiv 2308.14902), which publishes neither code nor heads, layers or the rule of
    its mask. Each field is a token; the top layers read all tokens side by side, so that what the mask keeps apart
    is not mixed by pooling.

    Parameters
    ----------
    tables
        The embedding bags, ``F`` features of width ``D``.
    dense_in
        Number of dense inputs; they make one more token, the first. With 0 there is no bottom part.
    bottom
        Widths of the bottom layers; the last must be ``D``.
    top
        Widths of the top layers; the last must be 1.
    layers, heads, feed_forward
        Transformer layers, heads (they divide ``D``), and the width of the feed-forward part in units of ``D``.
    mask
        ``"none"``: every field sees every other. ``"triangular"``: each pair meets once, the later field sees the
        earlier one. ``"learned"``: a logit per pair, and those with the highest meet. Or the pairs that meet, by
        place or name (``"(dense)"`` is the token of the dense inputs). A field always sees itself.
    keep
        With a learned mask: the share of the pairs that meet.
    generator
        For the initial dense weights.

    Examples
    --------
    >>> import torch
    >>> from vitalfew.embeddings import SGD, EmbeddingBags, Table
    >>> from vitalfew.embeddings.models.adrec import AdRec
    >>> tables = EmbeddingBags([Table("user", 10, 8), Table("item", 20, 8), Table("hour", 24, 8)], SGD(lr=0.1))
    >>> model = AdRec(tables, dense_in=3, bottom=(16, 8), top=(16, 1), mask=[("user", "item"), ("item", "hour")])
    >>> model(torch.zeros(5, 3), torch.zeros(5, 3, dtype=torch.int64)).shape
    torch.Size([5])
    >>> model.pruned_pairs()
    [('(dense)', 'user'), ('(dense)', 'item'), ('(dense)', 'hour'), ('user', 'hour')]

    Notes
    -----
    Cost: a layer takes about ``(8 + 4 * feed_forward) * T * D**2 + 4 * T**2 * D`` operations per sample, forward,
    for ``T`` tokens; training a learned mask attends twice.
    """

    allowed: Tensor
    _pairs: Tensor

    def __init__(
        self,
        tables: Bags,
        *,
        dense_in: int,
        bottom: Sequence[int] = (512, 256, 64, 16),
        top: Sequence[int] = (512, 256, 1),
        layers: int = 1,
        heads: int = 2,
        feed_forward: int = 2,
        mask: Mask = "triangular",
        keep: float = _KEEP,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(tables, dense_in)
        check_top(top)
        if dense_in and (not bottom or bottom[-1] != tables.dim):
            raise InputError(f"the bottom is {tuple(bottom)}, the rows have {tables.dim}", hint="end with their width")
        for name, value in (("layers", layers), ("heads", heads), ("feed_forward", feed_forward)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}", hint="one layer, two heads are usual")
        if tables.dim % heads:
            raise InputError(
                f"{heads} heads do not divide rows of {tables.dim}",
                hint="use heads=1, or rows whose width the heads divide (--dim)",
            )
        if not 0 < keep <= 1:
            raise InputError(f"keep is a share above 0 and up to 1, got {keep}", hint="0.5 keeps half of the pairs")
        if keep != _KEEP and mask != "learned":
            raise InputError(f"keep={keep} says nothing with this mask", hint='pass mask="learned"')
        self.fields = (*((DENSE,) if dense_in else ()), *tables.features)
        if len(self.fields) < 2:
            raise InputError(f"{len(self.fields)} field has no pair", hint="pass dense inputs or another feature")
        self.bottom = chain([dense_in, *bottom], generator, last_linear=False) if dense_in else None
        self.layers = nn.ModuleList([_Layer(tables.dim, heads, feed_forward, generator) for _ in range(layers)])
        self.norm = nn.LayerNorm(tables.dim)
        self.top = chain([len(self.fields) * tables.dim, *top], generator, last_linear=True)
        self.register_buffer("allowed", _allowed(mask, self.fields), persistent=False)
        self.pair_logits: nn.Parameter | None = None
        if mask == "learned":
            pairs = len(self.fields) * (len(self.fields) - 1) // 2
            self.num_kept = max(1, round(keep * pairs))
            self.pair_logits = nn.Parameter(torch.empty(pairs).normal_(0, 0.01, generator=generator))
            places = torch.tensor(list(combinations(range(len(self.fields)), 2))).T
            self.register_buffer("_pairs", places, persistent=False)

    def forward(self, dense: Tensor | None, ids: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return one logit per sample, shape (samples,); the arguments are those of `DLRM.forward`."""
        tokens = self._look_up(dense, ids, offsets)
        if self.bottom is not None and dense is not None:
            low = self.bottom(dense)
            tokens = torch.cat([low.unsqueeze(1).to(tokens.dtype), tokens], dim=1)
        logit: Tensor = self.top(self.norm(self.mixed(tokens)).flatten(1))
        return logit.squeeze(1)

    def mixed(self, tokens_BTD: Tensor) -> Tensor:
        """Return the tokens after all transformer layers, before the last norm."""
        allowed, leaning = self.attention_mask(), None
        if self.pair_logits is not None and self.training:
            leaning = self._square(F.logsigmoid(self.pair_logits), 0.0)
        for layer in self.layers:
            tokens_BTD = layer(tokens_BTD, allowed, leaning)
        return tokens_BTD

    def attention_mask(self) -> Tensor:
        """Return which field (line) sees which (column), shape (fields, fields)."""
        if self.pair_logits is None:
            return self.allowed
        best = self.pair_logits.detach().topk(self.num_kept).indices
        kept = torch.zeros_like(self.pair_logits, dtype=torch.bool).index_fill(0, best, True)
        return self._square(kept, True)

    def pruned_pairs(self) -> list[tuple[str, str]]:
        """Return the pairs of fields that do not meet, by name."""
        seen = self.attention_mask()
        meet = (seen | seen.T).tolist()
        names = enumerate(self.fields)
        return [(a, b) for (i, a), (j, b) in combinations(names, 2) if not meet[i][j]]

    def _square(self, values: Tensor, diagonal: float | bool) -> Tensor:
        """Lay values of pairs out as a symmetric square."""
        i, j = self._pairs
        square = torch.full((len(self.fields),) * 2, diagonal, dtype=values.dtype, device=values.device)
        return square.index_put((torch.cat([i, j]), torch.cat([j, i])), torch.cat([values, values]))


def _allowed(mask: Mask, fields: Sequence[str]) -> Tensor:
    """Return which field (line) sees which (column); for a learned mask, which one may learn to see."""
    size = len(fields)
    if isinstance(mask, str):
        if mask not in ("none", "triangular", "learned"):
            raise InputError(f"there is no mask {mask!r}", hint="use none, triangular, learned, or a list of pairs")
        every = torch.ones(size, size, dtype=torch.bool)
        return every.tril() if mask == "triangular" else every
    seen = torch.eye(size, dtype=torch.bool)
    for pair in mask:
        if isinstance(pair, str) or len(pair) != 2:
            raise InputError(f"a pair of fields is two, got {pair!r}", hint='such as ("user", "item")')
        i, j = (_place(field, fields) for field in pair)
        seen[i, j] = seen[j, i] = True
    return seen


def _place(field: int | str, fields: Sequence[str]) -> int:
    """Return the place of a field among the tokens."""
    if isinstance(field, str):
        if field not in fields:
            raise InputError(f"no field is named {field!r}", hint=f"there are {', '.join(fields)}")
        return fields.index(field)
    if not 0 <= field < len(fields):
        raise InputError(f"no field has the place {field}", hint=f"there are {len(fields)}, from 0")
    return field
