"""Keys and values as a codec writes them, slot by slot, and the attention of one token over them.

The bytes of a vector lie together, so slots are moved and overwritten as those of a model's own type are. Attention
decodes some slots at a time: a copy of all of them in full precision never exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from vitalfew.generate import _kernels_coded, _kernels_reference, _kernels_threads
from vitalfew.generate._calling import NONE, array, tables, threads_for
from vitalfew.generate.quant import Codec, turn
from vitalfew.generate.scores import attend_slots

if TYPE_CHECKING:
    from vitalfew.generate.scores import Logits

__all__ = ["Packed", "attend_held", "pack"]

_BLOCK = 512
"""Slots that are decoded at a time where no kernel does it."""


def pack(x: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Return vectors ``(..., d)`` as bytes ``(..., codec.nbytes(d))``: a vector's codes, then its scales.

    Examples
    --------
    >>> from vitalfew.generate.quant import Int8
    >>> pack(torch.ones(1, 2, 5, 64), Int8()).shape
    torch.Size([1, 2, 5, 66])
    """
    codes, scales = codec.encode(x)
    return torch.cat((codes.view(torch.uint8), scales.contiguous().view(torch.uint8)), -1)


@dataclass(frozen=True, slots=True)
class Packed:
    """Vectors of `size` channels in a codec's bytes, ``(B, H, C, bytes)``.

    Examples
    --------
    >>> from vitalfew.generate.quant import Int8
    >>> x = torch.tensor([[127.0, -64.0, 1.0]])
    >>> Packed(pack(x, Int8()), Int8(), 3).decode(torch.float32).tolist()
    [[127.0, -64.0, 1.0]]
    """

    data: torch.Tensor
    codec: Codec
    size: int

    def first(self, count: int) -> Packed:
        """Return the first slots."""
        return Packed(self.data[:, :, :count], self.codec, self.size)

    def blocks(self) -> list[Packed]:
        """Return the slots, some at a time."""
        return [Packed(part, self.codec, self.size) for part in torch.split(self.data, _BLOCK, 2)]

    def decode(self, dtype: torch.dtype, *, turned: bool = False) -> torch.Tensor:
        """Return the vectors; see `Codec.decode`."""
        scales = 2 * (self.size // self.codec.group(self.size))
        codes, tail = torch.split(self.data, [self.data.shape[-1] - scales, scales], -1)
        # A copy starts at an even byte, whatever the slots' size.
        halves = tail.clone(memory_format=torch.contiguous_format).view(torch.float16)
        return self.codec.decode((codes, halves), dtype, turned=turned)


@torch.no_grad()
def attend_held(
    query: torch.Tensor, keys: torch.Tensor | Packed, values: torch.Tensor | Packed, form: Logits, pos: torch.Tensor,
    query_pos: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Do what `attend_slots` does, for keys and values in the model's own type or both in a codec's bytes.

    Examples
    --------
    >>> from vitalfew.generate.quant import Int8
    >>> from vitalfew.generate.scores import Logits
    >>> q, ones = torch.ones(1, 2, 1, 4), torch.ones(1, 1, 3, 4)
    >>> k = Packed(pack(ones, Int8()), Int8(), 4)
    >>> at = torch.tensor([[[0, 2, -1]]], dtype=torch.int32)
    >>> attend_held(q, k, k, Logits(0.5), at, torch.tensor([2]))[1][0, 0, 0].round(decimals=2)
    tensor([2., 2., -inf])
    """
    if isinstance(keys, torch.Tensor) or isinstance(values, torch.Tensor):
        assert isinstance(keys, torch.Tensor)
        assert isinstance(values, torch.Tensor)
        return attend_slots(query, keys, values, form, pos, query_pos)
    rows, all_heads, _, d = query.shape
    heads, slots, width, codec = keys.data.shape[1], keys.data.shape[2], values.size, keys.codec
    q = turn(query.reshape(rows, heads, -1, d).float())
    kind = _kernels_coded.KINDS.get(codec.name)
    held = tables(keys.data, values.data) if query.device.type == "cpu" and kind is not None else None
    if held is None:
        out, logits = _kernels_reference.attend_blocks(
            q,
            (part.decode(torch.float32, turned=True) for part in keys.blocks()),
            (part.decode(torch.float32, turned=True) for part in values.blocks()),
            pos, query_pos, form.scale, form.softcap, form.slopes, form.sinks,
        )  # fmt: skip
    else:
        out, logits = torch.empty((rows, heads, all_heads // heads, width)), torch.empty((*q.shape[:3], slots))
        slopes, sinks = (NONE if each is None else array(each) for each in (form.slopes, form.sinks))
        given = (
            array(q), *held[0], *held[1], kind, (codec.group(d), codec.group(width)), array(pos, torch.int32),
            array(query_pos, torch.int64), np.float32(form.scale), np.float32(form.softcap or 0.0), slopes, sinks,
            out.numpy(), logits.numpy(), 0, rows * heads,
        )  # fmt: skip
        threads = threads_for(rows * heads, 4 * rows * heads * slots * (d + width))
        _kernels_threads.attend_coded(*given, threads) if threads > 1 else _kernels_coded.attend(*given)
    return turn(out).reshape(rows, 1, all_heads, width).to(query.dtype), logits
