"""Deep and cross network: layers that multiply their output with the inputs, for crosses of a bounded degree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vitalfew.core import InputError
from vitalfew.embeddings.models._base import Bags, ClickModel, check_top, layers, linear

__all__ = ["DCNv2"]


class _Cross(nn.Module):
    """One cross layer, ``x0 * (W x + b) + x``; with a rank, ``W`` is the product of two narrow matrices."""

    def __init__(self, width: int, rank: int | None, generator: torch.Generator | None) -> None:
        super().__init__()
        self.narrow = None if rank is None else nn.Linear(width, rank, bias=False)
        if self.narrow is not None:
            with torch.no_grad():
                self.narrow.weight.normal_(0, (2 / (width + self.narrow.out_features)) ** 0.5, generator=generator)
        self.full = linear(rank or width, width, generator)

    def forward(self, first: Tensor, x: Tensor) -> Tensor:
        weighed: Tensor = self.full(x if self.narrow is None else self.narrow(x))
        return first * weighed + x


class DCNv2(ClickModel):
    """DCN-v2 (Wang et al., arXiv 2008.13535): cross layers over all inputs, beside deep layers or below them.

    Parameters
    ----------
    tables
        The embedding bags, ``F`` features of width ``D``; with the dense inputs they make ``x0``.
    dense_in
        Number of dense inputs.
    crosses
        Number of cross layers; ``n`` of them reach crosses of degree ``n + 1``.
    rank
        Of the matrices in the cross layers; by default they are full.
    top
        Widths of the deep layers; the last must be 1. With ``(1,)`` there are none.
    structure
        ``"parallel"``: cross and deep layers read the inputs, and a last layer reads both. ``"stacked"``: the deep
        layers read what the cross layers give.
    generator
        For the initial dense weights.

    Examples
    --------
    >>> import torch
    >>> from vitalfew.embeddings import SGD, EmbeddingBags, Table
    >>> from vitalfew.embeddings.models import DCNv2
    >>> tables = EmbeddingBags([Table("user", 10, 8), Table("item", 20, 8)], SGD(lr=0.1))
    >>> model = DCNv2(tables, dense_in=3, crosses=2, rank=4, top=(16, 1))
    >>> model(torch.zeros(5, 3), torch.zeros(5, 2, dtype=torch.int64)).shape
    torch.Size([5])
    """

    def __init__(
        self,
        tables: Bags,
        *,
        dense_in: int,
        crosses: int = 3,
        rank: int | None = None,
        top: Sequence[int] = (512, 256, 1),
        structure: Literal["parallel", "stacked"] = "parallel",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(tables, dense_in)
        check_top(top)
        width = dense_in + len(tables.features) * tables.dim
        if crosses < 1:
            raise InputError(f"crosses must be at least 1, got {crosses}", hint="3 is the default")
        if rank is not None and not 1 <= rank < width:
            raise InputError(f"rank {rank} does not lie between 1 and the {width} inputs", hint="None: full matrices")
        if structure not in ("parallel", "stacked"):
            raise InputError(f"there is no structure {structure!r}", hint="use 'parallel' or 'stacked'")
        self.crosses = nn.ModuleList(_Cross(width, rank, generator) for _ in range(crosses))
        hidden = tuple(top[:-1])
        self.deep = layers([width, *hidden], generator, last_linear=False) if hidden else None
        self.last = linear((hidden or (0,))[-1] + (width if structure == "parallel" or not hidden else 0), 1, generator)
        self.structure = structure

    def forward(self, dense: Tensor | None, ids: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return one logit per sample, shape (samples,); the arguments are those of `DLRM.forward`."""
        first = x = self._side_by_side(dense, self._look_up(dense, ids, offsets))
        for cross in self.crosses:
            x = cross(first, x)
        if self.deep is not None:
            x = self.deep(x) if self.structure == "stacked" else torch.cat([x, self.deep(first)], dim=1)
        logit: Tensor = self.last(x)
        return logit.squeeze(1)
