"""The deep learning recommendation model: dense layers below, dot products between all fields, dense layers above."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vitalfew.core import InputError

__all__ = ["DLRM"]


class Bags(Protocol):
    """What a model needs of its tables: `EmbeddingBags` and plain PyTorch tables both fit."""

    features: tuple[str, ...]
    dim: int

    def __call__(self, ids: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return pooled rows, shape (samples, features, dim)."""
        ...


def _layers(sizes: Sequence[int], generator: torch.Generator | None, *, last_linear: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        linear = nn.Linear(fan_in, fan_out)
        with torch.no_grad():
            linear.weight.normal_(0, (2 / (fan_in + fan_out)) ** 0.5, generator=generator)
            linear.bias.normal_(0, (1 / fan_out) ** 0.5, generator=generator)
        layers.append(linear)
        if not (last_linear and i == len(sizes) - 2):
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


@lru_cache
def _places(fields: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where each pair stands in the square of products, and which pair stands at each place of it."""
    i, j = torch.tril_indices(fields, fields, -1, device=device)
    pair = torch.full((fields, fields), len(i), device=device)  # on the diagonal: one past the last pair
    pair[i, j] = pair[j, i] = torch.arange(len(i), device=device)
    return i * fields + j, pair.flatten()


class _PairDots(torch.autograd.Function):
    """The dot products of all pairs of fields, (samples, F, D) to (samples, F (F - 1) / 2).

    The product of a matrix with its own transpose has a symmetric gradient, so backward needs one product, not two.
    """

    @staticmethod
    def forward(ctx: Any, fields: Tensor) -> Tensor:
        ctx.save_for_backward(fields)
        places, _ = _places(fields.shape[1], fields.device)
        return torch.bmm(fields, fields.transpose(1, 2)).flatten(1).index_select(1, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (fields,) = ctx.saved_tensors
        _, pairs = _places(fields.shape[1], fields.device)
        square = nn.functional.pad(grad.to(fields.dtype), (0, 1)).index_select(1, pairs)
        return torch.bmm(square.view(len(grad), fields.shape[1], fields.shape[1]), fields)


class DLRM(nn.Module):
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
        super().__init__()
        if dense_in < 0:
            raise InputError(f"dense_in must not be negative, got {dense_in}", hint="0: no dense inputs")
        if dense_in and (not bottom or bottom[-1] != tables.dim):
            raise InputError(f"the bottom is {tuple(bottom)}, the rows have {tables.dim}", hint="end with their width")
        if not top or top[-1] != 1:
            raise InputError(f"the top is {tuple(top)}, a click has one logit", hint="end with 1")
        fields = len(tables.features) + (dense_in > 0)
        if fields < 2:
            raise InputError(f"{fields} field has no pair to multiply", hint="pass dense inputs or another feature")
        self.tables = tables
        self.dense_in = dense_in
        self.bottom = _layers([dense_in, *bottom], generator, last_linear=False) if dense_in else None
        width = fields * (fields - 1) // 2 + (tables.dim if dense_in else 0)
        self.top = _layers([width, *top], generator, last_linear=True)

    def forward(self, dense: Tensor | None, ids: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return one logit per sample, shape (samples,).

        Parameters
        ----------
        dense
            float32, shape (samples, dense_in); without dense inputs None, or no columns.
        ids, offsets
            As the tables take them.
        """
        samples = len(ids) if offsets is None else (len(offsets) - 1) // len(self.tables.features)
        found = (samples, 0) if dense is None else tuple(dense.shape)
        if found != (samples, self.dense_in):
            raise InputError(
                f"expected dense of shape {(samples, self.dense_in)}, got {None if dense is None else found}",
                hint="one line per sample, as many columns as dense_in",
            )
        fields = self.tables(ids, offsets)
        inputs = []
        if self.bottom is not None and dense is not None:
            low = self.bottom(dense)
            fields = torch.cat([low.unsqueeze(1).to(fields.dtype), fields], dim=1)
            inputs.append(low)
        inputs.append(_PairDots.apply(fields))  # type: ignore[no-untyped-call]
        logit: Tensor = self.top(torch.cat(inputs, dim=1))
        return logit.squeeze(1)
