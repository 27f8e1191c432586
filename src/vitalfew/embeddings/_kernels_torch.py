"""The row kernels in plain torch: what the Triton kernels mean, on any device.

A slab is `weight` (slots, D) in float32, bfloat16 or float16, with state `wide` (slots, D) and `narrow` (slots, 1) in
float32. A lookup is a slot and the bag it goes to, optionally with a scale; lookups stand in sample order. Sums are
built term by term in that order, all arithmetic is float32, and every expression is the one of `_kernels_numba`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from vitalfew.core import need

__all__ = [
    "gather",
    "in_row_order",
    "kernels_for",
    "pool",
    "scalars",
    "scale_gradients",
    "spread",
    "squared_norm",
    "update",
]

Floats = tuple[float, float, float, float, float]


def kernels_for(device: torch.device) -> ModuleType:
    """Return the kernels for a slab on this device: Triton's on a GPU, else those of this file."""
    if device.type == "cuda":
        need("triton")
        from vitalfew.embeddings import _kernels_triton

        return _kernels_triton
    return sys.modules[__name__]


# -- shared with the Triton kernels


def spread(
    offsets: Tensor, scales: Tensor | None, mean: Tensor | None, num_lookups: int
) -> tuple[Tensor, Tensor | None]:
    """Return the bag of each lookup, and its scale if the bags are weighted or averaged.

    `offsets` holds where each bag begins, and the end; `mean` says of each bag whether it is averaged.
    """
    sizes = offsets.diff()
    bag_of = torch.repeat_interleave(sizes, output_size=num_lookups)
    if mean is None:
        return bag_of, scales
    size = torch.where(mean, sizes, 1)[bag_of].float()
    return bag_of, (torch.ones_like(size) if scales is None else scales) / size


def scalars(rates: Sequence[float]) -> Floats:
    """Return rate, eps, 1 - beta1, 1 - beta2 and weight decay, rounded as float32 arithmetic rounds them."""
    rate, eps, beta1, beta2, decay = (np.float32(x) for x in rates)
    one = np.float32(1)
    return float(rate), float(eps), float(one - beta1), float(one - beta2), float(decay)


def in_row_order(
    slots: Tensor, bag_of: Tensor | None, scale_of: Tensor | None, names: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return slot, bag, scale and name of every lookup by slot, the lookups of one slot in sample order."""
    in_order, order = torch.sort(slots, stable=True)
    return (
        in_order,
        order if bag_of is None else bag_of[order],
        None if scale_of is None else scale_of[order],
        in_order if names is None else names[order],
    )


# -- the kernels


def gather(weight: Tensor, slots: Tensor, out: Tensor) -> None:
    """Copy the row of each lookup to `out`, as float32."""
    out.copy_(weight[slots])


def pool(weight: Tensor, slots: Tensor, offsets: Tensor, scale_of: Tensor | None, out: Tensor) -> None:
    """Sum the rows of each bag, times their scales; an empty bag is zeros."""

    def term(k: Tensor) -> Tensor:
        values = weight[slots[k]].float()
        return values if scale_of is None else scale_of[k, None] * values

    out.copy_(_sums(term, offsets[:-1], offsets.diff(), weight.shape[1]))


def update(
    kind: int,
    weight: Tensor,
    wide: Sequence[Tensor],
    narrow: Sequence[Tensor],
    slots: Tensor,
    bag_of: Tensor | None,
    scale_of: Tensor | None,
    grad: Tensor,
    rates: Sequence[float],
    *,
    names: Tensor | None = None,
    dice: int = 0,
    stats: Tensor | None = None,
    step: int = 0,
    grad_scale: float = 1.0,
) -> Tensor:
    """Update every touched row once from the sum of its gradients; returns how many rows that were.

    Parameters
    ----------
    kind
        0 SGD, 1 row-wise Adagrad, 2 Adagrad, 3 lazy Adam.
    bag_of, scale_of
        Of each lookup; without bags lookup i takes line i of `grad`.
    grad
        Of the bags, float32, shape (bags, D).
    rates
        rate, eps, beta1, beta2, weight decay.
    names, dice
        The row each lookup is about, wherever it lies, and the step's number: the stochastic rounding of 16-bit
        weights is a function of these and the column.
    stats, step
        int32, shape (slots, 2): counts the updates of a row, and notes the last step.
    """
    rows, total, names = _gradients(slots, bag_of, scale_of, grad, names)
    # Numbers on the device: there a division by a plain number multiplies by its reciprocal.
    rate, eps, rest1, rest2, decay = torch.tensor(scalars(rates), device=grad.device).unbind()
    total *= grad_scale
    values = weight[rows].float()
    if rates[4]:
        total += decay * values
    if kind == 0:
        values -= rate * total
    elif kind == 1:
        state = narrow[0][rows, 0] + _dots(total, total) / torch.full_like(rate, grad.shape[1])
        narrow[0][rows, 0] = state
        values -= (rate / (_root(state) + eps))[:, None] * total
    elif kind == 2:
        state = wide[0][rows] + total * total
        wide[0][rows] = state
        values -= rate * (total / (_root(state) + eps))
    else:
        moment1, moment2 = wide[0][rows], wide[1][rows]
        moment1 += rest1 * (total - moment1)
        moment2 += rest2 * (total * total - moment2)
        wide[0][rows], wide[1][rows] = moment1, moment2
        values -= rate * (moment1 / (_root(moment2) + eps))
    weight[rows] = values if weight.dtype == torch.float32 else _narrow(values, weight.dtype, names, dice)
    if stats is not None:
        stats[rows, 0] += 1
        stats[rows, 1] = step
    return torch.tensor(len(rows), device=grad.device)


def squared_norm(
    slots: Tensor, bag_of: Tensor | None, scale_of: Tensor | None, grad: Tensor, grad_scale: float = 1.0
) -> Tensor:
    """Return the square of the 2-norm of the summed gradients of all rows, float64."""
    _, total, _ = _gradients(slots, bag_of, scale_of, grad, None)
    return (total * grad_scale).double().square().sum()


def scale_gradients(
    weight: Tensor, slots: Tensor, bag_of: Tensor | None, divisor: Tensor | None, grad: Tensor
) -> Tensor:
    """Return the gradient of each lookup's scale: its row times its bag's gradient, over the divisor of the bag."""
    # Without bags there may be more lines of `grad` than lookups: those of empty bags, where there is no lookup at all.
    out = _dots(weight[slots].float(), grad[: len(slots)] if bag_of is None else grad[bag_of])
    return out if divisor is None else out / divisor


def _gradients(
    slots: Tensor, bag_of: Tensor | None, scale_of: Tensor | None, grad: Tensor, names: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the distinct slots, the gradient of each, and the row each holds."""
    in_order, bags, scales, names = in_row_order(slots, bag_of, scale_of, names)
    rows, counts = torch.unique_consecutive(in_order, return_counts=True)
    starts = counts.cumsum(0) - counts

    def term(k: Tensor) -> Tensor:
        return grad[bags[k]] if scales is None else scales[k, None] * grad[bags[k]]

    return rows, _sums(term, starts, counts, grad.shape[1]), names[starts]


def _sums(term: Callable[[Tensor], Tensor], starts: Tensor, sizes: Tensor, width: int) -> Tensor:
    """Sum each segment in its order: the first terms of all, then the second ones, and so on."""
    out = torch.zeros(len(starts), width, device=starts.device)
    for rank in range(int(sizes.max()) if len(sizes) else 0):
        live = (sizes > rank).nonzero().squeeze(1)
        out[live] += term(starts[live] + rank)
    return out


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Return the dot product of each couple of lines, summed column by column."""
    out = torch.zeros(len(a), device=a.device)
    for d in range(a.shape[1]):
        out += a[:, d] * b[:, d]
    return out


def _root(x: Tensor) -> Tensor:
    """Return the root, rounded correctly: torch's own of float32 is not, on some processors."""
    return x.double().sqrt().float()


# -- stochastic rounding; 64-bit integers wrap around, signed ones too


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)


def _narrow(values: Tensor, dtype: torch.dtype, names: Tensor, dice: int) -> Tensor:
    """Return float32 values as 16-bit floats, rounding up with the probability of the remainder."""
    start = _mix((names * _signed(0x9E3779B97F4A7C15)) ^ _signed(dice % (1 << 64)))
    random = _mix(start[:, None] + torch.arange(values.shape[1], device=values.device))
    bits = values.view(torch.int32)
    if dtype == torch.bfloat16:
        up = bits + (random & 0xFFFF).int()
        exponent = 0x7F800000
        # What is infinite or NaN stays so, and nothing else is rounded up to it.
        huge = ((bits & exponent) == exponent) | ((up & exponent) == exponent)
        short = torch.where(huge, bits, up) >> 16
    else:
        sign = (bits >> 16) & 0x8000
        # Times 2**-112 the exponent and mantissa of a half stand in the upper bits of the float's.
        small = (values.abs().clamp(max=65504.0) * 2.0**-112).view(torch.int32)
        short = sign | ((small + (random & 0x1FFF).int()) >> 13).clamp(max=0x7BFF)
    return short.to(torch.int16).view(dtype)
