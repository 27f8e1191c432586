"""A model that reads prompts chunk by chunk and writes one token for every row of a batch in each step."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from vitalfew.core.errors import InputError
from vitalfew.generate._transformers import SlotCache, SlotLayer
from vitalfew.generate.key_tokens import KeyTokens
from vitalfew.generate.request import Plan
from vitalfew.generate.server.batch import Group, Joint
from vitalfew.generate.server.pool import Need, Shape

__all__ = ["Engine"]


@dataclass
class _Prefill:
    """A prompt on its way through the model, alone, and its tokens read so far."""

    cache: SlotCache
    ids: Sequence[int]
    need: Need
    new: int
    done: int = 0


class Engine:
    """Runs an enabled model; used by one thread.

    Parameters
    ----------
    few
        What is kept by default.
    chunk
        Tokens of a prompt that are read between two steps.

    Raises
    ------
    InputError
        If the model has layers with a window, or the budget does not say beforehand what a request will hold.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    ...     num_key_value_heads=2, eos_token_id=None, pad_token_id=0, bos_token_id=1,
    ... )
    >>> with KeyTokens(LlamaForCausalLM(config).eval(), 0.5, min_length=0) as few:
    ...     engine = Engine(few)
    ...     need = engine.shape.need(engine.plan, prompt=40, new=8, copies=1)
    ...     engine.begin(range(1, 41), 8, engine.plan, need)
    ...     first = int(engine.advance().argmax())
    ...     engine.join(["me"])
    ...     logits = engine.step([first])
    >>> logits.shape, engine.owners, engine.nbytes == need.row
    (torch.Size([1, 64]), ['me'], True)

    Notes
    -----
    A row that joins or leaves has the rows of its group copied once.
    """

    def __init__(self, few: KeyTokens, *, chunk: int = 256) -> None:
        self._few, self._chunk = few, chunk
        self.model: PreTrainedModel = few.model
        self.plan: Plan = few.cache().request.plan
        if few.budget.kind not in ("share", "count"):
            raise InputError(
                f"a server's budget is per request and known beforehand, got {few.budget}",
                hint="pass a share or a number of tokens; --kv-memory is for all requests",
            )
        takes = inspect.signature(self.model.forward).parameters
        self._positions = "position_ids" in takes
        self._last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._groups: dict[tuple[int, tuple[int, ...]], Group] = {}
        self._prefill: _Prefill | None = None
        self.shape = self._measure()

    def _measure(self) -> Shape:
        """Run one token, and see what its slots take."""
        cache = self._few.cache(1)
        if len(cache.slot_layers) < len(cache.layers):
            raise InputError(
                f"{type(self.model).__name__} has layers with a window, whose rows cannot have lengths of their own",
                hint="serve a model with full attention in all layers",
            )
        cache.request.plan = replace(self.plan, keep=None)
        self._forward([[0]], cache)
        slots = [layer.evicting.slots for layer in cache.slot_layers if layer.evicting.slots is not None]
        content = [s.keys.nbytes + s.values.nbytes for s in slots]
        slot = [size + s.pos.nbytes + s.score.nbytes for size, s in zip(content, slots, strict=True)]
        return Shape(content, slot, [s.marked.nbytes for s in slots])

    @torch.inference_mode()
    def _forward(self, ids: Sequence[Sequence[int]], cache: Cache, counts: Sequence[int] | None = None) -> torch.Tensor:
        """Return the logits after the last token of each row, float32."""
        device, more = self.model.device, dict(self._last)
        if counts is not None and self._positions:
            more["position_ids"] = torch.tensor(counts, device=device)[:, None]
        out = self.model(torch.tensor(ids, device=device), past_key_values=cache, use_cache=True, **more)
        logits: torch.Tensor = out.logits[:, -1].float()
        return logits

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and what belongs to them, as counted from all tensors held."""
        reading = self._prefill.cache.nbytes if self._prefill is not None else 0
        return reading + sum(group.nbytes for group in self._groups.values())

    @property
    def owners(self) -> list[Any]:
        """Whose the rows of the batch are, in order."""
        return [owner for group in self._groups.values() for owner in group.owners]

    # A prompt

    def begin(self, ids: Sequence[int], new: int, plan: Plan, need: Need) -> None:
        """Start to read a prompt; there is one at a time."""
        cache = self._few.cache(len(ids))
        cache.request.plan = plan
        cache.request.room = dict(enumerate(need.widths))
        self._prefill = _Prefill(cache, ids, need, new)

    def advance(self) -> torch.Tensor | None:
        """Read one chunk; returns the logits ``(1, vocabulary)`` after the whole prompt, or None."""
        prefill = self._prefill
        assert prefill is not None
        start, count = prefill.done, len(prefill.ids)
        prefill.done = min(start + self._chunk, count)
        logits = self._forward([list(prefill.ids[start : prefill.done])], prefill.cache)
        if not start and prefill.done < count:
            with torch.inference_mode():
                for layer in prefill.cache.slot_layers:
                    assert layer.evicting.slots is not None
                    layer.evicting.slots.reserve(count)
        return logits if prefill.done == count else None

    @torch.inference_mode()
    def join(self, owners: Sequence[Any]) -> None:
        """Let the prompt that was read go on as rows of the batch, one for each owner."""
        prefill, self._prefill = self._prefill, None
        assert prefill is not None
        plan = prefill.cache.request.plan
        layers = [layer.evicting for layer in prefill.cache.slot_layers]
        if len(owners) > 1:
            for layer in layers:
                layer.select_rows(torch.zeros(len(owners), dtype=torch.int64))
        group = Group(layers, plan, len(prefill.ids), prefill.new)
        group.owners = list(owners)
        key = (id(plan), prefill.need.widths)
        if key in self._groups:
            self._groups[key].join(group)
        else:
            self._groups[key] = group

    def drop_prompt(self) -> None:
        """Forget the prompt that is being read."""
        self._prefill = None

    # The batch

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Write one token per row, in the order of `owners`; returns the logits ``(rows, vocabulary)`` after it."""
        groups = list(self._groups.values())
        cache = Cache(layers=[_joint([group.layers[k] for group in groups]) for k in range(len(groups[0].layers))])
        return self._forward([[token] for token in tokens], cache, [seen for group in groups for seen in group.counts])

    @torch.inference_mode()
    def leave(self, gone: set[Any]) -> None:
        """Free the slots of these owners."""
        for key, group in list(self._groups.items()):
            rows = [row for row, owner in enumerate(group.owners) if owner not in gone]
            if not rows:
                del self._groups[key]
            elif len(rows) < len(group.owners):
                group.stay(rows)


def _joint(parts: Sequence[Any]) -> SlotLayer:
    layer = SlotLayer(parts[0].layer, parts[0].request)
    layer.evicting = Joint(parts)
    layer.is_initialized = True
    return layer
