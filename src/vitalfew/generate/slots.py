"""The keys and values of one attention layer in slots: a new token takes the place of an evicted one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

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

    def of_rows(self, order: list[int], at: torch.Tensor) -> _Step:
        tensors: dict[str, Any] = {
            name: getattr(self, name).index_select(0, at) for name in ("slot", "key", "value", "pos", "score", "marked")
        }
        lists: dict[str, Any] = {
            name: tuple(getattr(self, name)[row] for row in order) for name in ("counts", "filled", "caps")
        }
        return replace(self, **tensors, **lists)


class Slots:
    """Slots of one layer for B rows and H key-value heads; the order of slots says nothing.

    Attributes
    ----------
    keys, values
        Shape ``(B, H, C, d)``, allocated once the prompt has been chosen from.
    pos
        Shape ``(B, H, C)``, int32: a token's own position in its row (padding is not counted), -1 in an empty slot.
    score
        Shape ``(B, H, C)``, float32; what has the lowest goes first, infinity never.
    marked
        Shape ``(B, H)``, int64: the slot that the next token takes in a row that is full.
    counts, filled, caps
        Per row: tokens seen, slots in use, slots it may use (None: as many as it needs).
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        rows, heads = keys.shape[:2]
        self.keys = keys.new_empty((rows, heads, 0, keys.shape[-1]))
        self.values = values.new_empty((rows, heads, 0, values.shape[-1]))
        self.pos = torch.empty((rows, heads, 0), dtype=torch.int32, device=keys.device)
        self.score = torch.empty((rows, heads, 0), dtype=torch.float32, device=keys.device)
        self.marked = torch.zeros((rows, heads), dtype=torch.int64, device=keys.device)
        self.counts, self.filled = [0] * rows, [0] * rows
        self.caps: list[int | None] = [None] * rows
        self._log: list[_Step] = []

    @property
    def used(self) -> int:
        """Slots in use by the row that uses most."""
        return max(self.filled)

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values, positions, scores and marks of all slots, used or not."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values, self.pos, self.score, self.marked))

    def view(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return keys, values and positions of the slots in use."""
        used = self.used
        return self.keys[:, :, :used], self.values[:, :, :used], self.pos[:, :, :used]

    # The prompt

    def extend(self, keys: torch.Tensor, values: torch.Tensor, pos: torch.Tensor, score: torch.Tensor) -> None:
        """Append tokens of the prompt, ``(B, H, n, d)``, padding included (with position -1)."""
        used = self.used
        self.reserve(used + keys.shape[2], spare=True)
        end = used + keys.shape[2]
        self.keys[:, :, used:end], self.values[:, :, used:end] = keys, values
        self.pos[:, :, used:end], self.score[:, :, used:end] = pos, score
        self.filled = [end] * len(self.filled)
        self._log.clear()

    def replace(self, keys: torch.Tensor, values: torch.Tensor, pos: torch.Tensor, score: torch.Tensor) -> None:
        """Hold just these tensors, each full to the last slot; nothing is copied."""
        self.keys, self.values, self.pos, self.score = keys, values, pos, score
        self.filled = [keys.shape[2]] * keys.shape[0]
        self._log.clear()

    def keep(self, index: torch.Tensor, filled: Sequence[int], room: int = 0) -> None:
        """Keep the slots of an index ``(B, H, k)``, -1 for none, in new memory of ``max(k, room)`` slots."""
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
        self._log.clear()

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
        caps = tuple(self.caps)
        slot, growing = self.marked, [False] * len(caps)
        if tuple(self.filled) != caps:
            growing = [cap is None or fill < cap for fill, cap in zip(self.filled, caps, strict=True)]
            need = max(fill + 1 for fill, grows in zip(self.filled, growing, strict=True) if grows)
            self.reserve(need, spare=True)
            free = torch.tensor(self.filled, device=slot.device)[:, None]
            slot = torch.where(torch.tensor(growing, device=slot.device)[:, None], free, slot)
        at = slot[:, :, None]
        wide_k, wide_v = (at[..., None].expand(-1, -1, -1, t.shape[-1]) for t in (self.keys, self.values))
        self._log.append(
            _Step(
                slot,
                self.keys.gather(2, wide_k),
                self.values.gather(2, wide_v),
                self.pos.gather(2, at),
                self.score.clone(),
                self.marked,
                tuple(self.counts),
                tuple(self.filled),
                caps,
            )
        )
        del self._log[: max(0, len(self._log) - log)]
        self.keys.scatter_(2, wide_k, key[:, :, None])
        self.values.scatter_(2, wide_v, value[:, :, None])
        self.pos.scatter_(2, at, pos.to(torch.int32)[:, None, None].expand_as(at))
        self.score.scatter_(2, at, 0.0)
        self.filled = [fill + grows for fill, grows in zip(self.filled, growing, strict=True)]

    @property
    def undoable(self) -> int:
        """How many of the latest tokens can be taken back."""
        return len(self._log)

    def undo(self) -> None:
        """Take the latest token back."""
        step = self._log.pop()
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

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on from here."""
        tensors = {name: getattr(self, name).clone() for name in ("keys", "values", "pos", "score", "marked")}
        return {**tensors, "counts": list(self.counts), "filled": list(self.filled), "caps": list(self.caps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        for name in ("keys", "values", "pos", "score", "marked"):
            setattr(self, name, state[name].to(self.keys.device, copy=True))
        self.counts, self.filled, self.caps = list(state["counts"]), list(state["filled"]), list(state["caps"])
        self._log.clear()
