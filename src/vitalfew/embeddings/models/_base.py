"""What all click models share: tables below, one logit per sample above, and the checks between."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from vitalfew.core import InputError

__all__ = ["Bags", "ClickModel", "check_top", "layers", "linear"]


class Bags(Protocol):
    """What a model needs of its tables: `EmbeddingBags` and plain PyTorch tables both fit."""

    features: tuple[str, ...]
    dim: int

    def __call__(self, ids: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return pooled rows, shape (samples, features, dim)."""
        ...


def linear(fan_in: int, fan_out: int, generator: torch.Generator | None) -> nn.Linear:
    """Return a layer with first weights as in the DLRM reference code."""
    if min(fan_in, fan_out) < 1:
        raise InputError(f"a layer from {fan_in} to {fan_out} values", hint="widths are 1 or more")
    layer = nn.Linear(fan_in, fan_out)
    with torch.no_grad():
        layer.weight.normal_(0, (2 / (fan_in + fan_out)) ** 0.5, generator=generator)
        layer.bias.normal_(0, (1 / fan_out) ** 0.5, generator=generator)
    return layer


def layers(sizes: Sequence[int], generator: torch.Generator | None, *, last_linear: bool) -> nn.Sequential:
    """Return linear layers with ReLU between them, and after the last one unless it is linear."""
    made: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        made.append(linear(fan_in, fan_out, generator))
        if not (last_linear and i == len(sizes) - 2):
            made.append(nn.ReLU())
    return nn.Sequential(*made)


def check_top(top: Sequence[int]) -> None:
    """Refuse layers that do not end in a logit."""
    if not top or top[-1] != 1:
        raise InputError(f"the top is {tuple(top)}, a click has one logit", hint="end with 1")


class ClickModel(nn.Module):
    """Tables, dense inputs and layers that make one logit per sample of them.

    Attributes
    ----------
    tables
        The embedding bags.
    dense_in
        Number of dense inputs.
    least_dim
        The narrowest rows that the model can use.
    """

    least_dim: ClassVar[int] = 1

    def __init__(self, tables: Bags, dense_in: int) -> None:
        super().__init__()
        if dense_in < 0:
            raise InputError(f"dense_in must not be negative, got {dense_in}", hint="0: no dense inputs")
        if tables.dim < self.least_dim:
            raise InputError(
                f"{type(self).__name__} cannot use rows of width {tables.dim}", hint=f"{self.least_dim} is the least"
            )
        self.tables = tables
        self.dense_in = dense_in

    def forward(self, dense: Tensor | None, ids: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return one logit per sample, shape (samples,).

        Parameters
        ----------
        dense
            float32, shape (samples, dense_in); without dense inputs None, or no columns.
        ids, offsets
            As the tables take them.
        """
        raise NotImplementedError

    def _check_dense(self, dense: Tensor | None, *shape: int) -> None:
        """Refuse dense inputs that have not this shape before the number of columns."""
        expected = (*shape, self.dense_in)
        found = (*shape, 0) if dense is None else tuple(dense.shape)
        if found != expected:
            raise InputError(
                f"expected dense of shape {expected}, got {None if dense is None else found}",
                hint="one line per sample, as many columns as dense_in",
            )

    def _look_up(self, dense: Tensor | None, ids: Tensor, offsets: Tensor | None) -> Tensor:
        """Check the inputs against each other and return the pooled rows, shape (samples, features, dim)."""
        samples = ids.shape[0] if offsets is None else (offsets.shape[0] - 1) // len(self.tables.features)
        self._check_dense(dense, samples)  # len() would fix the number of samples in an exported model
        return self.tables(ids, offsets)

    def _side_by_side(self, dense: Tensor | None, fields: Tensor) -> Tensor:
        """Return dense inputs and rows in one line per sample."""
        flat = fields.flatten(1)
        return flat if dense is None or not self.dense_in else torch.cat([dense.to(flat.dtype), flat], dim=1)
