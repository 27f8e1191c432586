"""A model of histories: each item becomes a vector as in DLRM, and the last one says which of the others matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalfew.core import InputError
from vitalfew.embeddings.models._base import Bags, check_top, layers
from vitalfew.embeddings.models._dots import DotModel

__all__ = ["TBSM"]


class TBSM(DotModel):
    """TBSM (Ishkhanov et al., arXiv 2010.09560): DLRM vectors of a history, summed by their similarity to the last.

    Bottom layers, dot products and top layers make a vector of each item, which is projected to the sphere. The
    similarities of the items before to the last one pass through a few layers; what comes out weighs the items
    in a sum, and the final layers read that sum and the last item.

    Parameters
    ----------
    tables
        The embedding bags, ``F`` features of width ``D``: those of one item.
    history
        Number of items before the last one; a sample has ``history + 1``. Fill shorter ones in front, with an id
        that is kept for this.
    dense_in
        Number of dense inputs of one item.
    bottom
        Widths of the bottom layers; the last must be ``D``.
    top
        Widths of the top layers; the last is that of an item's vector.
    similarity
        Of two vectors: ``"dot"``; ``"indefinite"``, by way of a matrix ``A``; ``"semidefinite"``, by way of ``A'A``.
        ``A`` begins as the identity, so that all three begin alike.
    coefficients
        Widths of the hidden layers between similarities and weights.
    final
        Widths of the final layers; the last must be 1.
    generator
        For the initial dense weights.

    Examples
    --------
    >>> import torch
    >>> from vitalfew.embeddings import SGD, EmbeddingBags, Table
    >>> from vitalfew.embeddings.models import TBSM
    >>> tables = EmbeddingBags([Table("user", 10, 8), Table("item", 20, 8)], SGD(lr=0.1))
    >>> model = TBSM(tables, history=4, dense_in=3, bottom=(16, 8))
    >>> model(torch.zeros(2, 5, 3), torch.zeros(2, 5, 2, dtype=torch.int64)).shape
    torch.Size([2])
    """

    def __init__(
        self,
        tables: Bags,
        *,
        history: int,
        dense_in: int,
        bottom: Sequence[int] = (16,),
        top: Sequence[int] = (15, 15),
        similarity: Literal["dot", "indefinite", "semidefinite"] = "semidefinite",
        coefficients: Sequence[int] = (15, 15),
        final: Sequence[int] = (60, 1),
        generator: torch.Generator | None = None,
    ) -> None:
        if history < 1:
            raise InputError(f"history must be at least 1, got {history}", hint="without one, use DLRM")
        if not top:
            raise InputError("the top is (), an item needs a vector", hint="end with its width, such as (15, 15)")
        if similarity not in ("dot", "indefinite", "semidefinite"):
            raise InputError(f"there is no similarity {similarity!r}", hint="use dot, indefinite or semidefinite")
        check_top(final)
        super().__init__(tables, dense_in, bottom, top, generator)
        self.history, self.similarity = history, similarity
        width = top[-1]
        self.metric: nn.Parameter | None = None
        if similarity != "dot":
            self.metric = nn.Parameter(torch.eye(width))
        self.coefficients = layers([history, *coefficients, history], generator, last_linear=True)
        self.final = layers([2 * width, *final], generator, last_linear=True)

    def forward(self, dense: Tensor | None, ids: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return one logit per sample, shape (samples,).

        Parameters
        ----------
        dense
            float32, shape (samples, history + 1, dense_in); without dense inputs None, or no columns. The items may
            lie side by side, as `vitalfew.data.Histories` has them: (samples, (history + 1) * dense_in).
        ids, offsets
            Shape (samples, history + 1, F), or side by side. Bags: as the tables take them, item by item inside a
            sample.
        """
        items, features = self.history + 1, len(self.tables.features)
        if offsets is None and ids.dim() == 2 and ids.shape[1] == items * features:
            ids = ids.reshape(ids.shape[0], items, features)
        if dense is not None and dense.dim() == 2 and dense.shape[1] == items * self.dense_in:
            dense = dense.reshape(dense.shape[0], items, self.dense_in)
        if offsets is None and tuple(ids.shape[1:]) != (items, features):
            raise InputError(
                f"expected ids of shape (samples, {items}, {features}), got {tuple(ids.shape)}",
                hint="the items of a history in the order of time, the last one last",
            )
        bags = features * items
        if offsets is not None and (offsets.shape[0] - 1) % bags:
            raise InputError(
                f"{offsets.shape[0] - 1} bags do not divide among {items} items of {features} features",
                hint="a sample has history + 1 items",
            )
        samples = ids.shape[0] if offsets is None else (offsets.shape[0] - 1) // bags
        self._check_dense(dense, samples, items)
        fields = self.tables(ids.flatten(0, 1) if offsets is None else ids, offsets)
        vectors = F.normalize(self._vectors(None if dense is None else dense.flatten(0, 1), fields), dim=1)
        vectors = vectors.view(samples, items, vectors.shape[1])
        before, last = vectors[:, :-1], vectors[:, -1]
        weights = self.coefficients(self._similarity(before, last))
        context = torch.bmm(weights.unsqueeze(1), before).squeeze(1)
        logit: Tensor = self.final(torch.cat([context, last], dim=1))
        return logit.squeeze(1)

    def _similarity(self, before: Tensor, last: Tensor) -> Tensor:
        """Return how similar each item is to the last one, shape (samples, history)."""
        if self.metric is not None:
            last = last @ self.metric.T
            if self.similarity == "semidefinite":
                last = last @ self.metric
        return torch.bmm(before, last.unsqueeze(2)).squeeze(2)
