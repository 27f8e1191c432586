"""A linear model that remembers and deep layers that generalise, trained together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitalfew.embeddings.models._base import Bags
from vitalfew.embeddings.models._wide import WideModel

__all__ = ["WideDeep"]


class WideDeep(WideModel):
    """Wide & Deep (Cheng et al., arXiv 1606.07792): the sum of a linear model and deep layers.

    Crosses for the wide part are features of their own: name them when the log is encoded.

    Parameters
    ----------
    tables
        The embedding bags, ``F`` features of width ``D``, at least 2. The first number of a row is its linear weight;
        the others are its factors, which the deep layers read.
    dense_in
        Number of dense inputs; the linear model and the deep layers have them both.
    top
        Widths of the deep layers; the last must be 1.
    generator
        For the initial dense weights.

    Examples
    --------
    >>> import torch
    >>> from vitalfew.embeddings import SGD, EmbeddingBags, Table
    >>> from vitalfew.embeddings.models import WideDeep
    >>> tables = EmbeddingBags([Table("user", 10, 8), Table("item", 20, 8)], SGD(lr=0.1))
    >>> model = WideDeep(tables, dense_in=3, top=(16, 1))
    >>> model(torch.zeros(5, 3), torch.zeros(5, 2, dtype=torch.int64)).shape
    torch.Size([5])

    Notes
    -----
    One update rule has the whole row. `RowwiseAdagrad` keeps one sum for linear weight and factors together; where
    their gradients differ much in size, `Adagrad` suits better.
    """

    def __init__(
        self,
        tables: Bags,
        *,
        dense_in: int,
        top: Sequence[int] = (512, 256, 1),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(tables, dense_in, top, generator)

    def forward(self, dense: Tensor | None, ids: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return one logit per sample, shape (samples,); the arguments are those of `DLRM.forward`."""
        logit, _ = self._parts(dense, ids, offsets)
        return logit
