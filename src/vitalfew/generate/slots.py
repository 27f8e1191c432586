"""The keys and values of one attention layer in slots: a new token takes the place of an evicted one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vitalfew.core.errors import InputError
from vitalfew.generate._calling import array, tables
from vitalfew.generate._kernels_numba import swap
from vitalfew.generate.packed import Packed, pack
from vitalfew.generate.quant import Codec
from vitalfew.generate.scores import on_gpu

__all__ = ["Slots"]

_BLOCK = 64


@dataclass(frozen=True, slots=True)
class _Step:
    """What one written token replaced, so that it can be taken back."""

    slot: torch.Tensor  # (B, H)
    key: torch.Tensor  # (B, H, dk)
    value: torch.Tensor  # (B, H, dv)
    pos: torch.Tensor  # (B, H)
    score: torch.Tensor  # (B, H, C)
    marked: torch.Tensor  # (B, H)
    counts: tuple[int, ...]
    filled: tuple[int, ...]
    caps: tuple[int | None, ...]
    memory: tuple[torch.Tensor, ...] = ()  # keys, values, positions and scores, where this token had rows chosen from

    def of_rows(self, order: list[int], at: torch.Tensor) -> _Step:
        tensors: dict[str, Any] = {
            name: getattr(self, name).index_select(0, at) for name in ("slot", "key", "value", "pos", "score", "marked")
        }
        lists: dict[str, Any] = {
            name: tuple(getattr(self, name)[row] for row in order) for name in ("counts", "filled", "caps")
        }
        memory = tuple(held.index_select(0, at) for held in self.memory)
        return replace(self, **tensors, **lists, memory=memory)


class Slots:
    """Slots of one layer for B rows and H key-value heads; the order of slots says nothing.

    Attributes
    ----------
    keys, values
        Shape ``(B, H, C, d)``, allocated once the prompt has been chosen from; with a codec, ``(B, H, C, bytes)``.
    pos
        Shape ``(B, H, C)``, int32: a token's own position in its row (padding is not counted), -1 in an empty slot.
    score
        Shape ``(B, H, C)``, float32; what has the lowest goes first, infinity never.
    marked
        Shape ``(B, H)``, int64: the slot that the next token takes in a row that is full.
    counts, filled, caps
        Per row: tokens seen, slots in use, slots it may use (None: as many as it needs).
    codec, dtype, sizes
        How keys and values are coded (None: not at all), their own type, and the channels of a key and of a value.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, codec: Codec | None = None) -> None:
        rows, heads = keys.shape[:2]
        self.codec, self.dtype, self.sizes = codec, keys.dtype, (keys.shape[-1], values.shape[-1])
        self.keys, self.values = (
            keys.new_empty((rows, heads, 0, d)) if codec is None
            else keys.new_empty((rows, heads, 0, codec.nbytes(d)), dtype=torch.uint8)
            for d in self.sizes
        )  # fmt: skip
        # Of a prompt that goes on: its queries see what its tokens are, not what is kept of them.
        self._exact: tuple[torch.Tensor, torch.Tensor] | None = None
        self.pos = torch.empty((rows, heads, 0), dtype=torch.int32, device=keys.device)
        self.score = torch.empty((rows, heads, 0), dtype=torch.float32, device=keys.device)
        self.marked = torch.zeros((rows, heads), dtype=torch.int64, device=keys.device)
        self.counts, self.filled = [0] * rows, [0] * rows
        self.caps: list[int | None] = [None] * rows
        self._log: list[_Step] = []

    def _coded(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.codec is None else pack(x, self.codec)

    def check_kind(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Refuse tokens of another batch, model or type than those that are held."""
        held = (*self.keys.shape[:2], *self.sizes, self.dtype)
        got = (key.shape[0], key.shape[1], key.shape[-1], value.shape[-1], key.dtype)
        if held != got:
            mine, its = (f"{r} rows of {h} heads with {k} + {v} channels of {kind}" for r, h, k, v, kind in (held, got))
            raise InputError(
                f"this cache holds {mine}, got {its}", hint="use a fresh cache for another batch, model or dtype"
            )

    def to(self, device: torch.device) -> None:
        """Move to a device; what was overwritten before cannot be taken back."""
        for name in ("keys", "values", "pos", "score", "marked"):
            setattr(self, name, getattr(self, name).to(device))
        if self._exact is not None:
            self._exact = (self._exact[0].to(device), self._exact[1].to(device))
        self._log.clear()

    @property
    def used(self) -> int:
        """Slots in use by the row that uses most."""
        return max(self.filled)

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values, positions, scores and marks of all slots, used or not."""
        held = (self.keys, self.values, self.pos, self.score, self.marked, *(self._exact or ()))
        return sum(t.numel() * t.element_size() for t in held)

    def view(self) -> tuple[torch.Tensor | Packed, torch.Tensor | Packed, torch.Tensor]:
        """Return keys, values and positions of the slots in use."""
        used = self.used
        keys, values = self.keys[:, :, :used], self.values[:, :, :used]
        if self.codec is None:
            return keys, values, self.pos[:, :, :used]
        return Packed(keys, self.codec, self.sizes[0]), Packed(values, self.codec, self.sizes[1]), self.pos[:, :, :used]

    def exact_view(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the same for the queries of a prompt: its own tokens as they are, what was coded before decoded."""
        keys, values, pos = self.view()
        return self._exactly(keys, 0), self._exactly(values, 1), pos

    def _exactly(self, held: torch.Tensor | Packed, which: int) -> torch.Tensor:
        if isinstance(held, torch.Tensor):
            return held
        if self._exact is None:
            return held.decode(self.dtype)
        exact = self._exact[which]
        before = held.data.shape[2] - exact.shape[2]
        return torch.cat((held.first(before).decode(self.dtype), exact), 2) if before else exact

    def settle(self) -> None:
        """End a prompt: from here on its tokens are what is kept of them."""
        self._exact = None

    # The prompt

    def extend(self, keys: torch.Tensor, values: torch.Tensor, pos: torch.Tensor, score: torch.Tensor) -> None:
        """Append tokens of the prompt, ``(B, H, n, d)``, padding included (with position -1)."""
        used = self.used
        for row, fill in enumerate(self.filled):
            # Many queries at once multiply what they do not see by 0, which what is no number would survive.
            for tensor in (self.keys, self.values, self.score):
                tensor[row, :, fill:used] = 0
        self.reserve(used + keys.shape[2], spare=True)
        end = used + keys.shape[2]
        self.keys[:, :, used:end], self.values[:, :, used:end] = self._coded(keys), self._coded(values)
        if self.codec is not None:
            both = (keys, values)
            if self._exact is not None:
                both = (torch.cat((self._exact[0], keys), 2), torch.cat((self._exact[1], values), 2))
            self._exact = both
        self.pos[:, :, used:end], self.score[:, :, used:end] = pos, score
        self.filled = [end] * len(self.filled)
        self._log.clear()

    def replace(self, keys: torch.Tensor, values: torch.Tensor, pos: torch.Tensor, score: torch.Tensor) -> None:
        """Hold just these tensors, each full to the last slot; nothing is copied."""
        self.keys, self.values, self.pos, self.score = self._coded(keys), self._coded(values), pos, score
        self._exact = None if self.codec is None else (keys, values)
        self.filled = [keys.shape[2]] * keys.shape[0]
        self._log.clear()

    def keep(self, index: torch.Tensor, filled: Sequence[int], room: int = 0) -> None:
        """Keep the slots of an index ``(B, H, k)``, -1 for none, in new memory of ``max(k, room)`` slots."""
        if self._log:  # the latest token may be taken back, and the choice with it
            self._log[-1] = replace(self._log[-1], memory=(self.keys, self.values, self.pos, self.score))
        rows, heads, count = index.shape
        size = max(count, room)
        safe = index.clamp(min=0)
        for name in ("keys", "values", "pos", "score"):
            old = getattr(self, name)
            at = safe.unsqueeze(-1).expand(-1, -1, -1, old.shape[-1]) if old.ndim == 4 else safe
            new = old.new_empty((rows, heads, size, *old.shape[3:]))
            new[:, :, :count] = old.gather(2, at)
            setattr(self, name, new)
        self.pos[:, :, :count].masked_fill_(index < 0, -1)
        self.pos[:, :, count:] = -1
        self.filled = list(filled)

    def reserve(self, size: int, *, spare: bool = False) -> None:
        """Have memory for so many slots; with `spare` for some more, so that who grows step by step copies seldom."""
        have = self.keys.shape[2]
        if size <= have:
            return
        if spare and have:
            size = max(size, have + have // 8)
            size += -size % _BLOCK
        for name in ("keys", "values", "pos", "score"):
            old = getattr(self, name)
            new = old.new_empty((*old.shape[:2], size, *old.shape[3:]))
            new[:, :, :have] = old
            setattr(self, name, new)
        self.pos[:, :, have:] = -1

    # Later tokens

    def write(self, key: torch.Tensor, value: torch.Tensor, pos: torch.Tensor, *, log: int) -> None:
        """Put one token per row, ``(B, H, d)`` at own positions ``(B,)``, into the marked or the next free slot.

        The last `log` tokens can be taken back with `undo`.
        """
        key, value = self._coded(key), self._coded(value)  # before anything is written: it may be refused
        caps = tuple(self.caps)
        slot, growing = self.marked, [False] * len(caps)
        if tuple(self.filled) != caps:
            growing = [cap is None or fill < cap for fill, cap in zip(self.filled, caps, strict=True)]
            need = max(fill + 1 for fill, grows in zip(self.filled, growing, strict=True) if grows)
            self.reserve(need, spare=True)
            free = torch.tensor(self.filled, device=slot.device)[:, None]
            slot = torch.where(torch.tensor(growing, device=slot.device)[:, None], free, slot)
        score = self.score.clone()
        before = self._swap(slot, key, value, pos)
        self._log.append(_Step(slot, *before, score, self.marked, tuple(self.counts), tuple(self.filled), caps))
        del self._log[: max(0, len(self._log) - log)]
        self.filled = [fill + grows for fill, grows in zip(self.filled, growing, strict=True)]

    def _swap(
        self, slot: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pos: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Put one token per row into these slots, and return the keys, values and positions that lay there."""
        kernel = self.keys.device.type == "cpu" and self.keys.dtype in (torch.float32, torch.uint8)
        held = tables(self.keys, self.values) if kernel and self.pos.is_contiguous() else None
        if held is None:
            before = (
                self.keys.gather(2, _wide(slot, self.keys)),
                self.values.gather(2, _wide(slot, self.values)),
                self.pos.gather(2, slot[:, :, None]),
            )
            self._put(slot, key, value, pos)
            return before
        old_keys, old_values = (x.new_empty((*x.shape[:2], 1, x.shape[2])) for x in (key, value))
        old_pos = self.pos.new_empty((*slot.shape, 1))
        swap(
            *held[0], *held[1], self.pos.numpy(), self.score.numpy(), array(slot, slot.dtype),
            array(key, key.dtype), array(value, value.dtype), array(pos, torch.int32),
            old_keys.numpy(), old_values.numpy(), old_pos.numpy(),
        )  # fmt: skip
        return old_keys, old_values, old_pos

    def overwrite(self, key: torch.Tensor, value: torch.Tensor, pos: torch.Tensor) -> None:
        """Put one token per row into the marked slots of rows that are full; it cannot be taken back."""
        self._put(self.marked, self._coded(key), self._coded(value), pos)

    def _put(self, slot: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pos: torch.Tensor) -> None:
        if on_gpu(self.keys) and self.codec is None:
            from vitalfew.generate import _kernels_triton as gpu

            gpu.write(self.keys, self.values, self.pos, self.score, slot, key, value, pos)
            return
        at = slot[:, :, None]
        self.keys.scatter_(2, _wide(slot, self.keys), key[:, :, None])
        self.values.scatter_(2, _wide(slot, self.values), value[:, :, None])
        self.pos.scatter_(2, at, pos.to(torch.int32)[:, None, None].expand_as(at))
        self.score.scatter_(2, at, 0.0)

    @property
    def undoable(self) -> int:
        """How many of the latest tokens can be taken back."""
        return len(self._log)

    def undo(self) -> None:
        """Take the latest token back."""
        step = self._log.pop()
        if step.memory:
            self.keys, self.values, self.pos, self.score = step.memory
        at = step.slot[:, :, None]
        self.keys.scatter_(2, at[..., None].expand(-1, -1, -1, self.keys.shape[-1]), step.key)
        self.values.scatter_(2, at[..., None].expand(-1, -1, -1, self.values.shape[-1]), step.value)
        self.score[:, :, : step.score.shape[2]] = step.score
        self.pos.scatter_(2, at, step.pos)
        self.marked = step.marked
        self.counts, self.filled, self.caps = list(step.counts), list(step.filled), list(step.caps)

    def forget_log(self) -> None:
        """Let the latest tokens stand."""
        self._log.clear()

    # Rows

    def join(self, other: Slots) -> None:
        """Take the rows of other slots in after these; both have memory for as many slots as the larger then."""
        size = max(self.keys.shape[2], other.keys.shape[2])
        self.reserve(size)
        other.reserve(size)
        for name in ("keys", "values", "pos", "score", "marked"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        self.counts, self.filled = self.counts + other.counts, self.filled + other.filled
        self.caps = self.caps + other.caps
        self._log.clear()

    def select_rows(self, index: torch.Tensor) -> None:
        """Take these rows, in this order; a row may be taken more than once."""
        order = index.tolist()
        at = index.to(self.keys.device)
        for name in ("keys", "values", "pos", "score", "marked"):
            setattr(self, name, getattr(self, name).index_select(0, at))
        self.counts = [self.counts[row] for row in order]
        self.filled = [self.filled[row] for row in order]
        self.caps = [self.caps[row] for row in order]
        self._log = [step.of_rows(order, at) for step in self._log]
        if self._exact is not None:
            self._exact = (self._exact[0].index_select(0, at), self._exact[1].index_select(0, at))

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on from here."""
        tensors = {name: getattr(self, name).clone() for name in ("keys", "values", "pos", "score", "marked")}
        if self._exact is not None:
            tensors["exact_keys"], tensors["exact_values"] = (t.clone() for t in self._exact)
        return {
            **tensors, "counts": list(self.counts), "filled": list(self.filled), "caps": list(self.caps),
            "codec": None if self.codec is None else self.codec.name, "dtype": str(self.dtype).removeprefix("torch."),
            "sizes": list(self.sizes),
        }  # fmt: skip

    @classmethod
    def of_state(cls, state: dict[str, Any], codec: Codec | None = None) -> Slots:
        """Return slots that go on from a saved state."""
        shape, dtype = (*state["keys"].shape[:2], 0), getattr(torch, state["dtype"])
        none = [state["keys"].new_empty((*shape, size), dtype=dtype) for size in state["sizes"]]
        slots = cls(none[0], none[1], codec)
        slots.load_state_dict(state)
        return slots

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        mine, its = None if self.codec is None else self.codec.name, state.get("codec")
        if mine != its:
            raise InputError(
                f"the state's keys and values are coded as {its}, these slots' as {mine}",
                hint="load it into a cache with the same codec",
            )
        for name in ("keys", "values", "pos", "score", "marked"):
            setattr(self, name, state[name].to(self.keys.device, copy=True))
        self.counts, self.filled, self.caps = list(state["counts"]), list(state["filled"]), list(state["caps"])
        self.dtype, self.sizes = getattr(torch, state["dtype"]), tuple(state["sizes"])
        exact = [state[name].clone() for name in ("exact_keys", "exact_values") if name in state]
        self._exact = (exact[0], exact[1]) if exact else None
        self._log.clear()


def _wide(slot: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Return an index ``(B, H, 1, d)`` of one slot per row and head in keys or values."""
    return slot[:, :, None, None].expand(-1, -1, 1, memory.shape[-1])
