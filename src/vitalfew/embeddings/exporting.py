"""A trained model as one file that PyTorch runs by itself: the graph, the layers and all rows."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from vitalfew.core import InputError
from vitalfew.core.files import atomic_write
from vitalfew.embeddings.baseline import TorchBags
from vitalfew.embeddings.models import TBSM, ClickModel
from vitalfew.embeddings.parallel import ShardedEmbeddings
from vitalfew.embeddings.tables import EmbeddingBags
from vitalfew.embeddings.tiering import free_memory

__all__ = ["export_model"]

_CHUNK = 64 << 20
_COPIES = 3
"""Of the rows at once: those of the program, and what the writing of its file takes."""


def export_model(model: ClickModel, path: str | os.PathLike[str], *, lists: bool = False) -> None:
    """Write a model as one ``.pt2`` file, which ``torch.export.load`` runs where this library is not installed.

    The program is called as ``program.module()(dense, ids)``, or ``(dense, ids, offsets)`` for lists, with any number
    of samples, and returns the logits. Without dense inputs `dense` has no columns. Ids are rows of the tables, as
    `Encoder` makes them; one outside its table is an error, and so are offsets that do not rise from 0 to their number.

    Parameters
    ----------
    model
        With tables of any kind but `ShardedEmbeddings`. It is not changed.
    path
        Appears whole or not at all. The names of the features, in the order of the ids, are in its extra file
        ``vitalfew.json``.
    lists
        Whether samples hold lists of ids, cut by offsets.

    Raises
    ------
    InputError
        If the rows do not fit in memory, or gradients wait for a step.

    Examples
    --------
    >>> import tempfile
    >>> from vitalfew.embeddings import DLRM, SGD, EmbeddingBags, Table
    >>> tables = EmbeddingBags([Table("user", 10, 8), Table("item", 20, 8)], SGD(lr=0.1))
    >>> model = DLRM(tables, dense_in=3, bottom=(16, 8), top=(16, 1))
    >>> file = Path(tempfile.mkdtemp()) / "model.pt2"
    >>> export_model(model, file)
    >>> inputs = torch.ones(5, 3), torch.ones(5, 2, dtype=torch.int64)
    >>> bool((torch.export.load(file).module()(*inputs) - model(*inputs)).abs().max() < 1e-6)
    True
    """
    target, tables = Path(path), model.tables
    if target.suffix != ".pt2":
        raise InputError(f"cannot write {target.suffix or 'a file without suffix'}", hint="name it .pt2")
    if not isinstance(tables, EmbeddingBags | TorchBags) or isinstance(tables, ShardedEmbeddings):
        raise InputError(
            f"the rows of {type(tables).__name__} cannot be exported", hint="load them into EmbeddingBags first"
        )
    plain = _PlainBags(tables)
    # The copy gets the plain tables in place of those that it would have to copy.
    program = _Program(copy.deepcopy(model, {id(tables): plain})).cpu().eval().requires_grad_(False)
    about = {
        "features": list(tables.features),
        "num_rows": plain.num_rows.tolist(),
        "dense_in": model.dense_in,
        "lists": lists,
    }
    exported = _trace(program, lists=lists)
    with atomic_write(target) as file:
        torch.export.save(exported, file, extra_files={"vitalfew.json": json.dumps(about)})


class _PlainBags(nn.Module):
    """The rows of all tables in one tensor, looked up by operations that every PyTorch has."""

    weight: Tensor
    base: Tensor
    num_rows: Tensor
    mean: Tensor

    def __init__(self, tables: EmbeddingBags | TorchBags) -> None:
        super().__init__()
        self.features, self.dim = tables.features, tables.dim
        base, num_rows, mean, end = [], [], [], 0
        for table in tables.tables:
            for _ in table.features or (table.name,):
                base.append(end)
                num_rows.append(table.num_rows)
                mean.append(table.pooling == "mean")
            end += table.num_rows
        self.register_buffer("weight", _rows_of(tables, end))
        self.register_buffer("base", torch.tensor(base))
        self.register_buffer("num_rows", torch.tensor(num_rows))
        self.register_buffer("mean", torch.tensor(mean))

    def forward(self, ids: Tensor, offsets: Tensor | None = None) -> Tensor:
        if offsets is None:
            return self._gather(ids, self.base, self.num_rows)
        # A bag that ends before it begins would be empty here, and its ids in another bag.
        whole = (offsets.diff() >= 0).all() & (offsets[0] == 0) & (offsets[-1] == ids.shape[0])
        torch._assert_async(whole, "the offsets do not rise from 0 to the number of ids")
        features = len(self.features)
        bag = torch.searchsorted(offsets, torch.arange(ids.shape[0]), right=True) - 1
        rows = self._gather(ids, self.base[bag % features], self.num_rows[bag % features])
        pooled = rows.new_zeros(offsets.shape[0] - 1, self.dim).index_add(0, bag, rows)
        sizes = offsets.diff().view(-1, features)
        divisor = torch.where(self.mean, sizes.clamp(min=1), 1).unsqueeze(2)
        return pooled.view(-1, features, self.dim) / divisor

    def _gather(self, ids: Tensor, base: Tensor, num_rows: Tensor) -> Tensor:
        # Without this an id too large for its table would find a row of the next one.
        torch._assert_async(((ids >= 0) & (ids < num_rows)).all(), "an id lies outside its table")
        return nn.functional.embedding(ids + base, self.weight).float()


def _rows_of(tables: EmbeddingBags | TorchBags, num_rows: int) -> Tensor:
    """Return a copy of all weights, read a few at a time from wherever they are."""
    dtype = torch.float32 if isinstance(tables, TorchBags) else tables.rows.weight.dtype
    row_bytes = tables.dim * dtype.itemsize
    if (needed := _COPIES * num_rows * row_bytes) > (free := free_memory()):
        raise InputError(
            f"the export of {num_rows:,} rows needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free",
            hint="use a larger machine, or save the rows alone: tables.save(folder, state=False)",
        )
    if isinstance(tables, TorchBags):
        return torch.cat([weight.detach() for weight in tables.bags.parameters()])
    tables.rows.check_settled("an export would leave them out")
    weight = torch.empty(num_rows, tables.dim, dtype=dtype)
    step = max(1, _CHUNK // row_bytes)
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        weight[start:stop] = tables.columns(start, stop)["weight"]
    return weight


class _Program(nn.Module):
    """A model as it is traced."""

    def __init__(self, model: ClickModel) -> None:
        super().__init__()
        self.model = model
        self.items = (model.history + 1,) if isinstance(model, TBSM) else ()
        self.bags = (*self.items, 1)[0] * len(model.tables.features)

    def forward(self, dense: Tensor, ids: Tensor, offsets: Tensor | None = None) -> Tensor:
        if offsets is not None:
            # Says that there is one number of samples, not two whose ties would be checked for each call.
            torch._check(offsets.shape[0] == dense.shape[0] * self.bags + 1)  # type: ignore[no-untyped-call]
        logits: Tensor = self.model(dense, ids, offsets)
        return logits


def _trace(program: _Program, *, lists: bool) -> torch.export.ExportedProgram:
    """Record what the model does with a few samples; their number stays open."""
    rows, samples = 3, torch.export.Dim("samples", min=0)
    dense = torch.zeros(rows, *program.items, program.model.dense_in)
    features = len(program.model.tables.features)
    with torch.no_grad():
        if not lists:
            ids = torch.zeros(rows, *program.items, features, dtype=torch.int64)
            return torch.export.export(program, (dense, ids), dynamic_shapes=({0: samples}, {0: samples}))
        offsets = torch.arange(rows * program.bags + 1)
        open_shapes = ({0: samples}, {0: torch.export.Dim("ids", min=0)}, {0: program.bags * samples + 1})
        ids = torch.zeros(rows * program.bags, dtype=torch.int64)
        return torch.export.export(program, (dense, ids, offsets), dynamic_shapes=open_shapes)
