"""Steps that look the same to the device, one after another, so that one can be captured and replayed.

Once all rows are full nothing grows: a token overwrites a slot. What still changes from step to step, where the tokens
stand and the temperature, is kept in the device's memory, moved on there, and never read by the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vitalfew.core.errors import InputError
from vitalfew.generate.noise import gumbel_table

if TYPE_CHECKING:
    from vitalfew.generate.evicting import EvictingLayer

__all__ = ["Clock"]


class Clock:
    """Where the next tokens stand, for all layers of a cache whose rows are full; made by `SlotCache.steady`.

    Attributes
    ----------
    pos
        Shape ``(B,)``, int64: each row's own position of its next token; a captured step passes ``pos[:, None]`` as
        the model's ``position_ids``.
    seen
        Tokens seen, padding included; a tensor of no dimensions.
    tau
        Shape ``(B,)``, float32: the temperature of the next token's votes.
    """

    def __init__(self, layers: Sequence[EvictingLayer]) -> None:
        first = layers[0].slots
        if len({layer.slots.pos.device for layer in layers if layer.slots is not None}) > 1:
            raise InputError("the layers are spread over devices", hint="call the model without steady()")
        for layer in layers:
            slots = layer.slots
            if slots is None or layer.request.recording or slots.filled != slots.caps:
                raise InputError(
                    f"layer {layer.layer} has rows that still grow, or steps that may be taken back",
                    hint="run a prompt first, of min_length or more, with a budget below 1.0",
                )
        assert first is not None
        request, device = layers[0].request, first.pos.device
        for layer in layers:  # none was refused
            assert layer.slots is not None
            layer.slots.forget_log()
        # A captured step has the table's address, so that it must not go while others have their turn.
        self._draws = gumbel_table(request.plan.seed, device) if request.plan.policy.noise else None
        self._layers, self._start = layers, layers[0].length
        after = self._start - layers[0].prompt_end
        last = max(request.planned, after + 1)
        taus = [request.plan.policy.temperature(step, request.planned) for step in range(after + 1, last + 1)]
        self._taus = torch.tensor(taus, dtype=torch.float32, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self.pos = torch.tensor(first.counts, device=device)
        self.seen = torch.tensor(self._start, device=device)
        self.tau = self._taus[:1].repeat(len(first.counts))

    def tick(self, layer: EvictingLayer) -> None:
        """Move on if this is the last layer; the temperature stays as it is after the planned tokens."""
        if layer is self._layers[-1]:
            self.pos += 1
            self.seen += 1
            self._step += 1
            self.tau.copy_(self._taus[self._step.clamp(max=len(self._taus) - 1)].expand_as(self.tau))

    def stop(self) -> None:
        """Let the host know how many steps there were; waits for the device."""
        steps = int(self.seen) - self._start
        for layer in self._layers:
            assert layer.slots is not None
            layer.length += steps
            layer.slots.counts = [count + steps for count in layer.slots.counts]
