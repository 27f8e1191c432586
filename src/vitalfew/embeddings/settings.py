"""What to train, in plain numbers, and the model they make."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from vitalfew.core import InputError
from vitalfew.embeddings.baseline import TorchBags
from vitalfew.embeddings.models import MODELS, TBSM, ClickModel
from vitalfew.embeddings.optim import SGD, Adagrad, LazyAdam, Optimizer, RowwiseAdagrad
from vitalfew.embeddings.tables import EmbeddingBags, Table

if TYPE_CHECKING:
    from vitalfew.embeddings.tiering import Tiering

__all__ = ["STORAGE", "Settings", "build", "build_arm", "dense_optimizer"]

STORAGE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_RULES: dict[str, type[Optimizer]] = {
    "sgd": SGD,
    "adagrad": Adagrad,
    "rowwise_adagrad": RowwiseAdagrad,
    "adam": LazyAdam,
}
_WIDEST = 16_384
_BOTTOM = (256, 64)


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train a model.

    Attributes
    ----------
    dim
        Width of the rows.
    bottom, top
        Widths of the hidden layers below and above the rows; only some models have a bottom part.
    optimizer, lr
        Rule of rows and dense layers alike: ``sgd``, ``adagrad``, ``rowwise_adagrad`` (dense layers: adagrad) or
        ``adam`` (rows: lazy Adam).
    batch_size, epochs, seed
        The seed gives the first weights and the order of the data.
    storage
        Of the rows: float32, bfloat16 or float16.
    model
        ``dlrm``, or another of `MODELS`; or ``tbsm``, which reads histories.
    history
        For ``tbsm``: how many earlier clicks of the same user a sample brings.

    Examples
    --------
    >>> Settings(dim=8).batch_size
    1024
    """

    dim: int = 16
    bottom: tuple[int, ...] = _BOTTOM
    top: tuple[int, ...] = (256, 64)
    optimizer: str = "adagrad"
    lr: float = 0.01
    batch_size: int = 1024
    epochs: int = 1
    seed: int = 0
    storage: str = "float32"
    model: str = "dlrm"
    history: int = 0

    def __post_init__(self) -> None:
        for name in ("dim", "batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}", hint="see --help")
        if self.seed < 0:
            raise InputError(f"seed must not be negative, got {self.seed}", hint="0 is the default")
        for width in (self.dim, *self.bottom, *self.top):
            if not 1 <= width <= _WIDEST:
                raise InputError(f"a layer cannot have the width {width}", hint=f"choose from 1 to {_WIDEST:,}")
        if self.storage not in STORAGE:
            raise InputError(f"rows cannot be stored as {self.storage!r}", hint=f"use {', '.join(STORAGE)}")
        self.rule()
        if self.model not in (*MODELS, "tbsm"):
            raise InputError(f"there is no model {self.model!r}", hint=f"choose one of {', '.join((*MODELS, 'tbsm'))}")
        if self.history and self.model != "tbsm":
            raise InputError(f"{self.model} reads no history, got one of {self.history}", hint="use tbsm")
        if self.model == "tbsm" and self.history < 1:
            raise InputError(f"tbsm reads a history of 1 or more, got {self.history}", hint="20 is a usual length")
        if self.dim < (least := self.kind.least_dim):
            raise InputError(f"{self.model} cannot use rows of width {self.dim}", hint=f"{least} is the least")
        if self.bottom != _BOTTOM and not self.has_bottom:
            raise InputError(f"{self.model} has no bottom layers to make {self.bottom}", hint="leave them out")

    @property
    def kind(self) -> type[ClickModel]:
        """The class of the model."""
        return TBSM if self.model == "tbsm" else MODELS[self.model]

    @property
    def has_bottom(self) -> bool:
        """Whether the model takes bottom layers."""
        return "bottom" in inspect.signature(self.kind).parameters

    @property
    def items(self) -> int:
        """Rows of the log in a sample."""
        return self.history + 1

    def rule(self) -> Optimizer:
        """Return the update rule of the rows."""
        if self.optimizer not in _RULES:
            raise InputError(f"there is no optimizer {self.optimizer!r}", hint=f"choose one of {', '.join(_RULES)}")
        return _RULES[self.optimizer](lr=self.lr)

    def plain_rule(self) -> Optimizer:
        """Return the rule of the plain PyTorch arm: the same one, but Adagrad where PyTorch has no rowwise Adagrad."""
        return Adagrad(lr=self.lr) if self.optimizer == "rowwise_adagrad" else self.rule()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """Build from `to_dict`'s output; an unknown key is an error."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(values) - known:
            raise InputError(f"there is no setting {min(unknown)!r}", hint=f"there are {', '.join(sorted(known))}")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)


def build(
    num_rows: Mapping[str, int],
    num_dense: int,
    settings: Settings,
    *,
    plain: bool = False,
    tiers: Tiering | None = None,
    store: Path | None = None,
    resume: bool = False,
    update: Literal["backward", "step"] = "backward",
) -> ClickModel:
    """Build the model; `plain` takes PyTorch's own tables, with the same first weights.

    Parameters
    ----------
    num_rows
        Rows per feature, in the order of the input.
    num_dense
        Number of dense inputs of a row.
    tiers, store, resume
        With these the rows are spread over memory and a folder, which holds those of an earlier sitting (`resume`).
    update
        When our rows change, see `EmbeddingBags`.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    tables = [Table(name, rows, settings.dim) for name, rows in num_rows.items()]
    bags: EmbeddingBags | TorchBags
    if plain:
        bags = TorchBags(tables, generator=generator)
    elif tiers is not None:
        from vitalfew.embeddings.tiered import TieredEmbeddings
        from vitalfew.tiers import Dram, File

        assert store is not None
        bags = TieredEmbeddings(
            tables, settings.rule(), tiers=[Dram(tiers.memory), File(store)], policy=tiers.rule(), ahead=tiers.ahead,
            dtype=STORAGE[settings.storage], generator=generator, seed=settings.seed, resume=resume,
            update=update,
        )  # fmt: skip
    else:
        storage = STORAGE[settings.storage]
        bags = EmbeddingBags(
            tables, settings.rule(), dtype=storage, generator=generator, seed=settings.seed, update=update
        )
    layers: dict[str, Any] = {"top": (*settings.top, 1)}
    if settings.history:
        layers = {"top": settings.top, "history": settings.history}
    if settings.has_bottom:
        layers["bottom"] = (*settings.bottom, settings.dim)
    make: Callable[..., ClickModel] = settings.kind
    return make(bags, dense_in=num_dense, **layers, generator=generator)


def dense_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Return the torch optimizer of all layers but the tables, by the same rule."""
    parameters = [p for name, p in model.named_parameters() if not name.startswith("tables.")]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=settings.lr)
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=settings.lr)
    return torch.optim.Adagrad(parameters, lr=settings.lr)


def build_arm(
    num_rows: Mapping[str, int],
    num_dense: int,
    settings: Settings,
    *,
    plain: bool,
    tiers: Tiering | None = None,
    store: Path | None = None,
    update: Literal["backward", "step"] = "backward",
) -> tuple[ClickModel, list[torch.optim.Optimizer]]:
    """Build the model of one way to train, and every torch optimizer it needs."""
    model = build(num_rows, num_dense, settings, plain=plain, tiers=tiers, store=store, update=update)
    optimizers = [dense_optimizer(model, settings)]
    if isinstance(model.tables, TorchBags):
        optimizers.append(model.tables.optimizer(settings.plain_rule()))
    return model, optimizers
