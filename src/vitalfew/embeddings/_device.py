"""The rows of a slab on a device, looked up and updated from lookups that the host has found."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitalfew.embeddings._kernels_torch import kernels_for
from vitalfew.embeddings.optim import Optimizer
from vitalfew.tiers.hbm import HbmSlab, columns_of

__all__ = ["DeviceRows"]


class DeviceRows:
    """What `Rows` asks of the CPU kernels, for a slab whose columns are those of `columns_of`.

    Lookups come as numpy arrays, as `Rows` keeps them: slot, and where they say something bag and scale of each. They
    travel through page-locked memory, so that nothing here waits for the device.
    """

    def __init__(self, slab: HbmSlab, optimizer: Optimizer) -> None:
        self.slab = slab
        self.weight, *state, self.stats = slab.columns
        self.wide, self.narrow = state[: optimizer.wide_states], state[optimizer.wide_states :]
        self._kernels = kernels_for(slab.device)

    @staticmethod
    def columns(dim: int, dtype: torch.dtype, optimizer: Optimizer) -> list[tuple[int, torch.dtype]]:
        """Return the columns a slab for this optimizer has."""
        return columns_of(dim, dtype, optimizer.wide_states, optimizer.row_states)

    def gather(self, slots: NDArray[np.int64]) -> Tensor:
        """Return the row of each lookup, float32."""
        out = torch.empty(len(slots), self.weight.shape[1], device=self.slab.device)
        self._kernels.gather(self.weight, self._there(slots), out)
        return out

    def pool(self, slots: NDArray[np.int64], edges: NDArray[np.int64], scale_of: NDArray[np.float32]) -> Tensor:
        """Return the bags that `edges` divides the lookups into; `scale_of` is empty without scales."""
        out = torch.empty(len(edges) - 1, self.weight.shape[1], device=self.slab.device)
        self._kernels.pool(self.weight, self._there(slots), self._there(edges), self._some(scale_of), out)
        return out

    def update(
        self,
        optimizer: Optimizer,
        slots: NDArray[np.int64],
        bag_of: NDArray[np.int32],
        scale_of: NDArray[np.float32],
        grad: Tensor,
        *,
        step: int,
        seed: int,
        names: NDArray[np.int64],
        grad_scale: float = 1.0,
        only_if: Tensor | None = None,
    ) -> Tensor:
        """Update every touched row once; returns how many, on the device. `names` is the row of each lookup.

        Where `only_if` turns out to be false, on the device, the slab's last slot takes it all.
        """
        there, bags, scales = self._lookups(slots, bag_of, scale_of)
        if only_if is not None:
            there = torch.where(only_if, there, self.slab.num_slots - 1)
        touched: Tensor = self._kernels.update(
            optimizer.kind, self.weight, self.wide, self.narrow, there, bags, scales, grad,
            (*optimizer.scalars(max(step, 1)), optimizer.weight_decay),
            # Rounding alone asks which row it is.
            names=None if self.weight.dtype == torch.float32 else self._there(names),
            dice=seed * 0x9E3779B97F4A7C15 + step * 0xD1342543DE82EF95,
            stats=self.stats, step=step, grad_scale=grad_scale,
        )  # fmt: skip
        return touched

    def squared_norm(
        self,
        slots: NDArray[np.int64],
        bag_of: NDArray[np.int32],
        scale_of: NDArray[np.float32],
        grad: Tensor,
        grad_scale: float = 1.0,
    ) -> Tensor:
        """Return the square of the 2-norm of the gradients of all rows, on the device."""
        norm: Tensor = self._kernels.squared_norm(*self._lookups(slots, bag_of, scale_of), grad, grad_scale)
        return norm

    def scale_gradients(
        self, slots: NDArray[np.int64], bag_of: NDArray[np.int32], divisor: NDArray[np.float32], grad: Tensor
    ) -> Tensor:
        """Return the gradient of each lookup's scale."""
        there, bags, _ = self._lookups(slots, bag_of, divisor[:0])
        out: Tensor = self._kernels.scale_gradients(self.weight, there, bags, self._there(divisor), grad)
        return out

    def _lookups(
        self, slots: NDArray[np.int64], bag_of: NDArray[np.int32], scale_of: NDArray[np.float32]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        bags = self._some(bag_of)
        return self._there(slots), None if bags is None else bags.long(), self._some(scale_of)

    def _some(self, array: NDArray[Any]) -> Tensor | None:
        return self._there(array) if len(array) else None

    def _there(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.slab.device.type == "cuda":
            tensor = tensor.pin_memory()  # from a cache that knows when the device is done with it
        return tensor.to(self.slab.device, non_blocking=True)
