"""The slot cache as transformers knows it: a cache, an attention function and a mask function. No model is edited."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from vitalfew.core.errors import InputError
from vitalfew.generate._transformers_families import ADAPTED, position_limit
from vitalfew.generate.evicting import EvictingLayer
from vitalfew.generate.request import Plan, Request
from vitalfew.generate.scores import Logits, attend_masked

__all__ = ["NAME", "SlotCache", "SlotLayer", "attend_module", "enable", "settled"]

NAME = "vitalfew_slots"
"""Under which the attention and mask functions are registered, while any model uses them."""


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
        self.is_initialized = True
        _link.hand_over(self, key_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = self.evicting.physical
        return held + query_length, self.evicting.length - held

    def get_seq_length(self) -> int:
        return self.evicting.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        request = self.evicting.request
        self.evicting = EvictingLayer(self.evicting.layer, request)
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise InputError(f"cannot crop to {tokens_to_remove} tokens", hint="pass minus the tokens to remove")
        self.evicting.undo(-tokens_to_remove)
        if self.evicting.slots is not None:
            self.evicting.slots.forget_log()

    def activate_past_recording(self) -> None:
        self.evicting.request.recording = True

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.evicting.slots is not None:
            self.evicting.select_rows(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
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
        for layer in self.slot_layers:
            layer.cache = self

    @property
    def slot_layers(self) -> list[SlotLayer]:
        """The layers that hold slots."""
        return [layer for layer in self.layers if isinstance(layer, SlotLayer)]

    @property
    def length(self) -> int:
        """Tokens seen, padding included."""
        return self.slot_layers[0].get_seq_length()

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
        self.request.prompt, self.request.planned = prompt, planned

    def settle(self) -> None:
        """Bring all layers back to the tokens that all of them have seen, after a call that failed half way."""
        lengths = [layer.evicting.length for layer in self.slot_layers]
        if max(lengths) == min(lengths):
            return
        if not min(lengths):
            self.reset()
            return
        for layer in self.slot_layers:
            layer.evicting.undo(layer.evicting.length - min(lengths))

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on from here."""
        if any(not isinstance(layer, SlotLayer) for layer in self.layers):
            raise InputError("a cache with sliding layers cannot be saved", hint="save the tokens and run them again")
        request = self.request
        return {
            "prompt": request.prompt, "planned": request.planned,
            "layers": [layer.evicting.state_dict() for layer in self.slot_layers],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        if len(state["layers"]) != len(self.slot_layers):
            raise InputError(
                f"the state has {len(state['layers'])} layers, this cache {len(self.slot_layers)}",
                hint="load it into a cache of the model it was saved from",
            )
        self.expect(state["prompt"], state["planned"])
        for layer, saved in zip(self.slot_layers, state["layers"], strict=True):
            layer.evicting.load_state_dict(saved)
            layer.is_initialized = True


class _Link(threading.local):
    """Tells the attention function of a thread whose new tokens it was just given."""

    layer: SlotLayer | None = None
    key: torch.Tensor | None = None

    def hand_over(self, layer: SlotLayer, key: torch.Tensor) -> None:
        lost, self.layer, self.key = self.layer, layer, key
        if lost is not None:
            self.layer = self.key = None
            raise InputError(
                f"the attention of layer {lost.evicting.layer} never asked for its slots, so nothing would be evicted",
                hint="this model cannot be served; `vitalfew doctor` lists the families that can",
            )

    def claim(self, key: torch.Tensor) -> SlotLayer | None:
        layer, self.layer = self.layer, None
        known, self.key = self.key, None
        return layer if known is key else None

    def clear(self) -> None:
        self.layer = self.key = None


_link = _Link()
_served: WeakSet[torch.nn.Module] = WeakSet()
"""Modules of the models that are enabled: a configuration may be shared with models that are not."""


def slot_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
    softcap: float | None = None, s_aux: torch.Tensor | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attend over the slots of the layer whose `update` gave these keys; without one, over the keys themselves."""
    name = type(module).__name__
    if kwargs.get("position_bias") is not None:
        raise InputError(f"{name} adds a bias of its own", hint="this model cannot be served")
    if not kwargs.get("is_causal", getattr(module, "is_causal", True)):
        raise InputError(f"{name} does not attend to earlier tokens alone", hint="only decoders of text can be served")
    form = Logits(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sinks=s_aux)
    return attend_module(module, query, key, value, attention_mask, form, dropout), None


def attend_module(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, form: Logits, dropout: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Do what `slot_attention` does, once it is known how logits are made; ``(B, n, Hq, d)``."""
    if dropout:
        raise InputError("slots are for generation, but the model is in training mode", hint="call model.eval() first")
    layer = _link.claim(key)
    if layer is not None:
        return attend(layer, query, key, value, attention_mask, form)
    if attention_mask is not None and attention_mask.ndim == 4:  # a sliding layer
        return attend_masked(query, key, value, form, attention_mask)
    rows, count, total = query.shape[0], query.shape[2], key.shape[2]
    if total != count and module in _served:
        raise InputError(
            "these keys come from another cache, which evicts nothing",
            hint="pass past_key_values=few.cache(), or none to generate()",
        )
    # No cache at all, or another model that shares this one's configuration: plain attention, with its gradients.
    at = torch.arange(total, device=key.device)
    mask = (at[None] <= at[-count:, None])[None, None]
    if attention_mask is not None:
        # A query that is padding sees itself alone, so that nothing is divided by zero.
        mask = mask & attention_mask[:, None, None] | (at[None] == at[-count:, None])
    mask = mask.expand(rows, -1, -1, -1)
    if form.slopes is not None:
        bias = form.slopes.to(query.dtype)[:, None, None] * (at[None] - at[-count:, None])
        mask, form = torch.where(mask, bias, torch.finfo(query.dtype).min), Logits(form.scale)
    return attend_masked(query, key, value, form, mask)


def attend(
    layer: SlotLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    form: Logits,
) -> torch.Tensor:
    """Put new tokens into a layer's slots and attend; if that fails, all layers are as before the call."""
    if mask is not None and mask.ndim != 2:
        raise InputError(
            f"the attention mask has {mask.ndim} dimensions",
            hint="pass a mask of 0 and 1 over all tokens, (rows, tokens)",
        )
    try:
        with torch.no_grad():
            return layer.evicting.attend(query, key, value, mask, form)
    except BaseException:
        _link.clear()
        if layer.cache is not None:
            layer.cache.settle()
        raise


def slot_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0,
    mask_function: Any = causal_mask_function, attention_mask: torch.Tensor | None = None,
    local_size: int | None = None, **kwargs: Any,
) -> torch.Tensor | None:  # fmt: skip
    """Return the padding of all tokens so far, and the whole mask for sliding layers."""
    if local_size is not None:
        kwargs["allow_is_causal_skip"] = False
        whole: torch.Tensor | None = sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size, **kwargs
        )
        return whole
    if mask_function is not causal_mask_function:
        raise InputError(
            "the model wants more than a causal mask with padding (packed sequences, images, or a mask of its own)",
            hint="generate from padded rows of text",
        )
    return attention_mask


def enable(model: PreTrainedModel) -> ExitStack:
    """Let a model's attention go through `slot_attention`; closing what it returns undoes that."""
    if model in _served:
        raise InputError("this model is enabled already", hint="undo() the other KeyTokens, or leave its `with` block")
    from vitalfew.generate._transformers_adapters import adapt

    text = model.config.get_text_config(decoder=True)
    owners = (model.config, text, *(m.config for m in model.modules() if isinstance(m, PreTrainedModel)))
    # What sees pictures or hears has a configuration of another type, and attends both ways.
    configs = {
        id(config): config for config in owners if config.model_type in (model.config.model_type, text.model_type)
    }
    if any(config._attn_implementation_internal == NAME for config in configs.values()):
        raise InputError(
            "this model shares its configuration with one that is enabled, or was copied from it meanwhile",
            hint="undo() the other KeyTokens first",
        )
    with ExitStack() as stack:
        stack.callback(_retire, model)
        AttentionInterface.register(NAME, slot_attention)
        AttentionMaskInterface.register(NAME, slot_mask)
        for config in configs.values():
            stack.callback(setattr, config, "_attn_implementation_internal", config._attn_implementation_internal)
            config._attn_implementation_internal = NAME
        if text.model_type in ADAPTED:
            adapt(model, stack)
        limit = position_limit(model)
        stack.callback(model.register_forward_pre_hook(partial(_check_call, limit), with_kwargs=True).remove)
        _served.update(model.modules())
        return stack.pop_all()


def _check_call(limit: int | None, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what a call of the model cannot have with slots."""
    if kwargs.get("output_attentions"):
        raise InputError("attention weights are not kept", hint="leave out output_attentions")
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if not isinstance(cache, SlotCache):
        return
    new = next(t for t in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None)
    tokens = cache.length + new.shape[1]
    if cache.length < (cache.request.prompt or 0) <= tokens and mask is not None and mask.ndim == 2:
        _check_ends(mask[:, : cache.request.prompt])
    if limit is None:
        return
    if tokens > limit and mask is not None and mask.ndim == 2:
        tokens = int(mask.sum(1).max())  # padding takes no position
    if tokens > limit:
        raise InputError(
            f"{tokens} tokens are more than the {limit} positions that this model knows",
            hint="shorten the prompt or max_new_tokens",
        )


def _check_ends(mask: torch.Tensor) -> None:
    """Refuse rows whose prompt ends with padding: what follows would be foretold from the padding."""
    if bool(mask[:, -1].all()):
        return
    row = mask[:, -1].bool().tolist().index(False)
    if not mask[row].any():
        raise InputError(f"row {row} is all padding", hint="leave rows without tokens out")
    raise InputError(f"the prompt of row {row} ends with padding", hint="pad on the left: padding_side='left'")


def _retire(model: PreTrainedModel) -> None:
    """Forget a model, and after the last one the functions in transformers' registries."""
    for module in model.modules():
        _served.discard(module)
    if not _served:
        AttentionInterface._global_mapping.pop(NAME, None)
        AttentionMaskInterface._global_mapping.pop(NAME, None)


@contextmanager
def settled(cache: SlotCache) -> Iterator[None]:
    """Leave a cache as it was before a call that fails half way."""
    try:
        yield
    except BaseException:
        _link.clear()
        cache.settle()
        raise
