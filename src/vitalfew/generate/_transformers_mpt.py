"""MPT: ALiBi by a token's own position, not by its place among the keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.models.mpt.modeling_mpt import MptAttention, MptModel

from vitalfew.generate._transformers_attention import attend_module
from vitalfew.generate.scores import Logits

__all__ = ["methods"]


def methods(module: torch.nn.Module) -> dict[str, Callable[..., Any]]:
    """Return the methods that a module gets."""
    if isinstance(module, MptAttention):
        return {"forward": _attention}
    return {"forward": _model} if isinstance(module, MptModel) else {}


def _model(
    self: MptModel, input_ids: torch.Tensor | None = None, past_key_values: Any = None,
    attention_mask: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """Run the model with a mask at any rate: it converts the one it makes without asking whether it got any."""
    new = input_ids if input_ids is not None else inputs_embeds
    if attention_mask is None and new is not None:
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        attention_mask = torch.ones((new.shape[0], seen + new.shape[1]), dtype=torch.bool, device=new.device)
    return type(self).forward(self, input_ids, past_key_values, attention_mask, inputs_embeds, **kwargs)


def _attention(
    self: Any, hidden_states: torch.Tensor, position_bias: torch.Tensor, past_key_values: Any = None,
    attention_mask: torch.Tensor | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    qkv = self.Wqkv(hidden_states)
    if self.clip_qkv:
        qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    shape = (*hidden_states.shape[:2], self.n_heads, self.head_dim)
    query, key, value = (part.reshape(shape).transpose(1, 2) for part in qkv.chunk(3, -1))
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, self.layer_idx)
    # The bias ends with 0 for the last key and minus a slope for the one before it.
    form = Logits(self.softmax_scale, slopes=-position_bias[:, 0, -2])
    dropout = self.attn_dropout_p if self.training else 0.0
    out = attend_module(self, query, key, value, attention_mask, form, dropout)
    return self.out_proj(out.flatten(2)), None
