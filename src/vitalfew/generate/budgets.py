"""From a budget to slots: per layer and key-value head, how many tokens stay; exact, so that rounding costs none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitalfew.core.budget import Budget
from vitalfew.core.errors import InputError

if TYPE_CHECKING:
    from vitalfew.generate.quant import Codec

__all__ = ["by_mass", "pyramid", "slot_bytes", "slots_for_bytes", "uniform", "weighted"]

_POSITION, _SCORE = 4, 4
_REACHED = 1e-9


def slot_bytes(head_dim_k: int, head_dim_v: int, element_size: int, codec: Codec | None = None) -> int:
    """Return the bytes of one slot of one key-value head: key, value, position and score.

    Parameters
    ----------
    head_dim_k, head_dim_v
        Channels of a key and of a value.
    element_size
        Bytes per channel in the model's type.
    codec
        How keys and values are coded; then its codes and scales count instead.

    Examples
    --------
    >>> slot_bytes(64, 64, 2)
    264
    """
    for size in (head_dim_k, head_dim_v, element_size):
        if size < 1:
            raise InputError(f"a slot cannot have {size} channels or bytes", hint="pass the model's own sizes")
    content = (
        (head_dim_k + head_dim_v) * element_size
        if codec is None
        else codec.nbytes(head_dim_k) + codec.nbytes(head_dim_v)
    )
    return content + _POSITION + _SCORE


def slots_for_bytes(
    budget: Budget | int | str, slot_bytes: Sequence[int], rows: int, *, least: int = 1, fixed: int = 0
) -> int:
    """Return the most slots per layer and head whose bytes, in all layers and rows, fit.

    Parameters
    ----------
    budget
        A size for the whole cache, such as ``"256 MiB"``; an int is a number of bytes.
    slot_bytes
        Per layer: bytes of one slot of one row in all heads.
    rows
        Of the batch; beams count.
    least
        Slots below which the policy cannot work.
    fixed
        Bytes of one row, over all layers, that do not depend on its slots.

    Raises
    ------
    InputError
        If fewer than `least` slots fit; the message names the smallest size that works.

    Examples
    --------
    >>> slots_for_bytes("1 MiB", [3 * 264] * 30, rows=4)
    11
    """
    limit = Budget("bytes", budget) if isinstance(budget, int) else Budget.of(budget)
    if limit.kind != "bytes":
        raise InputError(f"{limit} is no size", hint='write it like "256 MiB"')
    if rows < 1 or not slot_bytes:
        raise InputError(f"{rows} rows in {len(slot_bytes)} layers need no slots", hint="pass one of each at least")
    one = rows * sum(slot_bytes)
    slots = (int(limit.value) - rows * fixed) // one
    if slots < max(1, least):
        smallest = rows * fixed + max(1, least) * one
        raise InputError(
            f"{int(limit.value)} bytes hold {max(slots, 0)} slots per layer and head for {rows} rows, "
            f"{max(1, least)} are needed",
            hint=f"the smallest size that works is {smallest} bytes",
        )
    return slots


def uniform(budget: Budget | float | int | str, length: int, num_layers: int, *, least: int = 1) -> list[int]:
    """Return the same slots for every layer.

    Parameters
    ----------
    budget
        A share of the length, rounded down, or a number of slots per layer and head, which may exceed the length
        (nothing is evicted before it is reached). For a size see `slots_for_bytes`, for a coverage `by_mass`.
    length
        Tokens of a row, padding not counted.
    num_layers
        Layers with slots.
    least
        Slots below which the policy cannot work.

    Examples
    --------
    >>> uniform(0.29, 100, 3)
    [29, 29, 29]
    """
    slots = _per_layer(Budget.of(budget), length, num_layers)
    if slots < least:
        raise InputError(
            f"{Budget.of(budget)} of {length} tokens leaves {slots} slots, {least} are needed",
            hint="raise the budget, or use a policy with fewer sinks and latest tokens",
        )
    return [slots] * num_layers


def _per_layer(budget: Budget, length: int, num_layers: int) -> int:
    if num_layers < 1 or length < 1:
        raise InputError(f"{length} tokens in {num_layers} layers need no slots", hint="pass one of each at least")
    if budget.kind == "bytes":
        raise InputError("a size depends on rows and heads", hint="turn it into slots with slots_for_bytes")
    if budget.kind == "coverage":
        raise InputError("a coverage depends on the text", hint="find the slots with by_mass")
    if budget.kind == "count":
        return int(budget.value)
    # The share as it was written: the float nearest to 0.29 times 100 is less than 29.
    return math.floor(length * Fraction(repr(float(budget.value))))


def pyramid(
    budget: Budget | float | int | str, length: int, num_layers: int, *, slope: float = 0.25, least: int = 1
) -> list[int]:
    """Return slots that fall linearly from the first layer to the last, as many in all as `uniform`.

    Parameters
    ----------
    budget, length, num_layers, least
        As of `uniform`; no layer gets fewer than `least`, and none more than the length.
    slope
        How far the first layer lies above the mean, and the last below: 0.25 goes from 1.25 to 0.75 times the mean. On
        SmolLM2-135M that holds as much attention as `uniform`, and steeper ones hold less.

    References
    ----------
    Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", 2024; section 3.

    Examples
    --------
    >>> pyramid(0.4, 100, 5, slope=0.5)
    [60, 50, 40, 30, 20]
    """
    if not 0 <= slope <= 1:
        raise InputError(f"slope must lie in [0, 1], got {slope}", hint="0 is uniform, 1 leaves the last layer least")
    steep, last = Fraction(repr(float(slope))), max(num_layers - 1, 1)
    weights = [1 + steep * Fraction(last - 2 * layer, last) for layer in range(num_layers)]
    return weighted(budget, length, weights if num_layers > 1 else [1], least=least)


def weighted(
    budget: Budget | float | int | str, length: int, weights: Sequence[float | Fraction], *, least: int = 1
) -> list[int]:
    """Return slots in proportion to a weight per layer, as many in all as `uniform`.

    No layer gets fewer than `least` or more than the length; the others share what is left in proportion.

    Examples
    --------
    >>> weighted(0.5, 100, [3, 2, 1])
    [75, 50, 25]
    """
    exact = [w if isinstance(w, Fraction) else _fraction(w) for w in weights]
    if not exact or min(exact) < 0 or not sum(exact):
        raise InputError(
            f"weights must be positive numbers, got {list(map(float, weights))}", hint="one weight per layer"
        )
    mean = uniform(budget, length, len(exact), least=least)[0]
    ideal = _between(exact, mean * len(exact), least, max(length, mean))
    slots = [math.floor(x) for x in ideal]
    # What rounding left over goes to the largest remainders, earlier layers first.
    order = sorted(range(len(ideal)), key=lambda layer: slots[layer] - ideal[layer])
    for layer in order[: mean * len(exact) - sum(slots)]:
        slots[layer] += 1
    return slots


def _fraction(weight: float) -> Fraction:
    if not math.isfinite(weight):
        raise InputError(f"a weight cannot be {weight}", hint="pass one positive number per layer")
    return Fraction(repr(float(weight)))


def _between(weights: Sequence[Fraction], total: int, low: int, high: int) -> list[Fraction]:
    """Return numbers in proportion to the weights with this sum, moved to the nearest end where they leave a range."""
    found: dict[int, Fraction] = {}
    free = list(range(len(weights)))
    while free:
        left, weight = total - sum(found.values()), sum(weights[k] for k in free)
        share = {k: left * weights[k] / weight if weight else Fraction(left) / len(free) for k in free}
        over = sum((max(x - high, Fraction(0)) for x in share.values()), Fraction(0))
        under = sum((max(low - x, Fraction(0)) for x in share.values()), Fraction(0))
        # Only the side that is violated more is settled: the other may come into the range by what that frees.
        end = high if over >= under else low
        out = [k for k in free if (share[k] > high if over >= under else share[k] < low)]
        if not out:
            found |= share
            break
        found |= dict.fromkeys(out, Fraction(end))
        free = [k for k in free if k not in found]
    return [found[k] for k in range(len(weights))]


def by_mass(
    curves: Sequence[ArrayLike], target: Budget | float, *, least: int = 1, cap: int | None = None
) -> list[int]:
    """Return the fewest slots with which the mean attention mass over layers and heads reaches a target.

    Each slot goes to the layer that gains most by it, so all of `uniform` at the same mass would not be fewer. One
    layer alone gets the fewest slots with which its own heads reach the target on average.

    Parameters
    ----------
    curves
        Per layer, shape ``(..., n)``: the mass that the best 1, 2, ... n tokens of a head have, as of
        `coverage_curve`.
    target
        The mass, in (0, 1], or ``Budget.cover(0.99)``.
    least
        Slots that every layer gets: the policy's sinks and latest tokens.
    cap
        Slots that no layer exceeds; then the target may be missed.

    Examples
    --------
    >>> by_mass([[0.9, 1.0, 1.0, 1.0], [0.4, 0.7, 0.9, 1.0]], 0.8)
    [1, 2]
    """
    share = target.value if isinstance(target, Budget) else float(target)
    if isinstance(target, Budget) and target.kind != "coverage":
        raise InputError(f"{target} is no coverage", hint="pass Budget.cover(0.99), or 0.99")
    if not 0 < share <= 1:
        raise InputError(f"a mass must lie in (0, 1], got {share}", hint="0.99 loses 1 % of the attention")
    if cap is not None and cap < least:
        raise InputError(f"a cap of {cap} slots is below the {least} that are needed", hint="raise the cap")
    means = [_mean_curve(curve) for curve in curves]
    if not means:
        raise InputError("there are 0 layers to spread slots over", hint="pass one curve per layer")
    gains = [np.diff(mean[min(least, len(mean)) - 1 : cap]) for mean in means]
    layer_of = np.repeat(np.arange(len(means)), [len(gain) for gain in gains])
    # A curve that starts with protected tokens need not be concave: a slot counts for no more than those before it.
    flat = np.concatenate([np.minimum.accumulate(gain) for gain in gains])
    order = np.argsort(-flat, kind="stable")
    start = sum(float(mean[min(least, len(mean)) - 1]) for mean in means)
    reached = np.concatenate([[start], start + np.cumsum(np.concatenate(gains)[order])])
    taken = min(int(np.searchsorted(reached, share * len(means) - _REACHED)), len(order))
    more = np.bincount(layer_of[order[:taken]], minlength=len(means))
    return [min(least, len(mean)) + int(k) for mean, k in zip(means, more, strict=True)]


def _mean_curve(curve: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(curve, dtype=np.float64)
    if not values.ndim or not values.shape[-1]:
        raise InputError(f"a curve of shape {values.shape} has no tokens", hint="pass the mass of 1, 2, ... n tokens")
    mean: NDArray[np.float64] = values.reshape(-1, values.shape[-1]).mean(0)
    if not np.isfinite(mean).all() or (np.diff(mean) < -_REACHED).any():
        raise InputError("a curve falls or is not finite", hint="pass the cumulated mass of 1, 2, ... n tokens")
    return mean
