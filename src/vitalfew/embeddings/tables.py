"""A collection of embedding bags that trains its rows itself, inside the backward pass."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vitalfew.core import InputError
from vitalfew.embeddings.first import FirstRows
from vitalfew.embeddings.optim import Optimizer, optimizer_from_dict
from vitalfew.embeddings.rows import Counts, Layout, Rows

__all__ = ["EmbeddingBags", "Table", "clip_grad_norm"]


@dataclass(frozen=True, slots=True)
class Table:
    """One table of rows.

    Attributes
    ----------
    name
        For errors and checkpoints.
    num_rows, dim
        Its shape.
    pooling
        How the rows of a bag are joined. An empty bag is zeros either way.
    features
        The features that look rows up here, in the order of the input; by default one, named as the table.
    """

    name: str
    num_rows: int
    dim: int
    pooling: Literal["sum", "mean"] = "sum"
    features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_rows < 1 or self.dim < 1:
            raise InputError(
                f"table `{self.name}` cannot have {self.num_rows} rows of {self.dim}", hint="pass positive sizes"
            )
        if self.pooling not in ("sum", "mean"):
            raise InputError(f"table `{self.name}` cannot pool by {self.pooling!r}", hint="use 'sum' or 'mean'")
        if isinstance(self.features, str):
            raise InputError(
                f"features of table `{self.name}` must be a tuple, got {self.features!r}",
                hint=f"pass ({self.features!r},)",
            )


class EmbeddingBags(nn.Module):
    """Many tables as one module. Backward updates the touched rows in place: no ``.grad``, no sparse tensor.

    The rows are buffers, not parameters: give the other layers' parameters to a torch optimizer, and the rows look
    after themselves by `optimizer`. One backward pass updates a row at most once, however often it was looked up.

    Parameters
    ----------
    tables
        Their rows must have the same width.
    optimizer
        `SGD`, `RowwiseAdagrad`, `Adagrad` or `LazyAdam`.
    dtype
        Storage of the weights; bfloat16 and float16 are written with stochastic rounding. State is float32.
    update
        ``"backward"`` (rows change at the end of each backward pass) or ``"step"`` (call `step`, and `zero_grad` to
        drop what waits; for gradient accumulation, clipping and loss scaling).
    generator
        For the initial rows, uniform in ``+-1/sqrt(num_rows)`` as in the DLRM reference code.

    Examples
    --------
    >>> import torch
    >>> from vitalfew.embeddings import SGD, EmbeddingBags, Table
    >>> tables = EmbeddingBags([Table("user", 10, 4), Table("item", 20, 4)], SGD(lr=0.5))
    >>> ids = torch.tensor([[1, 2], [1, 3]])
    >>> out = tables(ids)
    >>> out.shape
    torch.Size([2, 2, 4])
    >>> before = tables.rows_of("user").clone()
    >>> out.sum().backward()
    >>> (before - tables.rows_of("user"))[:3, 0].round(decimals=4)
    tensor([0., 1., 0.])

    Notes
    -----
    Bits do not depend on the number of threads: the gradients of a row are summed in sample order.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        optimizer: Optimizer,
        *,
        dtype: torch.dtype = torch.float32,
        update: Literal["backward", "step"] = "backward",
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not tables:
            raise InputError("there are no tables", hint="pass at least one Table")
        names = [table.name for table in tables]
        if len(set(names)) != len(names):
            raise InputError(f"table names repeat: {sorted({n for n in names if names.count(n) > 1})}", hint="rename")
        dims = {table.dim for table in tables}
        if len(dims) > 1:
            raise InputError(f"tables have rows of widths {sorted(dims)}", hint="make one EmbeddingBags per width")
        self.tables = tuple(tables)
        self.dim = tables[0].dim
        self._start = dict(zip(names, np.cumsum([0, *[t.num_rows for t in tables]]).tolist(), strict=False))
        owners = [(feature, table) for table in tables for feature in table.features or (table.name,)]
        self.features = tuple(feature for feature, _ in owners)
        if len(set(self.features)) != len(self.features):
            raise InputError(f"feature names repeat in {self.features}", hint="each feature has one table")
        self.layout = Layout(
            self.features,
            base=np.array([self._start[table.name] for _, table in owners], np.int64),
            num_rows=np.array([table.num_rows for _, table in owners], np.int64),
            mean=np.array([table.pooling == "mean" for _, table in owners], np.bool_),
        )
        first = FirstRows.drawn([t.num_rows for t in tables], generator)
        self.rows = self._make_rows(optimizer, first, dtype=dtype, update=update, seed=seed)

    def _make_rows(
        self,
        optimizer: Optimizer,
        first: FirstRows,
        *,
        dtype: torch.dtype,
        update: Literal["backward", "step"],
        seed: int,
    ) -> Rows:
        rows = Rows(self.num_rows, self.dim, optimizer, dtype=dtype, update=update, seed=seed)
        self.register_buffer("weight", rows.weight)
        for name, tensor in rows.state.items():
            self.register_buffer(name, tensor)
        first.fill(rows.weight)
        self._first_seed = first.seed
        return rows

    @property
    def num_rows(self) -> int:
        """Rows of all tables."""
        return sum(table.num_rows for table in self.tables)

    def span_of(self, table: str) -> range:
        """Return the rows of one table, as numbered over all tables."""
        found = next((t for t in self.tables if t.name == table), None)
        if found is None:
            raise InputError(f"there is no table `{table}`", hint=f"there are {', '.join(t.name for t in self.tables)}")
        return range(self._start[table], self._start[table] + found.num_rows)

    def forward(self, ids: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Return the pooled rows, float32, shape (samples, features, dim).

        Parameters
        ----------
        ids
            int64 or int32. One id per feature: shape (samples, features). Bags: shape (n,), sample by sample and
            feature by feature inside a sample.
        offsets
            For bags: where each begins in `ids`, and the end; shape (samples * features + 1,).
        weights
            Per id, for a weighted sum or mean; gets a gradient if it asks for one.

        Raises
        ------
        InputError
            For an id outside its table, naming feature, sample and id; nothing has changed then.
        """
        self.check_shape(ids, offsets)
        flat = self.rows.bags(self.layout, ids, offsets, weights)
        return flat.reshape(-1, len(self.features), self.dim)

    def check_shape(self, ids: Tensor, offsets: Tensor | None) -> None:
        """Refuse ids without offsets that are not one per sample and feature."""
        if offsets is None and (ids.dim() != 2 or ids.shape[1] != len(self.features)):
            raise InputError(
                f"expected ids of shape (samples, {len(self.features)}), got {tuple(ids.shape)}",
                hint="one column per feature, or a flat tensor with offsets",
            )

    def rows_of(self, table: str) -> Tensor:
        """Return the weights of one table, a view of shape (num_rows, dim)."""
        span = self.span_of(table)
        return self.rows.weight[span.start : span.stop]

    def columns(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return weights and optimizer state of the rows from `start` to `stop`, numbered over all tables."""
        return {name: t[start:stop] for name, t in {"weight": self.rows.weight, **self.rows.state}.items()}

    def fill(self, start: int, columns: Mapping[str, Tensor]) -> None:
        """Replace the rows from `start` on; state that is not given becomes zeros, as in rows that begin."""
        for name, mine in self.columns(start, start + len(columns["weight"])).items():
            if name in columns:
                mine.copy_(columns[name])
            else:
                mine.zero_()

    def save(self, folder: str | os.PathLike[str], **settings: Any) -> None:
        """Write all rows to a folder as safetensors; see `save_rows`."""
        from vitalfew.embeddings.saving import save_rows

        save_rows(self, folder, **settings)

    def load(self, folder: str | os.PathLike[str], **settings: Any) -> None:
        """Take all rows from a folder that `save` has made, of tables of any kind; see `load_rows`."""
        from vitalfew.embeddings.saving import load_rows

        load_rows(folder, self, **settings)

    @property
    def counts(self) -> Counts:
        """Lookups, rows updated and steps so far, counted in the kernels."""
        return self.rows.counted()

    @property
    def lr(self) -> float:
        """The learning rate; set it from a schedule."""
        return self.rows.optimizer.lr

    @lr.setter
    def lr(self, value: float) -> None:
        settings = self.rows.optimizer.to_dict() | {"lr": value}
        self.rows.optimizer = optimizer_from_dict(settings)

    def step(self) -> None:
        """With ``update="step"``: update every touched row once from all gradients since the last step."""
        self.rows.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """With ``update="step"``: drop the gradients that wait. A model's own ``zero_grad`` does not reach here."""
        super().zero_grad(set_to_none)
        self.rows.zero_grad()

    def extra_repr(self) -> str:
        return f"{len(self.tables)} tables, {self.num_rows:,} rows x {self.dim}, {self.rows.optimizer}"

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "tables": [[t.name, t.num_rows] for t in self.tables],
            "optimizer": self.rows.optimizer.to_dict(),
            "steps": self.rows.counts.steps,
            "seed": self.rows.seed,
        }

    def _check_extra_state(self, state: dict[str, Any]) -> None:
        mine = [[t.name, t.num_rows] for t in self.tables]
        if state["tables"] != mine:
            raise InputError(f"the checkpoint holds the tables {state['tables']}, not {mine}", hint="use its schema")
        if state["optimizer"]["name"] != self.rows.optimizer.name:
            raise InputError(
                f"the checkpoint was trained by {state['optimizer']['name']}, not {self.rows.optimizer.name}",
                hint="use the same optimizer: its state belongs to the rows",
            )

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._check_extra_state(state)
        self.rows.optimizer = optimizer_from_dict(state["optimizer"])
        self.rows.counts.steps = state["steps"]
        self.rows.seed = state["seed"]

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("assign_to_params_buffers"):
            raise InputError("load_state_dict(assign=True) would cut the rows off their store", hint="assign=False")
        if (extra := state.get(f"{prefix}_extra_state")) is not None:
            self._check_extra_state(extra)  # before any row is overwritten
        super()._load_from_state_dict(state, prefix, metadata, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EmbeddingBags:
        weight = self.rows.weight
        probe = fn(torch.zeros(0, dtype=weight.dtype, device=weight.device))
        if probe.device != weight.device or probe.dtype != weight.dtype:
            raise InputError(
                f"the rows stay on {weight.device} as {weight.dtype}, "
                f"they cannot become {probe.dtype} on {probe.device}",
                hint="move the other layers only, and choose dtype= when making the tables",
            )
        return self


def clip_grad_norm(
    parameters: Iterable[Tensor],
    tables: EmbeddingBags | Rows | Iterable[EmbeddingBags | Rows],
    max_norm: float,
) -> float:
    """Clip the dense gradients and the rows' together by their joint 2-norm, exactly; return that norm.

    Needs ``update="step"``: in backward mode the rows have changed before anyone knows the norm, and this refuses.
    Several tables go in a list; those of a wrapped model are ``handle.rows``.

    Examples
    --------
    >>> import torch
    >>> from vitalfew.embeddings import SGD, EmbeddingBags, Table, clip_grad_norm
    >>> tables = EmbeddingBags([Table("user", 4, 2)], SGD(lr=1.0), update="step")
    >>> tables(torch.tensor([[1], [1]])).sum().backward()
    >>> round(clip_grad_norm([], tables, 1.0), 4)  # the row's gradient is (2, 2)
    2.8284
    >>> tables.step()
    """
    if not max_norm >= 0:
        raise InputError(f"max_norm must not be negative, got {max_norm}", hint="1.0 is usual")
    several = [tables] if isinstance(tables, EmbeddingBags | Rows) else tables
    slabs = [each.rows if isinstance(each, EmbeddingBags) else each for each in several]
    grads = [p.grad for p in parameters if p.grad is not None]
    square = sum(float(g.double().square().sum()) for g in grads)
    norm = math.sqrt(square + sum(rows.grad_norm() ** 2 for rows in slabs))
    if norm > max_norm and math.isfinite(norm):  # otherwise the step refuses
        factor = max_norm / norm
        for g in grads:
            g.mul_(factor)
        for rows in slabs:
            rows.scale_grad(factor)
    return norm
