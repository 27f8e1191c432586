# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, import-untyped, import-not-found"
# What stands under @triton.jit is Triton's language, to which Python's types do not apply.

"""The row kernels for a slab in the memory of a GPU; `_kernels_torch` says what each means and how it is called.

Nothing here depends on the order in which programs run: a row is updated by one program, which sums the row's
gradients in sample order, and there are no atomics. The host is never waited for: the update starts a program per
lookup, and those that are not the first of their row end at once. Products and sums are not fused, division and root
are rounded correctly, so results equal the CPU's wherever the order of the sums is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitalfew.embeddings._kernels_torch import in_row_order, scalars

__all__ = ["gather", "pool", "scale_gradients", "squared_norm", "update"]

_AHEAD = 8
"""Terms of a sum that are loaded before the first of them is needed."""
_TILE = 1024
"""Numbers a program works on at a time where it handles several rows."""


@triton.jit
def _gather(weight, slots, out, num, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    line = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)[None, :]
    slot = tl.load(slots + line, mask=line < num, other=0)[:, None]
    mask = (line < num)[:, None] & (d < DIM)
    values = tl.load(weight + slot * DIM + d, mask=mask)
    tl.store(out + line[:, None] * DIM + d, values.to(tl.float32), mask=mask)


@triton.jit
def _pool(
    weight, slots, offsets, scales, out,
    SCALED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    bag = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    first = tl.load(offsets + bag)
    last = tl.load(offsets + bag + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(first, last, AHEAD):
        for j in tl.static_range(AHEAD):
            live = k + j < last
            slot = tl.load(slots + k + j, mask=live, other=0)
            term = tl.load(weight + slot * DIM + d, mask=d < tl.where(live, DIM, 0), other=0).to(tl.float32)
            if SCALED:
                term = tl.load(scales + k + j, mask=live, other=0) * term
            total += term
    tl.store(out + bag * DIM + d, total, mask=d < DIM)


@triton.jit
def _gradient(
    k, last, bags, scales, grad, d, SCALED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr
):
    """Sum the gradients of lookups k to last in their order."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(k, last, AHEAD):
        for j in tl.static_range(AHEAD):
            # Past the end the terms are zeros, which change no sum.
            live = start + j < last
            bag = tl.load(bags + start + j, mask=live, other=0)
            term = tl.load(grad + bag * DIM + d, mask=d < tl.where(live, DIM, 0), other=0)
            if SCALED:
                term = tl.load(scales + start + j, mask=live, other=0) * term
            total += term
    return total


@triton.jit
def _mix(x):
    """SplitMix64's finaliser."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _narrow(values, d, name, dice, HALF: tl.constexpr):
    """Return float32 values as 16-bit floats, rounding up with the probability of the remainder."""
    start = _mix(dice.to(tl.uint64) ^ (name.to(tl.uint64) * 0x9E3779B97F4A7C15))
    random = _mix(start + d.to(tl.uint64)).to(tl.uint32)
    bits = values.to(tl.uint32, bitcast=True)
    if HALF:
        sign = (bits >> 16) & 0x8000
        # Times 2**-112 the exponent and mantissa of a half stand in the upper bits of the float's.
        small = tl.minimum(tl.abs(values), 65504.0) * 1.925929944387236e-34
        short = tl.minimum((small.to(tl.uint32, bitcast=True) + (random & 0x1FFF)) >> 13, 0x7BFF)
        narrow = (sign | short).to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        up = bits + (random & 0xFFFF)
        # What is infinite or NaN stays so, and nothing else is rounded up to it.
        huge = ((bits & 0x7F800000) == 0x7F800000) | ((up & 0x7F800000) == 0x7F800000)
        narrow = (tl.where(huge, bits, up) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return narrow


@triton.jit(do_not_specialize=["dice", "step"])
def _update(
    weight, wide1, wide2, narrow, stats, slots, ends, names, bags, scales, grad,
    rate, eps, rest1, rest2, decay, grad_scale, dice, step,
    KIND: tl.constexpr, SCALED: tl.constexpr, DECAY: tl.constexpr, STATS: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64)
    last = tl.load(ends + k)
    if last == 0:
        return
    d = tl.arange(0, BLOCK)
    inside = d < DIM
    slot = tl.load(slots + k)
    place = slot * DIM + d
    values = tl.load(weight + place, mask=inside, other=0).to(tl.float32)
    total = _gradient(k, last, bags, scales, grad, d, SCALED, DIM, BLOCK, AHEAD) * grad_scale
    if DECAY:
        total += decay * values
    if KIND == 0:
        values -= rate * total
    elif KIND == 1:
        state = tl.load(narrow + slot) + tl.math.div_rn(tl.sum(total * total, axis=0), DIM * 1.0)
        tl.store(narrow + slot, state)
        values -= tl.math.div_rn(rate, tl.math.sqrt_rn(state) + eps) * total
    elif KIND == 2:
        state = tl.load(wide1 + place, mask=inside, other=0) + total * total
        tl.store(wide1 + place, state, mask=inside)
        values -= rate * tl.math.div_rn(total, tl.math.sqrt_rn(state) + eps)
    else:
        moment1 = tl.load(wide1 + place, mask=inside, other=0)
        moment2 = tl.load(wide2 + place, mask=inside, other=0)
        moment1 += rest1 * (total - moment1)
        moment2 += rest2 * (total * total - moment2)
        tl.store(wide1 + place, moment1, mask=inside)
        tl.store(wide2 + place, moment2, mask=inside)
        values -= rate * tl.math.div_rn(moment1, tl.math.sqrt_rn(moment2) + eps)
    if STATS:
        tl.store(stats + slot * 2, tl.load(stats + slot * 2) + 1)
        tl.store(stats + slot * 2 + 1, step)
    if weight.dtype.element_ty == tl.float32:
        tl.store(weight + place, values, mask=inside)
    else:
        half: tl.constexpr = weight.dtype.element_ty == tl.float16
        tl.store(weight + place, _narrow(values, d, tl.load(names + k), dice, half), mask=inside)


@triton.jit
def _square(
    ends, bags, scales, grad, grad_scale, out,
    SCALED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64)
    last = tl.load(ends + k)
    d = tl.arange(0, BLOCK)
    total = _gradient(k, last, bags, scales, grad, d, SCALED, DIM, BLOCK, AHEAD) * grad_scale
    wide = total.to(tl.float64)
    tl.store(out + k, tl.sum(wide * wide, axis=0))


@triton.jit
def _scale_gradient(
    weight, slots, bags, grad, out, num,
    BAGS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)[None, :]
    slot = tl.load(slots + line, mask=line < num, other=0)[:, None]
    bag = (tl.load(bags + line, mask=line < num, other=0) if BAGS else line)[:, None]
    mask = (line < num)[:, None] & (d < DIM)
    values = tl.load(weight + slot * DIM + d, mask=mask, other=0).to(tl.float32)
    tl.store(out + line, tl.sum(values * tl.load(grad + bag * DIM + d, mask=mask, other=0), axis=1), mask=line < num)


def _shape(dim: int) -> dict[str, Any]:
    """Return the block that covers a row, and the warps that share it."""
    block = triton.next_power_of_2(dim)
    return {"DIM": dim, "BLOCK": block, "num_warps": min(8, max(1, block // 128)), "enable_fp_fusion": False}


def _tiled(dim: int) -> dict[str, Any]:
    shape = _shape(dim)
    return shape | {"ROWS": max(1, _TILE // shape["BLOCK"]), "num_warps": 4}


def _ends(in_order: Tensor) -> Tensor:
    """Return for the first lookup of each row where its lookups end, and 0 for the others."""
    ends = torch.searchsorted(in_order, in_order, right=True)
    ends[1:].masked_fill_(in_order[1:] == in_order[:-1], 0)
    return ends


def gather(weight: Tensor, slots: Tensor, out: Tensor) -> None:
    """Copy the row of each lookup to `out`, as float32."""
    shape = _tiled(weight.shape[1])
    if len(slots):
        with torch.cuda.device_of(slots):
            _gather[(triton.cdiv(len(slots), shape["ROWS"]),)](weight, slots, out, len(slots), **shape)


def pool(weight: Tensor, slots: Tensor, offsets: Tensor, scale_of: Tensor | None, out: Tensor) -> None:
    """Sum the rows of each bag, times their scales; an empty bag is zeros."""
    if len(out):
        with torch.cuda.device_of(slots):
            _pool[(len(out),)](
                weight, slots, offsets, out if scale_of is None else scale_of, out,
                SCALED=scale_of is not None, AHEAD=_AHEAD, **_shape(weight.shape[1]),
            )  # fmt: skip


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
    """Update every touched row once from the sum of its gradients; returns how many rows that were, on the device."""
    if not len(slots):
        return torch.zeros((), dtype=torch.int64, device=slots.device)
    in_order, bags, scales, names = in_row_order(slots, bag_of, scale_of, names)
    ends = _ends(in_order)
    none = [grad] * 2  # stands where the rule has no state
    wide1, wide2 = [*wide, *none][:2]
    rate, eps, rest1, rest2, decay = scalars(rates)
    dice %= 1 << 64
    with torch.cuda.device_of(slots):
        _update[(len(slots),)](
            weight, wide1, wide2, narrow[0] if narrow else grad, slots if stats is None else stats,
            in_order, ends, names, bags, grad if scales is None else scales, grad,
            rate, eps, rest1, rest2, decay, float(grad_scale), dice - (1 << 64) if dice >= 1 << 63 else dice, step,
            KIND=kind, SCALED=scales is not None, DECAY=decay != 0, STATS=stats is not None, AHEAD=_AHEAD,
            **_shape(weight.shape[1]),
        )  # fmt: skip
    return (ends > 0).sum()


def squared_norm(
    slots: Tensor, bag_of: Tensor | None, scale_of: Tensor | None, grad: Tensor, grad_scale: float = 1.0
) -> Tensor:
    """Return the square of the 2-norm of the summed gradients of all rows, float64."""
    in_order, bags, scales, _ = in_row_order(slots, bag_of, scale_of, None)
    out = torch.zeros(len(slots), dtype=torch.float64, device=slots.device)
    if len(slots):
        with torch.cuda.device_of(slots):
            _square[(len(slots),)](
                _ends(in_order), bags, grad if scales is None else scales, grad, float(grad_scale), out,
                SCALED=scales is not None, AHEAD=_AHEAD, **_shape(grad.shape[1]),
            )  # fmt: skip
    return out.sum()


def scale_gradients(
    weight: Tensor, slots: Tensor, bag_of: Tensor | None, divisor: Tensor | None, grad: Tensor
) -> Tensor:
    """Return the gradient of each lookup's scale: its row times its bag's gradient, over the divisor of the bag."""
    out = torch.empty(len(slots), device=slots.device)
    shape = _tiled(weight.shape[1])
    if len(slots):
        with torch.cuda.device_of(slots):
            _scale_gradient[(triton.cdiv(len(slots), shape["ROWS"]),)](
                weight, slots, slots if bag_of is None else bag_of, grad, out, len(slots),
                BAGS=bag_of is not None, **shape,
            )  # fmt: skip
    return out if divisor is None else out / divisor
