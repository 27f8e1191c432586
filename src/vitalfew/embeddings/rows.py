"""The rows of many tables in one slab, with their optimizer state, and the one update they get per backward pass."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitalfew.core import InputError
from vitalfew.embeddings.optim import Optimizer

__all__ = ["Counts", "Layout", "Rows", "step_together"]

_STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KERNELS = threading.Lock()
"""One kernel at a time: some threading layers of numba end the process when two threads enter them at once."""

_NONE_U8 = np.empty(0, np.uint8)
_NONE_I32 = np.empty(0, np.int32)
_NONE_I64 = np.empty(0, np.int64)
_NONE_F32 = np.empty(0, np.float32)


def _slab(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return zeros whose memory numpy has asked huge pages for, and that is there before the first step needs it."""
    bits = np.empty((rows, width), np.float32 if dtype == torch.float32 else np.int16)
    bits.fill(0)
    return torch.from_numpy(bits) if dtype == torch.float32 else torch.from_numpy(bits).view(dtype)


def array_of(tensor: Tensor) -> NDArray[Any]:
    """View a tensor as numpy, 16-bit floats as their bits."""
    if tensor.dtype == torch.float32:
        return tensor.detach().numpy()
    return tensor.detach().view(torch.int16).numpy().view(np.uint16)


@dataclass(frozen=True, slots=True)
class Layout:
    """Which part of the slab each feature looks rows up in; one entry per feature."""

    features: tuple[str, ...]
    base: NDArray[np.int64]
    num_rows: NDArray[np.int64]
    mean: NDArray[np.bool_]

    @property
    def shared(self) -> bool:
        """Whether two features look rows up in the same place."""
        return len(np.unique(self.base)) < len(self.base)


@dataclass(slots=True)
class Counts:
    """What the rows have been through, counted in the kernels."""

    lookups: int = 0
    """Ids looked up, with repeats."""
    rows_updated: int = 0
    """Rows written, each once per step."""
    steps: int = 0
    rows_frozen: int = 0
    """Rows looked up for training and left as they are, each once per step."""


def _no_samples() -> NDArray[np.int64]:
    return _NONE_I64


@dataclass(slots=True, eq=False, weakref_slot=True)
class Lookups:
    """One forward's lookups: row and, where they say something, bag and scale of each.

    With `features` the rows stand feature by feature, and the lookup of sample b and feature f is bag
    ``b * features + f``; with 0 they stand in sample order. `serial` counts the forwards. Where a batch comes in parts,
    `samples` numbers those of this part in the batch, and the forwards of all parts have the same serials.
    """

    row_of: NDArray[np.int64]
    bag_of: NDArray[np.int32]
    scale_of: NDArray[np.float32]
    features: int = 0
    serial: int = 0
    samples: NDArray[np.int64] = field(default_factory=_no_samples)

    def in_sample_order(self) -> NDArray[np.int64]:
        if not self.features:
            return self.row_of
        return np.ascontiguousarray(self.row_of.reshape(self.features, -1).T).reshape(-1)


@dataclass(slots=True)
class _Scratch:
    """Arrays the update works in, grown as needed and never copied with the model."""

    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)

    def get(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        have = self.arrays.get(name)
        if have is None or any(a < b for a, b in zip(have.shape, shape, strict=True)):
            have = self.arrays[name] = np.zeros(tuple(b + b // 4 for b in shape), dtype)
        return have[: shape[0]] if len(shape) == 1 else have


@dataclass(slots=True)
class _Waiting:
    """Gradients of bags that no row has received yet, and a factor on all of them."""

    parts: list[tuple[Lookups, Tensor]] = field(default_factory=list)
    scale: float = 1.0

    def add(self, lookups: Lookups, grad: Tensor) -> None:
        if self.scale != 1:  # of the parts so far alone
            self.parts = [(earlier, g * self.scale) for earlier, g in self.parts]
            self.scale = 1.0
        self.parts.append((lookups, grad))

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(g.sum())) or bool(torch.isfinite(g).all()) for _, g in self.parts)

    def merged(self) -> tuple[Lookups, Tensor]:
        """Return all parts as one, in the order of their forwards."""
        if len(self.parts) == 1:
            return self.parts[0]
        parts = sorted(self.parts, key=lambda part: part[0].serial)
        bag_of, scale_of, start = [], [], 0
        any_scale = any(len(lookups.scale_of) for lookups, _ in parts)
        for lookups, grad in parts:
            n = len(lookups.row_of)
            mine = lookups.bag_of if len(lookups.bag_of) else np.arange(n, dtype=np.int32)
            bag_of.append(mine + np.int32(start))
            if any_scale:
                scale_of.append(lookups.scale_of if len(lookups.scale_of) else np.ones(n, np.float32))
            start += len(grad)
        merged = Lookups(
            np.concatenate([lookups.in_sample_order() for lookups, _ in parts]),
            np.concatenate(bag_of),
            np.concatenate(scale_of) if any_scale else _NONE_F32,
        )
        if any(len(lookups.samples) for lookups, _ in parts):
            order = _order_of_samples(parts, merged.bag_of)
            merged.row_of, merged.bag_of = merged.row_of[order], merged.bag_of[order]
            if any_scale:
                merged.scale_of = merged.scale_of[order]
        return merged, torch.cat([grad for _, grad in parts])


def _order_of_samples(parts: list[tuple[Lookups, Tensor]], bag_of: NDArray[np.int32]) -> NDArray[np.intp]:
    """Return the order in which lookups would stand if the parts of each batch had been looked up as one."""
    stride = 1 + max(int(lookups.samples.max(initial=0)) for lookups, _ in parts)
    keys = []  # of all bags, in which the samples of a forward stand in order
    for lookups, grad in parts:
        samples = lookups.samples if len(lookups.samples) else np.zeros(1, np.int64)
        keys.append(lookups.serial * stride + np.repeat(samples, len(grad) // len(samples)))
    return np.argsort(np.concatenate(keys)[bag_of], kind="stable")


class _Pass(dict["Rows", _Waiting]):
    """What one backward pass has for the rows. Its callback alone holds it: a pass that breaks off takes it along."""

    def end(self) -> None:
        _update(self)


_PASSES: WeakValueDictionary[int, _Pass] = WeakValueDictionary()


def _update(waiting: Mapping[Rows, _Waiting]) -> None:
    """Update the rows of all slabs, or of none if a gradient is NaN or infinite."""
    if not all(rows._is_finite(each) for rows, each in waiting.items()):
        raise InputError(
            "a gradient is NaN or infinite; no row was changed",
            hint="lower the learning rate, or look for NaN in the dense input and the loss",
        )
    for rows, each in waiting.items():
        if each.parts:
            rows.counts.steps += 1
            rows.counts.rows_updated += int(rows._run(each))
    for rows, each in waiting.items():
        if each.parts and rows.on_update is not None:
            rows.on_update()


def step_together(*slabs: Rows) -> None:
    """Let several slabs step, or none of them if a gradient is NaN or infinite; what waited is gone either way."""
    waiting = {rows: rows._waiting for rows in slabs}
    for rows in slabs:
        rows.zero_grad()
    _update(waiting)


class Rows:
    """A slab of rows and their state, updated in place; no gradient is ever built for it.

    Parameters
    ----------
    num_rows, dim
        Shape of the slab.
    optimizer
        The update rule.
    dtype
        Storage of the weights: float32, or bfloat16 or float16 with stochastic rounding. State is always float32.
    update
        ``"backward"``: rows change at the end of each backward pass. ``"step"``: gradients gather until `step`.
    seed
        Of the stochastic rounding.
    """

    def __init__(
        self,
        num_rows: int,
        dim: int,
        optimizer: Optimizer,
        *,
        dtype: torch.dtype = torch.float32,
        update: Literal["backward", "step"] = "backward",
        seed: int = 0,
    ) -> None:
        if dtype not in _STORAGE:
            raise InputError(f"rows cannot be stored as {dtype}", hint="use float32, bfloat16 or float16")
        if update not in ("backward", "step"):
            raise InputError(f"update must be 'backward' or 'step', got {update!r}", hint="'backward' is the fast one")
        if num_rows < 1 or dim < 1:
            raise InputError(f"a slab needs rows and columns, got {num_rows} x {dim}", hint="pass positive sizes")
        self.optimizer = optimizer
        self.update = update
        self.seed = seed
        self.trainable = True
        self.counts = Counts()
        self.weight = _slab(num_rows, dim, dtype)
        self.wide = [_slab(num_rows, dim, torch.float32) for _ in range(optimizer.wide_states)]
        self.narrow = [_slab(num_rows, 1, torch.float32) for _ in range(optimizer.row_states)]
        self._names, self._dirty = _NONE_I32, np.empty(0, np.uint8)
        self._stats = np.empty((0, 2), np.uint32)
        self.frozen = _NONE_U8
        """1 for rows, by their number over all tables, that no update changes; empty where there are none."""
        self.visits = np.empty(0, np.uint32)
        """Updates of each row, by its number over all tables; empty where nobody wants to know."""
        self.on_update: Callable[[], None] | None = None
        """Called after each update of these rows."""
        self._forwards = 0
        self._waiting = _Waiting()
        self._scratch = _Scratch()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of a copy what waits, as a copied parameter leaves out its gradient, and who looks on."""
        alone = {"frozen": _NONE_U8, "visits": np.empty(0, np.uint32), "on_update": None}
        return self.__dict__ | alone | {"_waiting": _Waiting(), "_scratch": _Scratch()}

    @property
    def nbytes(self) -> int:
        """Bytes of weights and state."""
        return sum(t.numel() * t.element_size() for t in [self.weight, *self.wide, *self.narrow])

    @property
    def state(self) -> dict[str, Tensor]:
        """The optimizer state by name, each with one line per row."""
        named = {f"wide{i}": t for i, t in enumerate(self.wide)}
        return named | {f"narrow{i}": t for i, t in enumerate(self.narrow)}

    def bags(self, layout: Layout, ids: Tensor, offsets: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
        """Return the pooled bags, float32, shape (bags, dim); bag b belongs to feature ``b % F``."""
        train = self.trainable and torch.is_grad_enabled()
        if train:
            self._check_workers()
        return _Bags.apply(  # type: ignore[no-any-return,no-untyped-call]
            torch.ones((), device="cpu", requires_grad=train), scales, self, layout, ids, offsets
        )

    def _check_workers(self) -> None:
        """Refuse to train where other processes would not see it."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            world = torch.distributed.get_world_size()
            if world > 1:
                raise InputError(
                    f"these rows are updated in place and {world} processes would each change their own copy",
                    hint="train in one process, use ShardedEmbeddings, or freeze the rows with trainable = False",
                )

    def _pool(
        self, layout: Layout, ids: Tensor, offsets: Tensor | None, scales: Tensor | None
    ) -> tuple[Tensor, Lookups]:
        flat = as_integers(ids, "ids").reshape(-1)
        edges = _NONE_I64 if offsets is None else as_offsets(offsets, len(flat))
        weights = _NONE_F32 if scales is None else _as_weights(scales, len(flat))
        num_bags = len(flat) if offsets is None else len(edges) - 1
        features = len(layout.features)
        if num_bags % features:
            raise InputError(
                f"{num_bags} bags do not divide among {features} features", hint="bag = sample * features + feature"
            )
        out, seen = self._look_up(layout, flat, edges, weights, num_bags)
        self.counts.lookups += len(flat)
        self._forwards += 1
        seen.serial = self._forwards
        self._seen(seen)
        return out, seen

    def _look_up(
        self,
        layout: Layout,
        flat: NDArray[np.int64],
        edges: NDArray[np.int64],
        weights: NDArray[np.float32],
        num_bags: int,
    ) -> tuple[Tensor, Lookups]:
        """Pool the rows of ids; `edges` and `weights` are empty where there are no bags, or no weights."""
        from vitalfew.embeddings import _kernels_numba as kernels

        features, jagged = len(layout.features), len(edges) > 0
        slab, flat, base, num_rows = self._locate(layout, flat, edges)
        n, dim = len(flat), slab.shape[1]
        out = np.empty((num_bags, dim), np.float32)
        weight, storage, threads = array_of(slab), _STORAGE[slab.dtype], num_threads()
        if not jagged and not len(weights) and not layout.shared:
            seen = Lookups(np.empty(n, np.int64), _NONE_I32, _NONE_F32, features)
            row_of = seen.row_of.reshape(features, -1)
            table = flat.reshape(-1, features)
            with KERNELS:
                wrong = kernels.gather(weight, storage, table, base, num_rows, out, row_of, threads)
        else:
            scaled = len(weights) > 0 or (jagged and bool(layout.mean.any()))
            seen = Lookups(
                np.empty(n, np.int64),
                np.empty(n, np.int32) if jagged else _NONE_I32,
                np.empty(n, np.float32) if scaled else _NONE_F32,
            )
            with KERNELS:
                wrong = kernels.pool(
                    weight, storage, flat, edges, weights, layout.mean, base, num_rows,
                    out, seen.row_of, seen.bag_of, seen.scale_of, threads,
                )  # fmt: skip
        if wrong >= 0:
            self.refuse(layout, flat, edges, wrong)
        return torch.from_numpy(out), seen

    def _locate(
        self, layout: Layout, ids: NDArray[np.int64], edges: NDArray[np.int64]
    ) -> tuple[Tensor, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the slab, the ids, and the part of the slab each feature takes them from."""
        del edges
        return self.weight, ids, layout.base, layout.num_rows

    def _seen(self, lookups: Lookups) -> None:
        """Take note of a forward whose gradient may come."""

    @staticmethod
    def refuse(layout: Layout, ids: NDArray[np.int64], edges: NDArray[np.int64], wrong: int) -> NoReturn:
        """Say which id lies outside its table."""
        bag = int(np.searchsorted(edges, wrong, side="right")) - 1 if len(edges) else wrong
        f = bag % len(layout.features)
        raise InputError(
            f"id {ids[wrong]} of feature `{layout.features[f]}` in sample {bag // len(layout.features)} "
            f"lies outside [0, {layout.num_rows[f]})",
            hint="encode the ids with the vocabulary the table was made for",
        )

    def _receive(self, lookups: Lookups, grad: Tensor) -> None:
        """Take a bag gradient; in backward mode for the end of the whole pass."""
        if self.update == "step":
            self._waiting.add(lookups, grad)
            return
        number = torch._C._current_graph_task_id()
        running = _PASSES.get(number)
        if running is None:
            running = _PASSES[number] = _Pass()
            torch.autograd.Variable._execution_engine.queue_callback(running.end)
        running.setdefault(self, _Waiting()).add(lookups, grad)

    @property
    def pending(self) -> int:
        """How many gradients wait for `step`."""
        return len(self._waiting.parts)

    def zero_grad(self) -> None:
        """Drop what waits."""
        self._waiting = _Waiting()

    def check_settled(self, otherwise: str) -> None:
        """Refuse to go on while gradients wait."""
        if self.pending:
            raise InputError(f"gradients wait for a step, {otherwise}", hint="call step() first, or zero_grad()")

    def end_turn(self, otherwise: str) -> None:
        """Make sure that all rows may change at once."""
        self.check_settled(otherwise)

    def scale_grad(self, factor: float) -> None:
        """Multiply what waits, such as by the clipping factor or by one over the loss scale."""
        if not math.isfinite(factor):
            raise InputError(f"gradients cannot be multiplied by {factor}", hint="check grad_is_finite() first")
        self._waiting.scale *= factor

    def grad_norm(self) -> float:
        """Return the 2-norm of the row gradients that wait, summed per row as a dense gradient would be."""
        if self.update == "backward":
            raise InputError("with update='backward' the rows have changed already", hint="use update='step'")
        return float(np.sqrt(self._run(self._waiting, norm=True))) if self.pending else 0.0

    def grad_is_finite(self) -> bool:
        """Say whether nothing that waits is NaN or infinite."""
        return self._waiting.is_finite()

    def _is_finite(self, waiting: _Waiting) -> bool:
        """Say whether an update may go on."""
        return waiting.is_finite()

    def counted(self) -> Counts:
        """Return what the rows have been through until now."""
        return self.counts

    def step(self) -> None:
        """Update every touched row once from all that waits.

        Raises
        ------
        InputError
            If a gradient is NaN or infinite; no row has changed then, and what waited is dropped.
        """
        step_together(self)

    def _run(self, waiting: _Waiting, *, norm: bool = False) -> float:
        from vitalfew.embeddings import _kernels_numba as kernels

        lookups, grad = waiting.merged()
        n, threads, get = len(lookups.row_of), num_threads(), self._scratch.get
        if n >= 2**31:
            raise InputError(f"{n} lookups wait for one update, it can take 2**31 - 1", hint="step more often")
        following = get("following", (n,), np.int32)
        # The norm is summed by bucket, which must not depend on the number of threads.
        if not norm and (lookups.features >= 2 * threads or lookups.features == threads == 1):
            order, rows = _NONE_I32, lookups.row_of
            largest = n // lookups.features
            starts = np.arange(lookups.features + 1) * largest
        else:
            order, rows = get("order", (n,), np.int32), get("row_in_order", (n,), np.int64)
            starts = np.empty((1 << (n // kernels.BUCKET).bit_length()) + 1, np.int64)
            with KERNELS:
                named = self._named(lookups.in_sample_order()) if norm else lookups.in_sample_order()
                largest = int(kernels.partition(named, order, rows, starts, threads))
        rate, eps, beta1, beta2 = self.optimizer.scalars(max(self.counts.steps, 1))
        none = np.empty((0, 0), np.float32)
        wide = [*map(array_of, self.wide), none, none]
        squares = np.zeros(len(starts) - 1)
        dice = np.uint64((self.seed * 0x9E3779B97F4A7C15 + self.counts.steps * 0xD1342543DE82EF95) % 2**64)
        with KERNELS:
            touched, left_out = kernels.update(
                kernels.NORM if norm else self.optimizer.kind,
                array_of(self.weight), _STORAGE[self.weight.dtype], wide[0], wide[1],
                array_of(self.narrow[0]) if self.narrow else none,
                np.array([rate, eps, beta1, beta2, self.optimizer.weight_decay], np.float32), dice,
                _NONE_I32 if norm else self._names, self._dirty, self._stats, np.uint32(self.counts.steps),
                self.frozen[:, None], self.visits[:, None],
                lookups.bag_of, lookups.scale_of, grad.numpy(), np.float32(waiting.scale),
                order, rows, starts, following,
                get("slots", (threads, 2 << largest.bit_length()), np.int32),
                get("heads", (threads, largest), np.int32), get("tails", (threads, largest), np.int32),
                get("rows", (threads, largest), np.int64), get("where", (threads, largest), np.uint64),
                squares, threads,
            )  # fmt: skip
        if norm:  # of rows by their ids
            return float(squares.sum())
        self.counts.rows_frozen += int(left_out)
        return float(touched)

    def _named(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the ids of rows of the slab: sums over rows must not depend on where a row lies."""
        return self._names[rows].astype(np.int64) if len(self._names) else rows

    def _scale_gradients(self, lookups: Lookups, layout: Layout, scales: Tensor, grad: Tensor) -> Tensor:
        from vitalfew.embeddings import _kernels_numba as kernels

        divisor = self.divisor_of(lookups, layout)
        out = np.empty(len(divisor), np.float32)
        with KERNELS:
            kernels.scale_gradients(
                array_of(self.weight), _STORAGE[self.weight.dtype], lookups.in_sample_order(), lookups.bag_of,
                divisor, grad.numpy(), out, num_threads(),
            )  # fmt: skip
        return torch.from_numpy(out).reshape(scales.shape).to(scales.dtype)

    @staticmethod
    def divisor_of(lookups: Lookups, layout: Layout) -> NDArray[np.float32]:
        """Return for each lookup the size of its bag where bags are averaged, else 1."""
        divisor = np.ones(len(lookups.row_of), np.float32)
        if len(lookups.bag_of):
            mean = layout.mean[lookups.bag_of % len(layout.features)]
            np.copyto(divisor, np.bincount(lookups.bag_of)[lookups.bag_of], where=mean, casting="unsafe")
        return divisor


class _Bags(torch.autograd.Function):
    """Pool forward; hand the gradient of the bags to the rows backward."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, scales: Tensor | None, rows: Rows, layout: Layout, ids: Tensor, offsets: Tensor | None
    ) -> Tensor:
        out, ctx.lookups = rows._pool(layout, ids, offsets, scales)
        ctx.rows, ctx.layout, ctx.scales, ctx.step = rows, layout, scales, rows.counts.steps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.lookups is None:
            raise InputError(
                "backward ran twice through the same lookups, which would update their rows twice",
                hint="run the forward again, or add the losses and call backward once",
            )
        rows: Rows = ctx.rows
        lookups, ctx.lookups = ctx.lookups, None
        grad = grad.detach().float().contiguous()
        to_scales = None
        if ctx.needs_input_grad[1]:
            if rows.counts.steps != ctx.step:
                raise InputError(
                    "the rows have changed since this forward, the gradient of its weights would be wrong",
                    hint="call backward before the next update",
                )
            to_scales = rows._scale_gradients(lookups, ctx.layout, ctx.scales, grad)
        # Not when torch.autograd.grad asks for other gradients only.
        if ctx.needs_input_grad[0] and torch._C._will_engine_execute_node(ctx.next_functions[0][0]):
            rows._receive(lookups, grad)
        return None, to_scales, None, None, None, None


def num_threads() -> int:
    import numba

    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if numba.get_num_threads() != threads:
        numba.set_num_threads(threads)
    return int(threads)


def as_integers(tensor: Tensor, name: str) -> NDArray[np.int64]:
    _refuse_device(tensor, name)
    if tensor.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"{name} must be integers (int64 or int32), got {tensor.dtype}", hint=f"encode them, or {name}.long()"
        )
    return np.ascontiguousarray(tensor.detach().numpy(), dtype=np.int64)


def as_offsets(offsets: Tensor, num_ids: int) -> NDArray[np.int64]:
    """Return offsets as numpy if they divide that many ids into bags, or say what is wrong with them."""
    edges = as_integers(offsets, "offsets").reshape(-1)
    if len(edges) < 1 or edges[0] != 0 or edges[-1] != num_ids or bool((np.diff(edges) < 0).any()):
        raise InputError(
            f"offsets must rise from 0 to the number of ids, {num_ids}, "
            f"got {edges[:3].tolist()} ... {edges[-1:].tolist()}",
            hint="one entry per bag and the end",
        )
    return edges


def _as_weights(weights: Tensor, num_ids: int) -> NDArray[np.float32]:
    _refuse_device(weights, "weights")
    flat = np.ascontiguousarray(weights.detach().float().reshape(-1).numpy())
    if len(flat) != num_ids:
        raise InputError(f"{num_ids} ids came with {len(flat)} weights", hint="pass one weight per id")
    if not np.isfinite(flat).all():
        wrong = int(np.isfinite(flat).argmin())
        raise InputError(f"weight {wrong} is {flat[wrong]}", hint="clean the input")
    return flat


def _refuse_device(tensor: Tensor, name: str) -> None:
    if tensor.device.type != "cpu":
        raise InputError(
            f"the {name} lie on {tensor.device}", hint=f"these rows live in main memory: pass {name}.cpu()"
        )
