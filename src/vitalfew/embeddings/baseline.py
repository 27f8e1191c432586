"""Embedding bags the plain PyTorch way: the arm that ours is compared to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitalfew.core import InputError
from vitalfew.embeddings.first import FirstRows
from vitalfew.embeddings.optim import SGD, Adagrad, LazyAdam, Optimizer
from vitalfew.embeddings.tables import Table

__all__ = ["TorchBags"]


class TorchBags(nn.Module):
    """One ``nn.EmbeddingBag(sparse=True)`` per table: same input, same output and same start as `EmbeddingBags`.

    Examples
    --------
    >>> import torch
    >>> from vitalfew.embeddings import Table, TorchBags
    >>> TorchBags([Table("user", 10, 4), Table("item", 20, 4)])(torch.tensor([[1, 2]])).shape
    torch.Size([1, 2, 4])
    """

    def __init__(self, tables: Sequence[Table], *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if any(len(table.features) > 1 for table in tables):
            raise InputError("the baseline has no shared tables", hint="give each feature a table of its own")
        self.tables = tuple(tables)
        self.features = tuple((table.features or (table.name,))[0] for table in tables)
        self.dim = tables[0].dim
        self.bags = nn.ModuleList()
        first, begin = FirstRows.drawn([table.num_rows for table in tables], generator), 0
        for table in tables:
            start = torch.empty(table.num_rows, table.dim, dtype=torch.float32, device="cpu")
            first.fill(start, begin)
            begin += table.num_rows
            self.bags.append(nn.EmbeddingBag.from_pretrained(start, freeze=False, mode=table.pooling, sparse=True))

    def forward(self, ids: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return the pooled rows, shape (samples, features, dim)."""
        features = len(self.bags)
        if offsets is None and (ids.dim() != 2 or ids.shape[1] != features):
            raise InputError(
                f"expected ids of shape (samples, {features}), got {tuple(ids.shape)}", hint="one column per feature"
            )
        if offsets is None:
            one = torch.arange(len(ids))
            return torch.stack([bag(ids[:, f].contiguous(), one) for f, bag in enumerate(self.bags)], dim=1)
        sizes = offsets.diff().reshape(-1, features)
        owner = torch.repeat_interleave(torch.arange(features).repeat(len(sizes)), sizes.reshape(-1))
        pooled = []
        for f, bag in enumerate(self.bags):
            edges = torch.zeros(len(sizes), dtype=torch.int64)
            edges[1:] = sizes[:-1, f].cumsum(0)
            pooled.append(bag(ids[owner == f], edges))
        return torch.stack(pooled, dim=1)

    def optimizer(self, rule: Optimizer) -> torch.optim.Optimizer:
        """Return PyTorch's own optimizer of the same rule for these tables."""
        if rule.weight_decay:
            raise InputError("PyTorch has no weight decay for sparse gradients", hint="set weight_decay=0")
        if isinstance(rule, SGD):
            return torch.optim.SGD(self.parameters(), lr=rule.lr)
        if isinstance(rule, Adagrad):
            return torch.optim.Adagrad(self.parameters(), lr=rule.lr, eps=rule.eps)
        if isinstance(rule, LazyAdam):
            return torch.optim.SparseAdam(
                list(self.parameters()), lr=rule.lr, betas=(rule.beta1, rule.beta2), eps=rule.eps
            )
        raise InputError(f"PyTorch has no {rule.name} for sparse gradients", hint="compare with adagrad")
