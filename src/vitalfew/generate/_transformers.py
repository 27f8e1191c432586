"""The slot cache as transformers knows it: slots for layers with full attention, its own layers for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from vitalfew.core.errors import InputError
from vitalfew.generate._transformers_attention import link, served
from vitalfew.generate.evicting import EvictingLayer
from vitalfew.generate.request import Plan, Request
from vitalfew.generate.steady import Clock

__all__ = ["SlotCache", "SlotLayer", "settled"]


class SlotLayer(CacheLayerMixin):
    """One layer of a `SlotCache`."""

    is_croppable = True
    is_sliding = False

    def __init__(self, layer: int, request: Request) -> None:
        super().__init__()
        self.evicting = EvictingLayer(layer, request)
        self.cache: SlotCache | None = None

    @property
    def batch_size(self) -> int:
        slots = self.evicting.slots
        return len(slots.counts) if slots is not None else -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand the new tokens on to the attention function, which puts them into slots."""
        if not served:
            raise InputError("the KeyTokens of this cache was undone", hint="use its caches before undo()")
        self.is_initialized = True
        link.hand_over(self, key_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = self.evicting.physical
        return held + query_length, self.evicting.length - held

    def get_seq_length(self) -> int:
        clock = self.evicting.request.clock
        # As transformers' static caches do, in a tensor, so that a captured step reads it anew.
        return self.evicting.length if clock is None else cast(int, clock.seen)

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.evicting.request.check_movable()
        self.evicting = EvictingLayer(self.evicting.layer, self.evicting.request)
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        self.evicting.undo(-tokens_to_remove)
        if self.evicting.slots is not None:
            self.evicting.slots.forget_log()

    def activate_past_recording(self) -> None:
        self.record_past = True

    @property
    def record_past(self) -> bool:
        """Whether later tokens can be taken back; transformers sets it to False when it hands a cache back."""
        return self.evicting.request.recording

    @record_past.setter
    def record_past(self, on: bool) -> None:
        self.evicting.request.recording = on

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.evicting.request.check_movable()
        if self.evicting.slots is not None:
            # Whatever takes rows of a tensor: numbers, also from the end, or flags.
            self.evicting.select_rows(torch.arange(self.batch_size)[beam_idx.cpu()])

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.evicting.request.check_movable()
        if self.evicting.slots is not None:
            self.evicting.select_rows(torch.arange(self.batch_size).repeat_interleave(repeats))

    def offload(self) -> None:
        raise InputError("slots cannot be offloaded", hint="choose a smaller budget instead of offloading=True")


class SlotCache(Cache):
    """The cache of one generation: slots for layers with full attention, transformers' own layers for the rest.

    Made by `KeyTokens.cache`.
    """

    def __init__(self, config: Any, plan: Plan, *, prompt: int | None = None, planned: int = 0) -> None:
        self.request = Request(plan, prompt, planned)
        types, kwargs = get_layer_types_and_kwargs(config)
        layers: list[Any] = []
        for index, (kind, more) in enumerate(zip(types, kwargs, strict=True)):
            full = kind == "full_attention"
            layers.append(SlotLayer(index, self.request) if full else DYNAMIC_LAYER_TYPE_MAPPING[kind](**more))
        super().__init__(layers=layers)
        self.torn = False
        self._began: tuple[list[Any], list[tuple[Any, dict[str, Any]]]] | None = None
        self._due = 0
        for layer in self.slot_layers:
            layer.cache = self

    @property
    def slot_layers(self) -> list[SlotLayer]:
        """The layers that hold slots."""
        return [layer for layer in self.layers if isinstance(layer, SlotLayer)]

    @property
    def length(self) -> int:
        """Tokens seen, padding included."""
        return self.slot_layers[0].evicting.length

    @property
    def nbytes(self) -> int:
        """Bytes that all layers hold now, as counted from their tensors."""
        rest = 0
        for layer in self.layers:
            if not isinstance(layer, SlotLayer):
                held = [getattr(layer, name, None) for name in ("keys", "values")]
                rest += sum(t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor))
        return rest + sum(layer.evicting.nbytes for layer in self.slot_layers)

    def expect(self, prompt: int, planned: int) -> None:
        """Say how many tokens, padding included, there will be when the prompt has ended, and how many will follow."""
        if self.request.clock is not None:
            raise InputError("generate() goes step by step itself", hint="leave the `with cache.steady()` block first")
        self.request.prompt, self.request.planned = prompt, planned

    @contextmanager
    def steady(self) -> Iterator[Clock]:
        """Take steps of one token per row that can be captured in a CUDA graph and replayed.

        All rows must be full. Within the block a step neither waits for the device nor depends on the host: pass
        ``position_ids=clock.pos[:, None]``, no mask, and a tensor of tokens that stays where it is. On leaving, the
        host learns how many steps there were; they cannot be taken back.

        Yields
        ------
        Clock
            Where the next tokens stand.

        Raises
        ------
        InputError
            If a row or a layer still grows; on leaving, if a layer gave an output that is not finite.
        """
        if len(self.slot_layers) < len(self.layers):
            raise InputError("layers with a sliding window grow by themselves", hint="call the model without steady()")
        clock = Clock([layer.evicting for layer in self.slot_layers])
        self.request.note(torch.ones((), dtype=torch.bool, device=clock.pos.device))
        self.request.clock = clock
        try:
            yield clock
        finally:
            self.request.clock = None
            clock.stop()
        self.request.check_sound()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise InputError(f"cannot crop to {tokens_to_remove} tokens", hint="pass minus the tokens to remove")
        for layer in self.slot_layers:
            layer.evicting.check_undo(-tokens_to_remove)  # before other layers forget theirs
        super().crop(tokens_to_remove)

    def begin(self, count: int) -> None:
        """Remember what a call of the model with so many tokens must leave as it is, should it fail."""
        self.request.forget()
        self.settle()  # after a call that ended without a word, by Ctrl-C for one
        if self.torn:
            raise InputError(
                "a call failed half way, and what some layers took in could not be taken back",
                hint="run the whole text through a fresh cache",
            )
        others = [(layer, dict(vars(layer))) for layer in self.layers if not isinstance(layer, SlotLayer)]
        self._began = [_extent(layer) for layer in self.slot_layers], others
        self._due = self.length + count

    def end(self) -> None:
        """Let the call stand, if all layers took its tokens in."""
        if self.request.clock is None:
            for layer in self.slot_layers:
                if layer.evicting.length != self._due:
                    k, have = layer.evicting.layer, layer.evicting.length
                    self.settle()
                    raise InputError(
                        f"after a call layer {k} holds {have} tokens of {self._due}, so it used another cache or none",
                        hint="gradient checkpointing in training mode turns caches off: call model.eval()",
                    )
        self._began = None

    def settle(self) -> None:
        """Go back to where a call began that failed half way; where that is impossible, refuse to go on."""
        began, self._began = self._began, None
        if self.request.clock is not None:
            self.torn |= began is not None  # steady steps overwrite what they cannot give back
            return
        if began is None:
            self.torn |= len({layer.evicting.length for layer in self.slot_layers}) > 1
            return
        start = began[0][0][0]
        if not start:
            self.reset()
            return
        for layer, extent in zip(self.slot_layers, began[0], strict=True):
            slots, more = layer.evicting.slots, layer.evicting.length - start
            if slots is not None and 0 < more <= slots.undoable:
                layer.evicting.undo(more)
            self.torn |= _extent(layer) != extent
        for other, held in began[1]:
            # These make new tensors of old ones; what writes into them cannot go back.
            self.torn |= not isinstance(other, DynamicLayer | DummyLayer)
            vars(other).update(held)

    def reset(self) -> None:
        super().reset()
        self.torn, self._began, self.request.recording = False, None, False

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on from here."""
        request = self.request
        request.check_movable()
        return {
            "prompt": request.prompt, "planned": request.planned,
            "layers": [layer.evicting.state_dict() for layer in self.slot_layers],
            "windows": [_window_state(layer) for layer in self.layers if not isinstance(layer, SlotLayer)],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        if len(state["layers"]) != len(self.slot_layers):
            raise InputError(
                f"the state has {len(state['layers'])} layers, this cache {len(self.slot_layers)}",
                hint="load it into a cache of the model it was saved from",
            )
        self.expect(state["prompt"], state["planned"])
        self.torn, self._began = False, None
        for layer, saved in zip(self.slot_layers, state["layers"], strict=True):
            layer.evicting.load_state_dict(saved)
            layer.is_initialized = True
        for layer, saved in zip(
            (layer for layer in self.layers if not isinstance(layer, SlotLayer)), state["windows"], strict=True
        ):
            _set_window(layer, saved)


def _window_state(layer: Any) -> dict[str, Any]:
    """Return what a layer with a window holds; nothing of one that holds nothing of its own."""
    if isinstance(layer, DummyLayer):
        return {}
    if type(layer) is not DynamicSlidingWindowLayer:
        raise InputError(
            f"a cache with a {type(layer).__name__} cannot be saved", hint="save the tokens and run them again"
        )
    return {"seen": layer.cumulative_length, "keys": layer.keys.clone(), "values": layer.values.clone()}


def _set_window(layer: Any, state: dict[str, Any]) -> None:
    if state:
        layer.lazy_initialization(state["keys"], state["values"])
        layer.keys, layer.values = state["keys"].clone(), state["values"].clone()
        layer.cumulative_length = state["seen"]


def _extent(layer: SlotLayer) -> tuple[int, list[int] | None]:
    """Return what shows whether a layer took something in."""
    slots = layer.evicting.slots
    return layer.evicting.length, None if slots is None else list(slots.filled)


@contextmanager
def settled(cache: SlotCache) -> Iterator[None]:
    """Leave a cache as it was before a call that fails half way."""
    try:
        yield
    except BaseException:
        link.clear()
        cache.settle()
        raise
