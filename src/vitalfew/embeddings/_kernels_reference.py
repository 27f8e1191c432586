"""Plain twins of the row kernels: slow, and short enough to be read as their definition.

Weights are a float32 array, or the bits of 16-bit floats with `storage` saying which. All arithmetic is float32 in the
order of the kernels, so results are compared bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitalfew.embeddings.optim import Adagrad, LazyAdam, Optimizer, RowwiseAdagrad

__all__ = ["gradients", "narrow", "pool", "random_bits", "scale_gradients", "squared_norm", "update", "widen"]

F32, BF16, F16 = 0, 1, 2

_ALL = 2**64 - 1
_GOLD = 0x9E3779B97F4A7C15
_STEP = 0xD1342543DE82EF95


def _mix(x: int) -> int:
    """SplitMix64's finaliser."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _ALL
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _ALL
    return x ^ (x >> 31)


def random_bits(seed: int, step: int, row: int, dim: int) -> list[int]:
    """Return the random numbers of one row's rounding: a function of seed, step, row and column alone."""
    dice = (seed * _GOLD + step * _STEP) & _ALL
    start = _mix(dice ^ (row * _GOLD & _ALL))
    return [_mix((start + d) & _ALL) for d in range(dim)]


def widen(row: NDArray[Any], storage: int) -> NDArray[np.float32]:
    """Return a stored row as float32: exact."""
    if storage == F32:
        return np.array(row, np.float32)
    if storage == BF16:
        return (row.astype(np.uint32) << 16).view(np.float32)
    return row.view(np.float16).astype(np.float32)


def narrow(values: NDArray[np.float32], storage: int, bits: list[int]) -> NDArray[np.uint16]:
    """Return float32 values as 16-bit floats, each one of its two neighbours, the nearer one the likelier."""
    stored = []
    for value, random in zip(values, bits, strict=True):
        if storage == BF16:
            x = int(value.view(np.uint32))
            up = x + (random & 0xFFFF)
            huge = 0x7F800000
            stored.append((x if huge in (x & huge, up & huge) else up) >> 16)
        else:
            sign = int(value.view(np.uint32)) >> 16 & 0x8000
            # Times 2**-112 the exponent and mantissa of a half stand in the upper bits of the float's.
            small = np.minimum(abs(value), np.float32(65504)) * np.float32(2.0**-112)
            stored.append(sign | min((int(small.view(np.uint32)) + (random & 0x1FFF)) >> 13, 0x7BFF))
    return np.array(stored, np.uint16)


def _bags(num_ids: int, offsets: NDArray[np.int64] | None) -> Iterator[tuple[int, range]]:
    if offsets is None:
        offsets = np.arange(num_ids + 1)
    for bag in range(len(offsets) - 1):
        yield bag, range(int(offsets[bag]), int(offsets[bag + 1]))


def pool(
    weight: NDArray[Any],
    storage: int,
    ids: NDArray[np.int64],
    offsets: NDArray[np.int64] | None,
    scales: NDArray[np.float32] | None,
    mean: NDArray[np.bool_],
    base: NDArray[np.int64],
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Return the pooled bags, and row, bag and scale of every lookup; bag b belongs to feature ``b % len(base)``."""
    num_bags = len(ids) if offsets is None else len(offsets) - 1
    out = np.zeros((num_bags, weight.shape[1]), np.float32)
    row_of, bag_of = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
    scale_of = np.ones(len(ids), np.float32)
    for bag, members in _bags(len(ids), offsets):
        feature = bag % len(base)
        for i in members:
            row_of[i], bag_of[i] = base[feature] + ids[i], bag
            if scales is not None:
                scale_of[i] = scales[i]
            if mean[feature]:
                scale_of[i] /= np.float32(len(members))
            out[bag] += scale_of[i] * widen(weight[row_of[i]], storage)
    return out, row_of, bag_of, scale_of


def gradients(
    row_of: NDArray[np.int64],
    bag_of: NDArray[np.int64],
    scale_of: NDArray[np.float32],
    grad: NDArray[np.float32],
    grad_scale: float = 1.0,
) -> dict[int, NDArray[np.float32]]:
    """Return the gradient of each touched row, summed in the order of the lookups."""
    total: dict[int, NDArray[np.float32]] = {}
    for row, bag, scale in zip(row_of.tolist(), bag_of.tolist(), scale_of, strict=True):
        total.setdefault(row, np.zeros(grad.shape[1], np.float32))
        total[row] += scale * grad[bag]
    return {row: g * np.float32(grad_scale) for row, g in total.items()}


def squared_norm(total: dict[int, NDArray[np.float32]]) -> float:
    """Return the square of the 2-norm of the gradients of all rows."""
    return sum(float(np.square(g.astype(np.float64)).sum()) for g in total.values())


def update(
    optimizer: Optimizer,
    weight: NDArray[Any],
    storage: int,
    state: dict[str, NDArray[np.float32]],
    total: dict[int, NDArray[np.float32]],
    *,
    step: int,
    seed: int = 0,
) -> None:
    """Update every touched row, and its state, in place from its gradient; the steps count from 1."""
    rate, eps, beta1, beta2 = (np.float32(x) for x in optimizer.scalars(step))
    decay, one = np.float32(optimizer.weight_decay), np.float32(1)
    for row, gradient in total.items():
        g, w = gradient, widen(weight[row], storage)
        if decay:
            g = g + decay * w
        if isinstance(optimizer, RowwiseAdagrad):
            square = np.float32(0)
            for x in g:
                square += x * x
            s = state["narrow0"][row]
            s += square / np.float32(len(g))
            w -= (rate / (np.sqrt(s) + eps)) * g
        elif isinstance(optimizer, Adagrad):
            s = state["wide0"][row]
            s += g * g
            w -= rate * (g / (np.sqrt(s) + eps))
        elif isinstance(optimizer, LazyAdam):
            m, v = state["wide0"][row], state["wide1"][row]
            m += (one - beta1) * (g - m)
            v += (one - beta2) * (g * g - v)
            w -= rate * (m / (np.sqrt(v) + eps))
        else:
            w -= rate * g
        weight[row] = w if storage == F32 else narrow(w, storage, random_bits(seed, step, row, len(w)))


def scale_gradients(
    weight: NDArray[Any],
    storage: int,
    row_of: NDArray[np.int64],
    bag_of: NDArray[np.int64],
    divisor: NDArray[np.float32],
    grad: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Return the gradient of each lookup's scale: its row times its bag's gradient, over the divisor of the bag."""
    out = np.zeros(len(row_of), np.float32)
    for i, (row, bag) in enumerate(zip(row_of.tolist(), bag_of.tolist(), strict=True)):
        for w, g in zip(widen(weight[row], storage), grad[bag], strict=True):
            out[i] += w * g
    return out / divisor
