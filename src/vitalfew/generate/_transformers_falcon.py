"""Falcon: rotary positions, or ALiBi.

Its ALiBi is a bias of the key alone, rounded to bfloat16 and scaled as the products are. Such a bias is one more
number of a key, which the query's matching number, 1, picks out: it stays with its key in the slot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from vitalfew.generate._transformers_attention import attend_module
from vitalfew.generate.scores import Logits

__all__ = ["methods"]


def methods(module: torch.nn.Module) -> dict[str, Callable[..., Any]]:
    """Return the methods that a module gets."""
    return {"forward": _attention} if isinstance(module, FalconAttention) else {}


def _attention(
    self: Any, hidden_states: torch.Tensor, alibi: torch.Tensor | None, attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None, layer_past: Any = None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    query, key, value = (part.transpose(1, 2) for part in self._split_heads(self.query_key_value(hidden_states)))
    # Where heads share keys, the model repeats them for each; one copy is enough.
    each = self.num_heads // self.num_kv_heads if self.new_decoder_architecture else 1
    key, value = key[:, ::each], value[:, ::each]
    if alibi is None:
        assert position_embeddings is not None
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    else:
        query, key = _with_bias(query, key, alibi)
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    form = Logits(self.inv_norm_factor)
    dropout = self.attention_dropout.p if self.training else 0.0
    out = attend_module(self, query, key, value, attention_mask, form, dropout)
    return self.dense(out.flatten(2)), None


def _with_bias(query: torch.Tensor, key: torch.Tensor, alibi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries and keys with a number more for each query head of a KV head."""
    rows, heads, count, _ = query.shape
    group = heads // key.shape[1]
    bias = alibi.reshape(rows, key.shape[1], group, -1)[..., -count:].transpose(2, 3)
    pick = torch.eye(group, dtype=query.dtype, device=query.device).repeat(key.shape[1], 1)
    pick = pick[None, :, None].expand(rows, -1, count, -1)
    return torch.cat([query, pick], -1), torch.cat([key, bias.to(key.dtype)], -1)
