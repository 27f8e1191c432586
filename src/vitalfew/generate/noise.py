"""Noise that is addressed, not streamed: a draw follows from where it belongs, whatever the batch, chunk or order.

A pool of exponential draws is made once from the seed. The row of a query in a head starts at a hashed place of the
pool, and a key takes the draw at its own position from there, so a row is one contiguous piece of memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["POOL", "Noise", "exponential", "gumbel", "gumbel_table", "gumbels", "hashed", "inverses"]

POOL = 1 << 16
"""Draws in the pool of a seed."""

_WORD = 0xFFFFFFFF
_GOLD = 0x9E3779B9
_LEAST = 2.0**-30
_Bits = TypeVar("_Bits", int, torch.Tensor)


@dataclass(frozen=True, slots=True)
class Noise:
    """Whose noise: the seed of the request and the layer.

    Examples
    --------
    >>> noise = Noise(seed=0, layer=3)
    >>> noise.starts(heads=2, query_pos=torch.tensor([[7]])).shape
    torch.Size([1, 2, 1])
    """

    seed: int
    layer: int

    @property
    def key(self) -> int:
        """32 bits that stand for the seed and the layer."""
        seed = self.seed & 0xFFFFFFFFFFFFFFFF
        return _mix((_mix(_mix(seed & _WORD) ^ (seed >> 32)) + self.layer * _GOLD) & _WORD)

    def starts(self, heads: int, query_pos: torch.Tensor) -> torch.Tensor:
        """Return where in the pool the rows of queries ``(B, n)`` start in each query head: ``(B, heads, n)`` int64."""
        head = torch.arange(heads, device=query_pos.device)[:, None]
        return hashed(self.key, head, query_pos[:, None].to(torch.int64)) & (POOL - 1)


def hashed(key: int, head: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    """Return 32 random bits, as int64, for each head and position under a key.

    Examples
    --------
    >>> bits = hashed(1, torch.tensor([[0], [1]]), torch.tensor([5, 6]))
    >>> bits.shape, len(set(bits.flatten().tolist()))
    (torch.Size([2, 2]), 4)
    """
    return _mix(_mix((key + head * _GOLD) & _WORD) ^ (pos & _WORD))


def _mix(x: _Bits) -> _Bits:
    """Mix 32 bits (the lowbias32 hash); a product that leaves 64 bits keeps its low 32."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


@lru_cache(maxsize=8)
def _pool(seed: int, device: torch.device) -> torch.Tensor:
    draws = np.random.default_rng(seed & 0xFFFFFFFFFFFFFFFF).standard_exponential(POOL, dtype=np.float32)
    return torch.from_numpy(np.maximum(draws, np.float32(_LEAST))).to(device)


@lru_cache(maxsize=8)
def _inverses(seed: int, device: torch.device, turns: int) -> torch.Tensor:
    return _pool(seed, device).reciprocal().repeat(turns)


@lru_cache(maxsize=8)
def gumbel_table(seed: int, device: torch.device) -> torch.Tensor:
    """Return minus the logarithm of the pool of a seed: the same numbers on all devices."""
    return -_pool(seed, torch.device("cpu")).log().to(device)


def gumbels(seed: int) -> npt.NDArray[np.float32]:
    """Return the pool's Gumbel draws on the CPU, as an array."""
    draws: npt.NDArray[np.float32] = gumbel_table(seed, torch.device("cpu")).numpy()
    return draws


def inverses(seed: int, device: torch.device, length: int = POOL) -> torch.Tensor:
    """Return one over the pool, repeated so that a row of this length can start anywhere and need not turn round."""
    return _inverses(seed, device, 1 + -(-length // POOL))


def exponential(noise: Noise, heads: int, query_pos: torch.Tensor, key_pos: torch.Tensor) -> torch.Tensor:
    """Return one Exp(1) draw per query head, query and key.

    Parameters
    ----------
    noise
        Whose noise.
    heads
        Query heads Hq.
    query_pos
        Own positions of the queries, ``(B, n)``.
    key_pos
        Own positions of the keys in each KV head, ``(B, H, m)``; at an empty slot the draw means nothing.

    Returns
    -------
    torch.Tensor
        ``(B, Hq, n, m)`` float32.

    Examples
    --------
    >>> keys = torch.arange(4).expand(1, 1, 4)
    >>> both = exponential(Noise(0, 0), 1, torch.tensor([[2, 3]]), keys)
    >>> one = exponential(Noise(0, 0), 1, torch.tensor([[3]]), keys)
    >>> bool((both[:, :, 1:] == one).all())
    True
    """
    rows = noise.starts(heads, query_pos)
    group = heads // key_pos.shape[1]
    keys = key_pos.to(torch.int64).repeat_interleave(group, 1)
    return _pool(noise.seed, query_pos.device)[(rows[..., None] + keys[:, :, None]) & (POOL - 1)]


def gumbel(noise: Noise, heads: int, query_pos: torch.Tensor, key_pos: torch.Tensor) -> torch.Tensor:
    """Return one standard Gumbel draw per query head, query and key: minus the logarithm of `exponential`.

    Examples
    --------
    >>> z = gumbel(Noise(0, 0), 1, torch.arange(300)[None], torch.arange(300).expand(1, 1, 300))
    >>> abs(float(z.mean()) - 0.5772) < 0.02
    True
    """
    return -exponential(noise, heads, query_pos, key_pos).log()
