"""How tensors are handed to kernels on a CPU, and how many threads these use."""

from __future__ import annotations

import threading
from functools import cache
from importlib import import_module
from typing import Any

import numba
import numpy as np
import torch

__all__ = ["NONE", "array", "tables", "threads_for"]

NONE = np.empty(0, np.float32)
"""What a kernel gets for an array that there is none of."""

_LEAST = 1 << 20
"""Bytes that a thread must read for it to be worth waking."""


def tables(*tensors: torch.Tensor) -> list[tuple[Any, tuple[int, int, int]]] | None:
    """Return each tensor (B, H, C, d) as a table of its rows, with the steps between them; None if it is no such."""
    if torch.compiler.is_compiling():  # which would lose what a kernel writes; it compiles the twin instead
        return None
    found = []
    for tensor in tensors:
        _, heads, slots, d = tensor.shape
        if tensor.is_contiguous():  # the common case, and much the quickest
            found.append((tensor.detach().view(-1, d).numpy(), (heads * slots, slots, 1)))
            continue
        *steps, inner = tensor.stride()
        if inner != 1 or any(step % d for step in steps):
            return None
        ends = [(size - 1) * step for size, step in zip(tensor.shape, steps, strict=False)]
        table = tensor.detach().as_strided((sum(ends) // d + 1, d), (d, 1)).numpy()
        found.append((table, (steps[0] // d, steps[1] // d, steps[2] // d)))
    return found


def array(tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> Any:
    """Return a tensor as an array in one piece, so that a kernel is compiled for one layout only."""
    return tensor.detach().to(dtype).contiguous().numpy()


@cache
def _openmp() -> bool:
    try:
        import_module("numba.np.ufunc.omppool")
    except ImportError:
        return False
    return True


def threads_for(pieces: int, nbytes: int) -> int:
    """Return how many threads are to share pieces of work that read so many bytes, and have numba use them.

    At most as many as PyTorch computes with; one is too few for a kernel that shares its work to be called. Without
    OpenMP, numba's own threads end the process when two others call them at once: then only the main thread has them.
    """
    if not _openmp() and threading.current_thread() is not threading.main_thread():
        return 1
    threads: int = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, pieces, nbytes // _LEAST)
    if threads > 1 and numba.get_num_threads() != threads:
        numba.set_num_threads(threads)
    return threads
