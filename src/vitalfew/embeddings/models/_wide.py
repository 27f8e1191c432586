"""The wide part of a model: one weight for every row and every dense input, added up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitalfew.embeddings.models._base import Bags, ClickModel, check_top, layers

__all__ = ["WideModel"]


class WideModel(ClickModel):
    """A linear part over rows and dense inputs, and deep layers over the dense inputs and the rest of the rows.

    The first number of a row is its linear weight, the others are its factors. So both move, update and are saved as
    one row, and a model needs one set of tables.
    """

    least_dim = 2

    def __init__(self, tables: Bags, dense_in: int, top: Sequence[int], generator: torch.Generator | None) -> None:
        super().__init__(tables, dense_in)
        check_top(top)
        self.wide = nn.Parameter(torch.zeros(dense_in)) if dense_in else None
        # The bias of the logit is that of the last deep layer.
        self.top = layers([dense_in + len(tables.features) * (tables.dim - 1), *top], generator, last_linear=True)

    def _parts(self, dense: Tensor | None, ids: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the logit of the wide and the deep part, and the factors, shape (samples, features, dim - 1)."""
        fields = self._look_up(dense, ids, offsets)
        factors = fields[:, :, 1:]
        logit = fields[:, :, 0].sum(1) + self.top(self._side_by_side(dense, factors)).squeeze(1)
        if self.wide is not None and dense is not None:
            logit = logit + dense @ self.wide
        return logit, factors
