"""A factorisation machine and deep layers over the same rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitalfew.embeddings.models._base import Bags
from vitalfew.embeddings.models._wide import WideModel

__all__ = ["DeepFM"]


class DeepFM(WideModel):
    """DeepFM (Guo et al., arXiv 1703.04247): linear weights, dot products of all pairs of factors, and deep layers.

    Parameters
    ----------
    tables
        The embedding bags, ``F`` features of width ``D``, at least 2. The first number of a row is its linear weight;
        the others are its factors, which are multiplied in pairs and read by the deep layers.
    dense_in
        Number of dense inputs. They have linear weights and go to the deep layers; they have no factors.
    top
        Widths of the deep layers; the last must be 1.
    generator
        For the initial dense weights.

    Examples
    --------
    >>> import torch
    >>> from vitalfew.embeddings import SGD, EmbeddingBags, Table
    >>> from vitalfew.embeddings.models import DeepFM
    >>> tables = EmbeddingBags([Table("user", 10, 8), Table("item", 20, 8)], SGD(lr=0.1))
    >>> model = DeepFM(tables, dense_in=3, top=(16, 1))
    >>> model(torch.zeros(5, 3), torch.zeros(5, 2, dtype=torch.int64)).shape
    torch.Size([5])

    Notes
    -----
    The sum over all pairs costs one pass: half of the square of the sum less the sum of the squares.
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
        logit, factors = self._parts(dense, ids, offsets)
        pairs = factors.sum(1).square() - factors.square().sum(1)
        return logit + 0.5 * pairs.sum(1)
