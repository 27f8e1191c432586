"""Rows of many requests in one step: those with slots of one size stand in the same tensors.

Each row keeps its own position, its own budget and its own temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vitalfew.generate.evicting import EvictingLayer
from vitalfew.generate.request import Plan, Request
from vitalfew.generate.scores import Logits

__all__ = ["Group", "Joint"]


@dataclass
class _Rows(Request):
    """The request of a group: how far each of its rows was when its prompt ended, and how many were to follow."""

    starts: list[int] = field(default_factory=list)
    follow: list[int] = field(default_factory=list)
    device: torch.device | None = None
    _taus: tuple[tuple[int, ...], torch.Tensor | float] | None = field(default=None, repr=False)

    def temperature(self, step: int, counts: Sequence[int]) -> torch.Tensor | float:
        key = tuple(counts)
        if self._taus is None or self._taus[0] != key:
            of = self.plan.policy.temperature
            taus = [of(seen - start, new) for seen, start, new in zip(key, self.starts, self.follow, strict=True)]
            one = len(set(taus)) == 1
            self._taus = (key, taus[0] if one else torch.tensor(taus, dtype=torch.float32, device=self.device))
        return self._taus[1]

    def change_rows(self, starts: list[int], follow: list[int]) -> None:
        """Go on with other rows, which may come to the same counts as those before."""
        self.starts, self.follow, self._taus = starts, follow, None


class Group:
    """Rows of one plan whose slots have the same width in each layer.

    Attributes
    ----------
    layers
        One for each layer of the model.
    owners
        Whose the rows are, in order.
    """

    def __init__(self, layers: Sequence[EvictingLayer], plan: Plan, prompt: int, new: int) -> None:
        self.layers = list(layers)
        slots = self.layers[0].slots
        assert slots is not None
        self.owners: list[Any] = []
        room = {layer.layer: layer.slots.keys.shape[2] for layer in self.layers if layer.slots is not None}
        rows = len(slots.counts)
        self._request = _Rows(
            plan, prompt=0, room=room, starts=[prompt] * rows, follow=[new] * rows, device=slots.keys.device
        )
        for layer in self.layers:
            layer.request, layer.mass = self._request, None

    @property
    def counts(self) -> list[int]:
        """Tokens that each row has seen."""
        slots = self.layers[0].slots
        assert slots is not None
        return slots.counts

    @property
    def nbytes(self) -> int:
        """Bytes held, as counted from the tensors."""
        return sum(layer.nbytes for layer in self.layers)

    def join(self, other: Group) -> None:
        """Take the rows of another group of the same plan and widths in after these."""
        for layer, its_layer in zip(self.layers, other.layers, strict=True):
            layer.join(its_layer)
        self.owners += other.owners
        mine, its = self._request, other._request
        mine.change_rows(mine.starts + its.starts, mine.follow + its.follow)

    def stay(self, rows: Sequence[int]) -> None:
        """Keep these rows, and free the slots of the others."""
        at = torch.tensor(rows)
        for layer in self.layers:
            layer.select_rows(at)
        request = self._request
        self.owners = [self.owners[row] for row in rows]
        request.change_rows([request.starts[row] for row in rows], [request.follow[row] for row in rows])


class Joint(EvictingLayer):
    """One layer of several groups, whose rows come one group after another."""

    def __init__(self, parts: Sequence[EvictingLayer]) -> None:
        super().__init__(parts[0].layer, parts[0].request)
        self._parts = parts
        held = [part.slots for part in parts if part.slots is not None]
        self._sizes = [len(slots.counts) for slots in held]
        self.length = max(max(slots.counts) for slots in held)

    @property
    def physical(self) -> int:
        return max(part.physical for part in self._parts)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, form: Logits
    ) -> torch.Tensor:
        each = zip(self._parts, *(torch.split(x, self._sizes) for x in (query, key, value)), strict=True)
        return torch.cat([part.attend(q, k, v, None, form) for part, q, k, v in each])
