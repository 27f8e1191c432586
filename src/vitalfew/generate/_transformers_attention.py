"""Attention and masks as transformers calls them, from a registry or in place of a model's own methods."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask

from vitalfew.core.errors import InputError
from vitalfew.generate.scores import Logits, attend_masked

if TYPE_CHECKING:
    from vitalfew.generate._transformers import SlotLayer

__all__ = ["attend_module", "link", "served", "slot_attention", "slot_mask"]


class _Link(threading.local):
    """Tells the attention function of a thread whose new tokens it was just given."""

    layer: SlotLayer | None = None
    key: torch.Tensor | None = None

    def hand_over(self, layer: SlotLayer, key: torch.Tensor) -> None:
        self.check()
        self.layer, self.key = layer, key

    def check(self) -> None:
        """Raise if nobody asked for the last tokens."""
        lost = self.layer
        if lost is not None:
            self.clear()
            raise InputError(
                f"the attention of layer {lost.evicting.layer} never asked for its slots, so nothing would be evicted",
                hint="was another implementation of attention set meanwhile? Else this model cannot be served",
            )

    def claim(self, key: torch.Tensor) -> SlotLayer | None:
        layer, self.layer = self.layer, None
        known, self.key = self.key, None
        return layer if known is key else None

    def clear(self) -> None:
        self.layer = self.key = None


link = _Link()
served: WeakSet[torch.nn.Module] = WeakSet()
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
    if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False:
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
    layer = link.claim(key)
    if layer is not None:
        return attend(layer, query, key, value, attention_mask, form)
    if attention_mask is not None and attention_mask.ndim == 4:  # a sliding layer
        return attend_masked(query, key, value, form, attention_mask)
    rows, count, total = query.shape[0], query.shape[2], key.shape[2]
    if total != count and module in served:
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
            return layer.evicting.attend(query.detach(), key.detach(), value.detach(), mask, form)
    except BaseException:
        link.clear()
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
