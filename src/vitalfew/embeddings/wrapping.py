"""Give any PyTorch model's embeddings the fused update, in place, and take it back."""

from __future__ import annotations

from collections.abc import Collection
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vitalfew.core import InputError, Line, Receipt
from vitalfew.embeddings.optim import Optimizer, optimizer_from_dict
from vitalfew.embeddings.rows import Counts, Layout, Rows, as_offsets, step_together

__all__ = ["Wrapped", "wrap"]

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


class _Lookup(nn.Module):
    """Stands where an embedding was: same call, same weight name and shape, but its rows update themselves."""

    weight: Tensor

    def __init__(self, original: nn.Embedding | nn.EmbeddingBag, name: str, rows: Rows, start: int) -> None:
        super().__init__()
        self.num_embeddings = original.num_embeddings
        self.embedding_dim = original.embedding_dim
        self.padding_idx = original.padding_idx
        self._rows = rows
        self._layout = Layout(
            (name,),
            base=np.array([start], np.int64),
            num_rows=np.array([original.num_embeddings], np.int64),
            mean=np.array([getattr(original, "mode", "sum") == "mean"], np.bool_),
        )
        self._start = start
        self.register_buffer("weight", self._view())

    def _view(self) -> Tensor:
        return self._rows.weight[self._start : self._start + self.num_embeddings]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._buffers["weight"] = self._view()  # pickle copies a view apart from its base

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("assign_to_params_buffers"):
            raise InputError("load_state_dict(assign=True) would cut the rows off their store", hint="assign=False")
        super()._load_from_state_dict(state, prefix, metadata, *rest)

    def _apply(self, fn: Any, recurse: bool = True) -> _Lookup:
        probe = fn(torch.zeros(0, dtype=torch.float32, device="cpu"))
        if probe.device.type != "cpu" or probe.dtype != torch.float32:
            raise InputError(
                f"wrapped rows stay float32 on the CPU, they cannot become {probe.dtype} on {probe.device}",
                hint="move or cast the other layers only",
            )
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._rows.optimizer}"


class _Embedding(_Lookup):
    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        if self.padding_idx is None:
            out = self._rows.bags(self._layout, flat)
        else:
            # A padding id is an empty bag: no gradient reaches its row, whose value is put back afterwards.
            real = flat != self.padding_idx
            out = self._rows.bags(self._layout, flat[real], _running_count(real))
            out = torch.where(real.unsqueeze(1), out, self.weight[self.padding_idx])
        return out.reshape(*ids.shape, self.embedding_dim)


class _EmbeddingBag(_Lookup):
    def __init__(self, original: nn.EmbeddingBag, name: str, rows: Rows, start: int) -> None:
        super().__init__(original, name, rows, start)
        self.mode = original.mode
        self.include_last_offset = original.include_last_offset

    def forward(self, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        if per_sample_weights is not None and self.mode != "sum":
            raise InputError(f"per_sample_weights need mode='sum', got {self.mode!r}", hint="as in nn.EmbeddingBag")
        if per_sample_weights is not None and per_sample_weights.shape != ids.shape:
            raise InputError(
                f"per_sample_weights have shape {tuple(per_sample_weights.shape)}, the ids {tuple(ids.shape)}",
                hint="as in nn.EmbeddingBag",
            )
        if ids.dim() == 2:
            if offsets is not None:
                raise InputError("two-dimensional ids have no offsets", hint="as in nn.EmbeddingBag")
            edges = torch.arange(len(ids) + 1, device="cpu") * ids.shape[1]
        elif ids.dim() != 1:
            raise InputError(f"ids have {ids.dim()} dimensions", hint="pass one or two, as in nn.EmbeddingBag")
        elif offsets is None:
            raise InputError("one-dimensional ids need offsets", hint="as in nn.EmbeddingBag")
        elif self.include_last_offset:
            edges = offsets
        else:
            edges = torch.cat([offsets, offsets.new_tensor([ids.numel()])])
        flat = ids.reshape(-1)
        weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
        if self.padding_idx is not None:
            real = flat != self.padding_idx
            edges, flat = _running_count(real)[torch.from_numpy(as_offsets(edges, len(flat)))], flat[real]
            weights = None if weights is None else weights[real]
        return self._rows.bags(self._layout, flat, edges, weights)


def _running_count(true: Tensor) -> Tensor:
    """Return how many are true before each entry, and in all."""
    count = torch.zeros(len(true) + 1, dtype=torch.int64, device="cpu")
    torch.cumsum(true, 0, out=count[1:])
    return count


class Wrapped:
    """The handle of `wrap`: counts, state, receipt, and the way back. A context manager that undoes at its end.

    Attributes
    ----------
    model
        The user's model, the same object.
    names
        The modules that were replaced.
    rows
        Their rows, one slab per width.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, places: dict[str, nn.Module], rows: list[Rows]) -> None:
        self.model = model
        self.names = tuple(places)
        self._originals = places
        self._optimizer = optimizer
        self.rows = tuple(rows)
        self._active = True

    def undo(self) -> None:
        """Put the original modules back, with the trained rows in their own parameters. Does nothing twice."""
        if not self._active:
            return
        for name, original in self._originals.items():
            found = self.model.get_submodule(name)
            with torch.no_grad():
                original.weight.copy_(found.weight)  # type: ignore[operator,arg-type]
            original.train(found.training)
            _put(self.model, name, original)
        self.zero_grad()
        self._active = False

    def __enter__(self) -> Wrapped:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    @property
    def counts(self) -> Counts:
        """Lookups and rows updated over all tables; steps of the busiest."""
        each = [rows.counts for rows in self.rows]
        return Counts(
            sum(c.lookups for c in each), sum(c.rows_updated for c in each), max((c.steps for c in each), default=0)
        )

    @property
    def lr(self) -> float:
        """The learning rate of the rows; set it from a schedule."""
        return self._optimizer.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._optimizer = optimizer_from_dict(self._optimizer.to_dict() | {"lr": value})
        for rows in self.rows:
            rows.optimizer = self._optimizer

    def step(self) -> None:
        """With ``update="step"``: update every touched row once from all gradients since the last step."""
        step_together(*self.rows)

    def zero_grad(self) -> None:
        """With ``update="step"``: drop the gradients that wait."""
        for rows in self.rows:
            rows.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's settings and state; the weights are in ``model.state_dict()`` as ever."""
        return {
            "optimizer": self._optimizer.to_dict(),
            "steps": [rows.counts.steps for rows in self.rows],
            "state": [{name: tensor.clone() for name, tensor in rows.state.items()} for rows in self.rows],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        if len(state["state"]) != len(self.rows) or state["optimizer"]["name"] != self._optimizer.name:
            raise InputError(
                f"this state is of {len(state['state'])} slabs under {state['optimizer']['name']}, "
                f"here are {len(self.rows)} under {self._optimizer.name}",
                hint="wrap the same model with the same optimizer",
            )
        for rows, saved in zip(self.rows, state["state"], strict=True):
            for name, tensor in rows.state.items():
                if tensor.shape != saved[name].shape:
                    raise InputError(
                        f"state {name} has shape {tuple(saved[name].shape)}, the tables need {tuple(tensor.shape)}",
                        hint="wrap the same model",
                    )
        for rows, saved, steps in zip(self.rows, state["state"], state["steps"], strict=True):
            for name, tensor in rows.state.items():
                tensor.copy_(saved[name])
            rows.counts.steps = steps
        self._optimizer = optimizer_from_dict(state["optimizer"])
        for rows in self.rows:
            rows.optimizer = self._optimizer

    def receipt(self) -> Receipt:
        """Return what was counted: rows written against those a dense optimizer writes, gradient bytes never built."""
        counts = self.counts
        num_rows = sum(len(rows.weight) for rows in self.rows)
        gradient = sum(rows.weight.numel() * 4 for rows in self.rows)
        lines = (
            Line("rows written", "rows", float(num_rows * counts.steps), float(counts.rows_updated), "counted"),
            Line("gradient of the tables", "B", float(gradient), 0.0, "counted", note="per step; before: dense"),
        )
        return Receipt(
            "wrapped embeddings",
            f"fused {self._optimizer.name}",
            lines,
            "undecided",
            "no paired run was made: counts alone do not show the time or the quality",
        )


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _check(name: str, module: nn.Embedding | nn.EmbeddingBag) -> None:
    if type(module).forward not in (nn.Embedding.forward, nn.EmbeddingBag.forward) or "forward" in vars(module):
        raise InputError(f"`{name}` has a forward of its own", hint="leave this module out with only=")
    if "weight" not in module._parameters:
        raise InputError(f"the weight of `{name}` is computed", hint="leave this module out with only=")
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks) or module.weight._backward_hooks or module.weight._post_accumulate_grad_hooks:
        raise InputError(
            f"`{name}` carries hooks, which would not run", hint="take them off, or leave it out with only="
        )
    for setting in ("max_norm", "scale_grad_by_freq"):
        if getattr(module, setting):
            raise InputError(
                f"`{name}` uses {setting}={getattr(module, setting)}, which fused rows do not do",
                hint=f"set {setting} off, or leave this module out with only=",
            )
    if getattr(module, "mode", "sum") == "max":
        raise InputError(f"`{name}` pools by max", hint="use sum or mean, or leave this module out with only=")
    if module.weight.device.type != "cpu" or module.weight.dtype != torch.float32:
        raise InputError(
            f"`{name}` is {module.weight.dtype} on {module.weight.device}", hint="wrap float32 embeddings on the CPU"
        )


def wrap(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    only: Collection[str] | None = None,
    update: Literal["backward", "step"] = "backward",
) -> Wrapped:
    """Replace the ``nn.Embedding`` and ``nn.EmbeddingBag`` modules of a model by fused rows, in place.

    The model stays the user's own object, its ``state_dict`` keeps its keys and shapes. The replaced weights are
    buffers: they leave ``model.parameters()``, and a penalty that the model adds on its parameters no longer sees them
    (use the optimizer's `weight_decay`). Frozen embeddings stay as they are.

    Parameters
    ----------
    model
        Any module; models of FuxiCTR, DeepCTR-Torch or torch-rechub hold such embeddings.
    optimizer
        The update rule for the rows.
    only
        Names of the modules to replace, as in ``model.named_modules()``; by default all.
    update
        As in `EmbeddingBags`.

    Raises
    ------
    InputError
        If a module has a setting that cannot be honoured, a weight is also used by another layer, or there is
        nothing to wrap. The model is unchanged then.

    Examples
    --------
    >>> import torch
    >>> from vitalfew.embeddings import SGD, wrap
    >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Flatten(), torch.nn.Linear(8, 1))
    >>> with wrap(model, SGD(lr=0.1)) as few:
    ...     model(torch.tensor([[1, 2]])).sum().backward()
    ...     few.counts.rows_updated
    2
    >>> type(model[0]).__name__
    'Embedding'
    """
    found: dict[str, nn.Embedding | nn.EmbeddingBag] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        chosen = isinstance(module, _EMBEDDINGS) and (only is None or name in only)
        if chosen and module.weight.requires_grad and name:
            found[name] = module
    missing = set(only or ()) - set(found)
    if missing:
        raise InputError(f"there is no trainable embedding `{min(missing)}`", hint="see model.named_modules()")
    if not found:
        raise InputError(
            "the model holds no trainable nn.Embedding or nn.EmbeddingBag", hint="pass the module that holds them"
        )
    for name, module in found.items():
        _check(name, module)
    ours = {id(module) for module in found.values()}
    shared = {id(module.weight): name for name, module in found.items()}
    for owner, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in shared and id(module) not in ours:
                raise InputError(
                    f"the weight of `{shared[id(parameter)]}` is also `{owner}.{parameter_name}`",
                    hint="untie them, or leave the embedding out with only=",
                )

    slabs: dict[int, Rows] = {}
    starts: dict[int, int] = {}
    unique = {id(module.weight): module for module in found.values()}
    for dim in sorted({module.embedding_dim for module in unique.values()}):
        mine = [module for module in unique.values() if module.embedding_dim == dim]
        slabs[dim] = Rows(sum(m.num_embeddings for m in mine), dim, optimizer, update=update)
        start = 0
        for module in mine:
            slabs[dim].weight[start : start + module.num_embeddings].copy_(module.weight.detach())
            starts[id(module.weight)] = start
            start += module.num_embeddings
    twins: dict[int, nn.Module] = {}
    for name, module in found.items():
        if id(module) not in twins:
            kind = _EmbeddingBag if isinstance(module, nn.EmbeddingBag) else _Embedding
            twin = kind(module, name, slabs[module.embedding_dim], starts[id(module.weight)])  # type: ignore[arg-type]
            twins[id(module)] = twin.train(module.training)
        _put(model, name, twins[id(module)])
    return Wrapped(model, optimizer, dict(found), list(slabs.values()))
