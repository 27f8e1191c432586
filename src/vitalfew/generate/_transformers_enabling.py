"""Enabling a model: its attention goes through slots from then on, until all that is taken back."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from vitalfew.core.errors import InputError
from vitalfew.generate._transformers import SlotCache
from vitalfew.generate._transformers_attention import link, served, slot_attention, slot_mask
from vitalfew.generate._transformers_families import position_limit
from vitalfew.generate.families import ADAPTED

__all__ = ["NAME", "enable"]

NAME = "vitalfew_slots"
"""Under which the attention and mask functions are registered, while any model uses them."""


def enable(model: PreTrainedModel) -> ExitStack:
    """Let a model's attention go through `slot_attention`; closing what it returns undoes that."""
    if model in served:
        raise InputError("this model is enabled already", hint="undo() the other KeyTokens, or leave its `with` block")
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
            _adapt(model, stack)
        limit, names = position_limit(model), list(inspect.signature(model.forward).parameters)
        stack.callback(model.register_forward_pre_hook(partial(_before_call, limit, names), with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(partial(_after_call, names), with_kwargs=True).remove)
        served.update(model.modules())
        return stack.pop_all()


def _retire(model: PreTrainedModel) -> None:
    """Forget a model, and after the last one the functions in transformers' registries."""
    for module in model.modules():
        served.discard(module)
    if not served:
        AttentionInterface._global_mapping.pop(NAME, None)
        AttentionMaskInterface._global_mapping.pop(NAME, None)


def _adapt(model: PreTrainedModel, stack: ExitStack) -> None:
    """Replace methods of a model's modules, on the instances; the stack takes them off.

    A family's file has ``methods(module)``, which says which of a module's methods are replaced, and by what.
    """
    family = importlib.import_module(f"vitalfew.generate.{ADAPTED[model.config.model_type]}")
    replaced = 0
    for module in model.modules():
        for name, function in family.methods(module).items():
            _set_method(module, name, function, stack)
            replaced += 1
    assert replaced, "an adapter fits its family"


def _set_method(module: torch.nn.Module, name: str, function: Any, stack: ExitStack) -> None:
    """Give one instance another method; what the instance itself had under that name comes back."""
    own = module.__dict__
    if name in own:
        stack.callback(own.__setitem__, name, own[name])
    else:
        stack.callback(own.pop, name, None)
    own[name] = MethodType(function, module)


def _before_call(
    limit: int | None, names: Sequence[str], model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse what a call of the model cannot have with slots, and remember where it began."""
    link.clear()
    given = dict(zip(names, args, strict=False)) | kwargs
    if given.get("output_attentions"):
        raise InputError("attention weights are not kept", hint="leave out output_attentions")
    if given.get("cache") is not None:
        raise InputError("continuous batching has a cache of pages, which evicts nothing", hint="use `vitalfew serve`")
    cache, mask = given.get("past_key_values"), given.get("attention_mask")
    if not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        mask = None
    if not isinstance(cache, SlotCache):
        return
    new = next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)
    if new is None or new.ndim < 2 or not new.numel():
        said = "nothing" if new is None else f"the shape {tuple(new.shape)}"
        raise InputError(f"the model was called without tokens, with {said}", hint="pass input_ids, (rows, tokens)")
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if len(cache) != layers:
        raise InputError(
            f"this cache has {len(cache)} layers, the model {layers}", hint="use a cache of this model's KeyTokens"
        )
    tokens = cache.length + new.shape[1]
    if mask is not None and cache.length < (cache.request.prompt or 0) <= tokens:
        _check_ends(mask[:, : cache.request.prompt])
    if limit is not None and tokens > limit:
        tokens = int(mask.sum(1).max()) if mask is not None else tokens  # padding takes no position
        if tokens > limit:
            raise InputError(
                f"{tokens} tokens are more than the {limit} positions that this model knows",
                hint="shorten the prompt or max_new_tokens",
            )
    cache.begin(new.shape[1])


def _after_call(
    names: Sequence[str], model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> None:
    link.check()
    cache = (dict(zip(names, args, strict=False)) | kwargs).get("past_key_values")
    if isinstance(cache, SlotCache):
        cache.end()


def _check_ends(mask: torch.Tensor) -> None:
    """Refuse rows whose prompt ends with padding: what follows would be foretold from the padding."""
    if bool(mask[:, -1].all()):
        return
    row = mask[:, -1].bool().tolist().index(False)
    if not mask[row].any():
        raise InputError(f"row {row} is all padding", hint="leave rows without tokens out")
    raise InputError(f"the prompt of row {row} ends with padding", hint="pad on the left: padding_side='left'")
