"""Rows whose slab lies in the memory of a GPU: found by the host, looked up and updated by the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitalfew.core import InputError
from vitalfew.embeddings._device import DeviceRows
from vitalfew.embeddings.first import FirstRows
from vitalfew.embeddings.optim import Optimizer
from vitalfew.embeddings.rows import Counts, Layout, Lookups, _Waiting
from vitalfew.embeddings.tiered_rows import TieredRows
from vitalfew.tiers.hbm import HbmSlab
from vitalfew.tiers.lower import Bytes
from vitalfew.tiers.record import Record

__all__ = ["DeviceTieredRows"]

_NO_BAGS = np.empty(0, np.int32)
_NO_SCALES = np.empty(0, np.float32)


class _Line:
    """The one stream in which a device works on a slab, whatever thread asks, and on whatever stream that thread is.

    The order in which it is asked is thus the order in which rows come, are read, changed and leave.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def _other(self) -> torch.cuda.Stream | None:
        """Return the current stream, unless it is this one."""
        if self._stream is None:
            return None
        current = torch.cuda.current_stream(self._stream.device)
        return None if current == self._stream else current

    @contextmanager
    def __call__(self) -> Iterator[None]:
        other = self._other()
        if other is None or self._stream is None:
            yield
            return
        self._stream.wait_stream(other)
        with torch.cuda.stream(self._stream):
            yield
        other.wait_stream(self._stream)

    def hand_in(self, tensor: Tensor) -> None:
        """Wait for what the current stream has made, and keep its memory until it has been read here."""
        other = self._other()
        if other is not None and self._stream is not None:
            self._stream.wait_stream(other)
            tensor.record_stream(self._stream)

    def hand_out(self, tensor: Tensor) -> None:
        """Keep memory of this stream until the current one has read it."""
        other = self._other()
        if other is not None:
            tensor.record_stream(other)

    def wait(self) -> None:
        """Wait for the device."""
        if self._stream is not None:
            self._stream.synchronize()


class _SlabRecord(Record):
    """The records of a slab that lies on a device."""

    def __init__(self, slab: HbmSlab, line: _Line) -> None:
        super().__init__([])
        self.nbytes = slab.row_bytes
        self._slab, self._line = slab, line

    def take(self, slots: NDArray[np.int32], records: Bytes) -> None:
        with self._line():
            self._slab.take(slots, records)

    def put(self, slots: NDArray[np.int32], records: Bytes) -> None:
        with self._line():
            self._slab.put(slots, records)

    def clear(self, slots: NDArray[np.int32]) -> None:
        self.put(slots, np.zeros((len(slots), self.nbytes), np.uint8))


class DeviceTieredRows(TieredRows):
    """As `TieredRows`, with the slab on a device: bags come out there, and their gradients are wanted there.

    Ids are looked up by the host, so they are best given in main memory; for those that lie on the device the host
    waits. A forward without gradients pools in main memory and sends the bags. Nothing else waits for the device but
    the norm of the gradients, and an update while visits are counted.

    Parameters
    ----------
    slab
        Its columns are those of `DeviceRows.columns`. Its last slot holds no row: there goes the update by a gradient
        that is NaN or infinite, of which the host hears when the device is done with it.

    Raises
    ------
    InputError
        For such a gradient. No row has changed by it; but on a GPU it may come with a later step.
    """

    def __init__(
        self,
        slab: HbmSlab,
        optimizer: Optimizer,
        *,
        update: Literal["backward", "step"] = "backward",
        seed: int = 0,
        first: FirstRows,
    ) -> None:
        dim, dtype = slab.columns[0].shape[1], slab.columns[0].dtype
        # Of one row: what follows takes the place of its arrays.
        super().__init__(1, dim, optimizer, dtype=dtype, update=update, seed=seed, first=first)
        self.slab = slab
        self._chunk = self.buffer = slab.pinned(slab.staging_rows)
        self._line = _Line(slab.device)
        self._device = DeviceRows(slab, optimizer)
        self.weight, self.wide, self.narrow = self._device.weight, self._device.wide, self._device.narrow
        self._stats = np.empty((0, 2), np.uint32)
        self._touched = torch.zeros((), dtype=torch.int64, device=slab.device)
        self._wrong = torch.zeros((), dtype=torch.bool, device=slab.device)
        self._told = torch.zeros((), dtype=torch.bool, device="cpu", pin_memory=slab.device.type == "cuda")

    def record(self) -> Record:
        return _SlabRecord(self.slab, self._line)

    def begin(self, rows: NDArray[np.int64], slots: NDArray[np.int32]) -> None:
        size = len(self._chunk)
        for start in range(0, len(rows), size):
            some = self.first(rows[start : start + size])
            records = self._chunk[: len(some["weight"])]
            host = Record([_bits(column) for column in some.values()])
            host.take(np.arange(len(records), dtype=np.int32), records)
            self.store.record.put(slots[start : start + size], records)

    def counted(self) -> Counts:
        with self._line():
            self.counts.rows_updated += int(self._touched)
            self._touched.zero_()
        self._hear()
        return self.counts

    # -- forward

    def _pool(
        self, layout: Layout, ids: Tensor, offsets: Tensor | None, scales: Tensor | None
    ) -> tuple[Tensor, Lookups]:
        self._hear()
        offsets, scales = (None if t is None else t.detach().cpu() for t in (offsets, scales))
        return super()._pool(layout, ids.cpu(), offsets, scales)

    def _look_up(
        self,
        layout: Layout,
        flat: NDArray[np.int64],
        edges: NDArray[np.int64],
        weights: NDArray[np.float32],
        num_bags: int,
    ) -> tuple[Tensor, Lookups]:
        if not self._training:
            out, seen = super()._look_up(layout, flat, edges, weights, num_bags)
            return out.to(self.slab.device), seen
        _, slots, _, _ = self._locate(layout, flat, edges)
        bag_of, scale_of = _NO_BAGS, weights
        if len(edges):
            sizes = np.diff(edges)
            bag_of = np.repeat(np.arange(num_bags, dtype=np.int32), sizes)
            mean = layout.mean[np.arange(num_bags) % len(layout.features)]
            if mean.any():
                size = np.where(mean, sizes, 1).astype(np.float32)[bag_of]
                scale_of = (weights if len(weights) else np.float32(1)) / size
        with self._line():
            if len(edges) or len(scale_of):
                out = self._device.pool(slots, edges if len(edges) else np.arange(num_bags + 1), scale_of)
            else:
                out = self._device.gather(slots)
        self._line.hand_out(out)
        return out, Lookups(slots, bag_of, scale_of)

    # -- backward

    def _receive(self, lookups: Lookups, grad: Tensor) -> None:
        self._line.hand_in(grad)
        super()._receive(lookups, grad)

    def _is_finite(self, waiting: _Waiting) -> bool:
        """Leave the question to the device, which `_run` asks; but visits are counted here, so wait for the answer."""
        self._hear()
        if not len(self.visits):
            return True
        with self._line():
            return waiting.is_finite()

    def _run(self, waiting: _Waiting, *, norm: bool = False) -> float:
        with self._line():
            lookups, grad = waiting.merged()
            slots, bag_of, scale_of = lookups.row_of, lookups.bag_of, lookups.scale_of
            if len(self.frozen) or len(self.visits):
                slots, bag_of, scale_of = self._moving(slots, bag_of, scale_of, count=not norm)
            if norm:  # in the order of the rows, wherever they lie
                names = self._named(slots)
                return float(self._device.squared_norm(names, bag_of, scale_of, grad, waiting.scale))
            finite = torch.isfinite(grad).all()
            touched = self._device.update(
                self.optimizer, slots, bag_of, scale_of, grad, step=self.counts.steps, seed=self.seed,
                names=slots if self.weight.dtype == torch.float32 else self._named(slots),
                grad_scale=waiting.scale, only_if=finite,
            )  # fmt: skip
            self._touched += touched * finite
            self._wrong |= ~finite
            self._told.copy_(self._wrong, non_blocking=True)
        self._dirty[slots] = 1
        self._hear()
        return 0.0  # `counted` tells how many

    def _moving(
        self, slots: NDArray[np.int64], bag_of: NDArray[np.int32], scale_of: NDArray[np.float32], *, count: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
        """Return the lookups of rows that are not frozen, and maybe count both kinds of rows."""
        names = self._named(slots)
        if len(self.frozen):
            kept = np.flatnonzero(self.frozen[names] == 0)
            if len(kept) < len(slots):
                if count:
                    self.counts.rows_frozen += len(np.unique(names[self.frozen[names] != 0]))
                bag_of = kept.astype(np.int32) if not len(bag_of) else bag_of[kept]
                scale_of = scale_of[kept] if len(scale_of) else scale_of
                slots, names = slots[kept], names[kept]
        if count and len(self.visits):
            self.visits[np.unique(names)] += np.uint32(1)
        return slots, bag_of, scale_of

    def _hear(self) -> None:
        """Complain about a gradient that the device has found to be NaN or infinite by now."""
        if bool(self._told):  # the device writes there, and only ever "yes"
            with self._line():
                self._wrong.zero_()
            self._line.wait()
            self._told.zero_()
            raise InputError(
                "a gradient is NaN or infinite; no row was changed by it",
                hint="lower the learning rate, or look for NaN in the dense input and the loss",
            )

    def _scale_gradients(self, lookups: Lookups, layout: Layout, scales: Tensor, grad: Tensor) -> Tensor:
        divisor = self.divisor_of(lookups, layout)
        with self._line():
            out = self._device.scale_gradients(lookups.row_of, lookups.bag_of, divisor, grad)
        self._line.hand_out(out)
        return out.reshape(scales.shape).to(scales)


def _bits(column: Tensor) -> NDArray[Any]:
    return column.view(torch.int16 if column.element_size() == 2 else torch.int32).numpy()
