"""Dot products between all pairs of fields, with dense layers below and above: the middle of DLRM and of TBSM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vitalfew.core import InputError
from vitalfew.embeddings.models._base import Bags, ClickModel, layers

__all__ = ["DotModel"]


class _PairDots(torch.autograd.Function):
    """The dot products of all pairs of fields, (samples, F, D) to (samples, F (F - 1) / 2).

    The product of a matrix with its own transpose has a symmetric gradient, so backward needs one product, not two.
    """

    @staticmethod
    def forward(ctx: Any, fields: Tensor, places: Tensor, pairs: Tensor) -> Tensor:
        ctx.save_for_backward(fields, pairs)
        return torch.bmm(fields, fields.transpose(1, 2)).flatten(1).index_select(1, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        fields, pairs = ctx.saved_tensors
        square = nn.functional.pad(grad.to(fields.dtype), (0, 1)).index_select(1, pairs)
        return torch.bmm(square.view(len(grad), fields.shape[1], fields.shape[1]), fields), None, None


class DotModel(ClickModel):
    """Bottom layers, dot products and top layers; what the last of these means is up to the model.

    Parameters
    ----------
    tables, dense_in, generator
        As in `DLRM`.
    bottom
        Widths of the bottom layers; the last must be that of the rows.
    top
        Widths of the top layers.
    """

    _places: Tensor
    _pairs: Tensor

    def __init__(
        self, tables: Bags, dense_in: int, bottom: Sequence[int], top: Sequence[int], generator: torch.Generator | None
    ) -> None:
        super().__init__(tables, dense_in)
        if dense_in and (not bottom or bottom[-1] != tables.dim):
            raise InputError(f"the bottom is {tuple(bottom)}, the rows have {tables.dim}", hint="end with their width")
        fields = len(tables.features) + (dense_in > 0)
        if fields < 2:
            raise InputError(f"{fields} field has no pair to multiply", hint="pass dense inputs or another feature")
        self.bottom = layers([dense_in, *bottom], generator, last_linear=False) if dense_in else None
        width = fields * (fields - 1) // 2 + (tables.dim if dense_in else 0)
        self.top = layers([width, *top], generator, last_linear=True)
        i, j = torch.tril_indices(fields, fields, -1)
        pair = torch.full((fields, fields), len(i))  # on the diagonal: one past the last pair
        pair[i, j] = pair[j, i] = torch.arange(len(i))
        # Where each pair stands in the square of products, and which pair stands at each place of it.
        self.register_buffer("_places", i * fields + j, persistent=False)
        self.register_buffer("_pairs", pair.flatten(), persistent=False)

    def _vectors(self, dense: Tensor | None, fields: Tensor) -> Tensor:
        """Return the outputs of the top layers, one line per line of the fields."""
        inputs = []
        if self.bottom is not None and dense is not None:
            low = self.bottom(dense)
            fields = torch.cat([low.unsqueeze(1).to(fields.dtype), fields], dim=1)
            inputs.append(low)
        places, pairs = self._places.to(fields.device), self._pairs.to(fields.device)  # if only the layers were moved
        inputs.append(_PairDots.apply(fields, places, pairs))  # type: ignore[no-untyped-call]
        out: Tensor = self.top(torch.cat(inputs, dim=1))
        return out
