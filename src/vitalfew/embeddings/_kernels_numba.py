# mypy: disable-error-code="assignment"
# A variable of a kernel has one machine type, which numba infers; mypy sees the widest of several.

"""The row kernels: pool rows into bags, and update rows from the gradients of the bags.

A lookup is one (row, bag) couple, optionally with a scale. Lookups stand in sample order. The update partitions them
by a hash of the row, so that each row belongs to one bucket and one thread; a bucket finds its distinct rows by open
addressing, and sums the gradients of a row along a chain in sample order. So the bits do not depend on the number of
threads, no gradient is ever built per row or per table, and each row and its state are read and written once.

Every kernel here has a plain twin in `_kernels_reference`, to which the tests compare it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic, overload

F32, BF16, F16 = 0, 1, 2
NORM = -1
BUCKET = 2048
"""Lookups per bucket: its hash table and chains then stay in the first-level cache."""

_AHEAD = 8
_GOLD = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_EXPONENT = np.uint32(0x7F800000)
_TWO_112 = np.float32(2.0**112)
_TWO_M112 = np.float32(2.0**-112)
_MAX_F16 = np.float32(65504.0)


@intrinsic
def _prefetch(typing_context: Any, array: Any, row: Any) -> Any:
    """Ask the processor for the start of a row of a two-dimensional array; never faults."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        view = context.make_array(signature.args[0])(context, builder, args[0])
        stride = builder.extract_value(view.strides, 0)
        byte = ir.IntType(8).as_pointer()
        start = builder.bitcast(view.data, byte)
        place = builder.gep(start, [builder.mul(args[1], stride)])
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        call = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        builder.call(call, [place, word(1), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(array, row), code


@njit(inline="always")
def _mix(x: Any) -> Any:
    """SplitMix64's finaliser."""
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))


@njit(inline="always")
def _widen(row: Any, out: Any, storage: Any) -> None:
    """Read a row of 16-bit floats as float32."""
    bits = out.view(np.uint32)
    if storage == BF16:
        for d in range(len(out)):
            bits[d] = np.uint32(row[d]) << np.uint32(16)
    else:
        # A half's exponent and mantissa, shifted under a float's, are the value times 2**-112, subnormals included.
        for d in range(len(out)):
            bits[d] = (np.uint32(row[d]) & np.uint32(0x7FFF)) << np.uint32(13)
        for d in range(len(out)):
            value = out[d] * _TWO_112
            out[d] = -value if row[d] & 0x8000 else value


@njit(inline="always")
def _narrow(values: Any, row: Any, storage: Any, dice: Any) -> None:
    """Write float32 values as 16-bit floats, rounding up with the probability of the remainder."""
    bits = values.view(np.uint32)
    if storage == BF16:
        for d in range(len(row)):
            r = np.uint32(_mix(dice + np.uint64(d)) & np.uint64(0xFFFF))
            x = bits[d]
            up = x + r
            # What is infinite or NaN stays so, and nothing else is rounded up to it.
            huge = (x & _EXPONENT) == _EXPONENT or (up & _EXPONENT) == _EXPONENT
            row[d] = np.uint16((x if huge else up) >> np.uint32(16))
    else:
        for d in range(len(row)):
            r = np.uint32(_mix(dice + np.uint64(d)) & np.uint64(0x1FFF))
            sign = (bits[d] >> np.uint32(16)) & np.uint32(0x8000)
            values[d] = min(abs(values[d]), _MAX_F16) * _TWO_M112
            row[d] = np.uint16(sign | min((bits[d] + r) >> np.uint32(13), np.uint32(0x7BFF)))


def _open(weight: Any, row: Any, buffer: Any, storage: Any) -> Any:
    """Return the row as float32: the row itself, or a widened copy in the buffer."""


def _close(weight: Any, row: Any, buffer: Any, storage: Any, dice: Any, name: Any) -> None:
    """Put back what `_open` has copied."""


@overload(_open, inline="always")
def _open_for(weight: Any, row: Any, buffer: Any, storage: Any) -> Any:
    def plain(weight: Any, row: Any, buffer: Any, storage: Any) -> Any:
        return weight[row]

    def widened(weight: Any, row: Any, buffer: Any, storage: Any) -> Any:
        _widen(weight[row], buffer, storage)
        return buffer

    return plain if weight.dtype == types.float32 else widened


@overload(_close, inline="always")
def _close_for(weight: Any, row: Any, buffer: Any, storage: Any, dice: Any, name: Any) -> Any:
    def plain(weight: Any, row: Any, buffer: Any, storage: Any, dice: Any, name: Any) -> None:
        pass

    def narrowed(weight: Any, row: Any, buffer: Any, storage: Any, dice: Any, name: Any) -> None:
        _narrow(buffer, weight[row], storage, _mix(dice ^ (name * _GOLD)))

    return plain if weight.dtype == types.float32 else narrowed


@njit(parallel=True, nogil=True, cache=True)
def gather(weight: Any, storage: Any, ids: Any, base: Any, rows: Any, out: Any, row_of: Any, threads: Any) -> Any:
    """Copy one row per sample and feature: `pool` for the common case, without bags.

    `ids` has shape (samples, F), `out` (samples * F, dim). `row_of`, shape (F, samples), gets the rows by feature:
    where every feature has a table of its own that is the order the update wants. Returns as `pool` does.
    """
    samples, features = ids.shape
    dim = weight.shape[1]
    wrong = np.full(threads, -1, np.int64)
    for t in prange(threads):
        buffer = np.empty(dim, np.float32)
        for b in range(samples * t // threads, samples * (t + 1) // threads):
            for f in range(features):
                if b + 1 < samples and np.uint64(ids[b + 1, f]) < np.uint64(rows[f]):
                    _prefetch(weight, base[f] + ids[b + 1, f])
                if np.uint64(ids[b, f]) >= np.uint64(rows[f]):
                    if wrong[t] < 0:
                        wrong[t] = b * features + f
                    continue
                row = np.uint64(base[f] + ids[b, f])
                row_of[f, b] = np.int64(row)
                values = _open(weight, row, buffer, storage)
                target = out[np.uint64(b * features + f)]
                for d in range(dim):
                    target[d] = values[d]
    for t in range(threads):
        if wrong[t] >= 0:
            return wrong[t]
    return np.int64(-1)


@njit(parallel=True, nogil=True, cache=True)
def find(
    rows: Any, where: Any, bucket: Any, held: Any, last: Any, turn: Any, slots: Any, threads: Any
) -> Any:  # fmt: skip
    """Write the slot of each row, as the directory `where` tells; returns how many are not there for good.

    A row is there for good while its bucket says that it is held, and `last` that the batch of this turn or a later
    one holds it.
    """
    absent = np.zeros(threads, np.int64)
    n = len(rows)
    for t in prange(threads):
        for i in range(n * t // threads, n * (t + 1) // threads):
            slot = np.int64(where[rows[i]])
            slots[i] = slot
            if slot < 0 or bucket[slot] != held or last[slot] < turn:
                absent[t] += 1
    return absent.sum()


@njit(parallel=True, nogil=True, cache=True)
def pool(
    weight: Any, storage: Any, ids: Any, offsets: Any, scales: Any, mean: Any, base: Any, rows: Any,
    out: Any, row_of: Any, bag_of: Any, scale_of: Any, threads: Any,
) -> Any:  # fmt: skip
    """Sum (or average) the rows of every bag, and note for each lookup its row, bag and scale.

    Bag b belongs to feature ``b % F``; its rows start at ``base[f]`` and number ``rows[f]``. `offsets` is empty when
    every bag holds one id, `scales` when there are none; `bag_of` and `scale_of` are empty when they would say
    nothing. Returns the position of the first id out of range, or -1; then no output is valid.
    """
    num_bags, dim = out.shape
    features = len(base)
    jagged = len(offsets) > 0
    wrong = np.full(threads, -1, np.int64)
    for t in prange(threads):
        buffer = np.empty(dim, np.float32)
        for bag in range(num_bags * t // threads, num_bags * (t + 1) // threads):
            f = np.uint64(bag % features)
            first, last = (offsets[bag], offsets[bag + 1]) if jagged else (bag, bag + 1)
            total = out[np.uint64(bag)]
            size = np.float32(last - first) if mean[f] else np.float32(1)
            if last - first != 1:
                for d in range(dim):
                    total[d] = np.float32(0)
            for i in range(first, last):
                ahead = i + features
                if ahead < len(ids) and np.uint64(ids[ahead]) < np.uint64(rows[f]):
                    _prefetch(weight, base[f] + ids[ahead])
                if np.uint64(ids[i]) >= np.uint64(rows[f]):
                    if wrong[t] < 0:
                        wrong[t] = i
                    continue
                row = np.uint64(base[f] + ids[i])
                row_of[i] = np.int64(row)
                if len(bag_of):
                    bag_of[i] = bag
                values = _open(weight, row, buffer, storage)
                if len(scale_of):
                    scale = (scales[i] if len(scales) else np.float32(1)) / size
                    scale_of[i] = scale
                    if last - first == 1:
                        for d in range(dim):
                            total[d] = scale * values[d]
                    else:
                        for d in range(dim):
                            total[d] += scale * values[d]
                elif last - first == 1:
                    for d in range(dim):
                        total[d] = values[d]
                else:
                    for d in range(dim):
                        total[d] += values[d]
    for t in range(threads):
        if wrong[t] >= 0:
            return wrong[t]
    return np.int64(-1)


@njit(parallel=True, nogil=True, cache=True)
def partition(row_of: Any, order: Any, row_in_order: Any, starts: Any, threads: Any) -> Any:
    """Sort the lookups and their rows stably into buckets by a hash of the row.

    `starts` has one more entry than there are buckets, a power of two. Returns the size of the largest bucket.
    """
    n = len(row_of)
    buckets = len(starts) - 1
    mask = np.uint64(buckets - 1)
    places = np.zeros((threads, buckets), np.int64)
    for t in prange(threads):
        mine = places[t]
        for i in range(n * t // threads, n * (t + 1) // threads):
            mine[(_mix(np.uint64(row_of[i])) & mask)] += 1
    place = 0
    largest = 0
    for k in range(buckets):
        starts[k] = place
        for t in range(threads):
            size = places[t, k]
            places[t, k] = place
            place += size
        largest = max(largest, place - starts[k])
    starts[buckets] = place
    for t in prange(threads):
        mine = places[t]
        for i in range(n * t // threads, n * (t + 1) // threads):
            k = _mix(np.uint64(row_of[i])) & mask
            place = np.uint64(mine[k])
            order[place] = i
            row_in_order[place] = row_of[i]
            mine[k] += 1
    return largest


@njit(parallel=True, nogil=True, cache=True)
def update(
    kind: Any, weight: Any, storage: Any, wide1: Any, wide2: Any, narrow: Any, rates: Any, dice: Any,
    names: Any, dirty: Any, stats: Any, step: Any, frozen: Any, visits: Any,
    bag_of: Any, scale_of: Any, grad: Any, grad_scale: Any,
    order: Any, row_in_order: Any, starts: Any, following: Any,
    slots: Any, heads: Any, tails: Any, rows: Any, where: Any, squares: Any,
    threads: Any,
) -> Any:  # fmt: skip
    """Update every touched row once from the sum of its gradients; returns how many that were, and how many frozen.

    `rates` holds rate, eps, beta1, beta2 and weight decay. The kind `NORM` writes no row: it leaves the sum of squares
    of each bucket's summed gradients in `squares`. With an empty `order` bucket b is feature b of
    ``len(starts) - 1``, as `gather` leaves the rows. Where rows move between slots, `names` tells the id of the row in
    each, `dirty` is set to 1, and `stats` counts the updates of a row and notes the last step; else all are empty.
    By the id of a row, `frozen` says which rows to leave alone, and `visits` counts updates: one column each, maybe
    without rows.
    Scratch: `order`, `row_in_order` and `following` are as long as
    the lookups, `slots` (all zero, before and after), `heads`, `tails`, `rows` and `where` have a line per thread.
    """
    dim = weight.shape[1]
    buckets = len(starts) - 1
    rate, eps, beta1, beta2, decay = rates[0], rates[1], rates[2], rates[3], rates[4]
    one = np.float32(1)
    touched = np.zeros(threads, np.int64)
    left_out = np.zeros(threads, np.int64)
    for t in prange(threads):
        slot, head, tail, line, home = slots[t], heads[t], tails[t], rows[t], where[t]
        total = np.empty(dim, np.float32)
        buffer = np.empty(dim, np.float32)
        for bucket in range(buckets * t // threads, buckets * (t + 1) // threads):
            first, last = starts[bucket], starts[bucket + 1]
            capacity = np.uint64(2)
            while capacity < np.uint64(2 * (last - first)):
                capacity *= np.uint64(2)
            mask = capacity - np.uint64(1)
            count = 0
            for k in range(first, last):
                row = row_in_order[k]
                if len(frozen) and k + _AHEAD < last:
                    ahead = row_in_order[k + _AHEAD]
                    _prefetch(frozen, np.int64(names[ahead]) if len(names) else ahead)
                h = (_mix(np.uint64(row)) >> np.uint64(32)) & mask
                while slot[h] > 0 and line[slot[h] - 1] != row:
                    h = (h + np.uint64(1)) & mask
                following[k] = -1
                if slot[h] == 0:
                    head[count] = k
                    tail[count] = k
                    line[count] = row
                    home[count] = h
                    if len(frozen) and frozen[np.uint64(names[row]) if len(names) else np.uint64(row), 0]:
                        head[count] = -1
                        left_out[t] += 1
                    count += 1
                    slot[h] = count
                else:
                    u = slot[h] - 1
                    following[tail[u]] = k
                    tail[u] = k
            touched[t] += count
            square = 0.0
            for u in range(count):
                if u + _AHEAD < count and head[u + _AHEAD] >= 0:
                    ahead = line[u + _AHEAD]
                    _prefetch(weight, ahead)
                    if kind == 1:
                        _prefetch(narrow, ahead)
                    elif kind >= 2:
                        _prefetch(wide1, ahead)
                        if kind == 3:
                            _prefetch(wide2, ahead)
                    if len(visits):
                        _prefetch(visits, np.int64(names[ahead]) if len(names) else ahead)
                    k = np.int64(head[u + _AHEAD])
                    i = np.int64(order[k]) if len(order) else (k - first) * buckets + bucket
                    _prefetch(grad, np.int64(bag_of[i]) if len(bag_of) else i)
                slot[home[u]] = 0
                k = np.int64(head[u])
                if k < 0:
                    continue
                for d in range(dim):
                    total[d] = np.float32(0)
                while k >= 0:
                    i = np.uint64(order[k] if len(order) else (k - first) * buckets + bucket)
                    source = grad[np.uint64(bag_of[i]) if len(bag_of) else i]
                    if len(scale_of):
                        for d in range(dim):
                            total[d] += scale_of[i] * source[d]
                    else:
                        for d in range(dim):
                            total[d] += source[d]
                    k = np.int64(following[k])
                if grad_scale != one:
                    for d in range(dim):
                        total[d] *= grad_scale
                if kind == NORM:
                    for d in range(dim):
                        square += np.float64(total[d]) * np.float64(total[d])
                    continue
                row = np.uint64(line[u])
                values = _open(weight, row, buffer, storage)
                if decay != np.float32(0):
                    for d in range(dim):
                        total[d] += decay * values[d]
                if kind == 0:
                    for d in range(dim):
                        values[d] -= rate * total[d]
                elif kind == 1:
                    mean = np.float32(0)
                    for d in range(dim):
                        mean += total[d] * total[d]
                    state = narrow[row, 0] + mean / np.float32(dim)
                    narrow[row, 0] = state
                    factor = rate / (np.sqrt(state) + eps)
                    for d in range(dim):
                        values[d] -= factor * total[d]
                elif kind == 2:
                    sums = wide1[row]
                    for d in range(dim):
                        state = sums[d] + total[d] * total[d]
                        sums[d] = state
                        values[d] -= rate * (total[d] / (np.sqrt(state) + eps))
                else:
                    moment1 = wide1[row]
                    moment2 = wide2[row]
                    for d in range(dim):
                        m = moment1[d] + (one - beta1) * (total[d] - moment1[d])
                        v = moment2[d] + (one - beta2) * (total[d] * total[d] - moment2[d])
                        moment1[d] = m
                        moment2[d] = v
                        values[d] -= rate * (m / (np.sqrt(v) + eps))
                name = np.uint64(names[row]) if len(names) else row
                _close(weight, row, buffer, storage, dice, name)
                if len(visits):
                    visits[name, 0] += np.uint32(1)
                if len(dirty):
                    dirty[row] = 1
                    stats[row, 0] += np.uint32(1)
                    stats[row, 1] = step
            squares[bucket] = square
    return touched.sum() - left_out.sum(), left_out.sum()


@njit(parallel=True, nogil=True, cache=True)
def scale_gradients(
    weight: Any, storage: Any, row_of: Any, bag_of: Any, divisor: Any, grad: Any, out: Any, threads: Any
) -> None:
    """Give each lookup's scale its gradient: its row times its bag's gradient, over the divisor of the bag."""
    dim = weight.shape[1]
    n = len(row_of)
    for t in prange(threads):
        buffer = np.empty(dim, np.float32)
        for i in range(n * t // threads, n * (t + 1) // threads):
            bag = np.uint64(bag_of[i] if len(bag_of) else i)
            values = _open(weight, np.uint64(row_of[i]), buffer, storage)
            total = np.float32(0)
            for d in range(dim):
                total += values[d] * grad[bag, d]
            out[i] = total / divisor[i]
