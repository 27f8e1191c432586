"""The deep learning recommendation model: dense layers below, dot products between all fields, dense layers above."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitalfew.embeddings.models._base import Bags, check_top
from vitalfew.embeddings.models._dots import DotModel

__all__ = ["DLRM"]


class DLRM(DotModel):
    """DLRM (Naumov et al., arXiv 1906.00091): the dot products of all pairs of fields feed the top layers.

    Parameters
    ----------
    tables
        The embedding bags, ``F`` features of width ``D``.
    dense_in
        Number of dense inputs; with 0 there is no bottom part.
    bottom
        Widths of the bottom layers; the last must be ``D``.
    top
        Widths of the top layers; the last must be 1.
    generator
        For the initial dense weights.

    Examples
    --------
    >>> import torch
    >>> from vitalfew.embeddings import DLRM, SGD, EmbeddingBags, Table
    >>> tables = EmbeddingBags([Table("user", 10, 8), Table("item", 20, 8)], SGD(lr=0.1))
    >>> model = DLRM(tables, dense_in=3, bottom=(16, 8), top=(16, 1))
    >>> model(torch.zeros(5, 3), torch.zeros(5, 2, dtype=torch.int64)).shape
    torch.Size([5])
    """

    def __init__(
        self,
        tables: Bags,
        *,
        dense_in: int,
        bottom: Sequence[int] = (512, 256, 64, 16),
        top: Sequence[int] = (512, 256, 1),
        generator: torch.Generator | None = None,
    ) -> None:
        check_top(top)
        super().__init__(tables, dense_in, bottom, top, generator)

    def forward(self, dense: Tensor | None, ids: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return one logit per sample, shape (samples,).

        Parameters
        ----------
        dense
            float32, shape (samples, dense_in); without dense inputs None, or no columns.
        ids, offsets
            As the tables take them.
        """
        return self._vectors(dense, self._look_up(dense, ids, offsets)).squeeze(1)
