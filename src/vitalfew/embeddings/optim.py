"""Update rules for rows. They keep state beside the rows and run inside the row kernels."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from vitalfew.core import InputError

__all__ = ["SGD", "Adagrad", "LazyAdam", "Optimizer", "RowwiseAdagrad", "optimizer_from_dict"]


@dataclass(frozen=True, slots=True)
class Optimizer:
    """What all the update rules share.

    With g the gradient of one row, summed over the batch, every rule updates a row at most once per step, and only
    rows the batch has touched.

    Attributes
    ----------
    lr
        Learning rate.
    weight_decay
        Coupled (L2): ``g += weight_decay * w`` for the rows a batch touches, in that step only. Rows that are not
        touched do not decay, so rare rows decay less often than a dense optimizer would make them.
    """

    lr: float
    weight_decay: float = 0.0

    name: ClassVar[str] = ""
    kind: ClassVar[int] = -1
    wide_states: ClassVar[int] = 0
    """States as wide as the row, float32."""
    row_states: ClassVar[int] = 0
    """States of one number per row, float32."""

    def __post_init__(self) -> None:
        for field, value in self.settings().items():
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{field} must be finite and not negative, got {value}", hint="lr=0.01 is usual")

    def settings(self) -> dict[str, float]:
        """Return the fields as plain numbers."""
        return asdict(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the name and the settings, for a checkpoint."""
        return {"name": self.name, **self.settings()}

    def state_bytes(self, dim: int) -> int:
        """Return the bytes of state one row of this width needs."""
        return 4 * (self.wide_states * dim + self.row_states)

    def scalars(self, step: int) -> tuple[float, float, float, float]:
        """Return (rate, eps, beta1, beta2) as the kernels want them, for the step counted from 1."""
        del step
        return self.lr, 0.0, 0.0, 0.0


@dataclass(frozen=True, slots=True)
class SGD(Optimizer):
    """``w -= lr * g``. No state.

    Examples
    --------
    >>> SGD(lr=0.1).state_bytes(16)
    0
    """

    name: ClassVar[str] = "sgd"
    kind: ClassVar[int] = 0


@dataclass(frozen=True, slots=True)
class RowwiseAdagrad(Optimizer):
    """``s += mean(g * g); w -= lr * g / (sqrt(s) + eps)``. One number of state per row.

    The rule of FBGEMM's ``EXACT_ROWWISE_ADAGRAD`` and of the DLRM reference code.

    Examples
    --------
    >>> RowwiseAdagrad(lr=0.1).state_bytes(16)
    4
    """

    eps: float = 1e-8

    name: ClassVar[str] = "rowwise_adagrad"
    kind: ClassVar[int] = 1
    row_states: ClassVar[int] = 1

    def scalars(self, step: int) -> tuple[float, float, float, float]:
        del step
        return self.lr, self.eps, 0.0, 0.0


@dataclass(frozen=True, slots=True)
class Adagrad(Optimizer):
    """``s += g * g; w -= lr * g / (sqrt(s) + eps)``, as ``torch.optim.Adagrad`` does. State as wide as the row.

    Examples
    --------
    >>> Adagrad(lr=0.1).state_bytes(16)
    64
    """

    eps: float = 1e-10

    name: ClassVar[str] = "adagrad"
    kind: ClassVar[int] = 2
    wide_states: ClassVar[int] = 1

    def scalars(self, step: int) -> tuple[float, float, float, float]:
        del step
        return self.lr, self.eps, 0.0, 0.0


@dataclass(frozen=True, slots=True)
class LazyAdam(Optimizer):
    """Adam whose moments move only for the rows a batch touches, as ``torch.optim.SparseAdam`` does.

    The bias correction counts all steps, not the visits of a row. This is not dense Adam: there the moments of
    every row decay, and every row moves, in each step.

    Examples
    --------
    >>> LazyAdam(lr=0.001).state_bytes(16)
    128
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    name: ClassVar[str] = "lazy_adam"
    kind: ClassVar[int] = 3
    wide_states: ClassVar[int] = 2

    def __post_init__(self) -> None:
        # slots=True makes a new class, and the zero-argument super() would still name the former one.
        Optimizer.__post_init__(self)
        if self.beta1 >= 1 or self.beta2 >= 1:
            raise InputError(f"betas must lie in [0, 1), got {self.beta1} and {self.beta2}", hint="0.9 and 0.999")

    def scalars(self, step: int) -> tuple[float, float, float, float]:
        rate = self.lr * math.sqrt(1 - self.beta2**step) / (1 - self.beta1**step)
        return rate, self.eps, self.beta1, self.beta2


_RULES: dict[str, type[Optimizer]] = {rule.name: rule for rule in (SGD, RowwiseAdagrad, Adagrad, LazyAdam)}


def optimizer_from_dict(settings: dict[str, Any]) -> Optimizer:
    """Build the rule that `Optimizer.to_dict` has described.

    Examples
    --------
    >>> optimizer_from_dict({"name": "sgd", "lr": 0.1})
    SGD(lr=0.1, weight_decay=0.0)
    """
    values = dict(settings)
    name = values.pop("name", None)
    if name not in _RULES:
        raise InputError(f"there is no optimizer {name!r}", hint=f"choose one of {', '.join(_RULES)}")
    try:
        return _RULES[name](**values)
    except TypeError as error:
        raise InputError(f"{name} does not take these settings: {error}", hint="see its documentation") from None
