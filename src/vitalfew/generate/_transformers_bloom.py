"""Bloom: ALiBi whose bias is added as it is.

The model itself makes the bias in the dtype of its weights, which in half precision has steps of several positions in
a long text; slots make it in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

from vitalfew.generate._transformers_attention import attend_module
from vitalfew.generate.scores import Logits

__all__ = ["methods"]


def methods(module: torch.nn.Module) -> dict[str, Callable[..., Any]]:
    """Return the methods that a module gets."""
    return {"forward": _attention} if isinstance(module, BloomAttention) else {}


@lru_cache(maxsize=8)
def _slopes(heads: int, device: torch.device) -> torch.Tensor:
    two = torch.ones((1, 2), dtype=torch.int64, device=device)
    slopes: torch.Tensor = build_alibi_tensor(two, heads, torch.float32)[:, 0, 1]
    return slopes


def _attention(
    self: Any, hidden_states: torch.Tensor, residual: torch.Tensor, alibi: torch.Tensor,
    attention_mask: torch.Tensor | None, layer_past: Any = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    query, key, value = self._reshape(self.query_key_value(hidden_states))
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    form = Logits(self.inv_norm_factor, slopes=_slopes(self.num_heads, query.device))
    dropout = self.attention_dropout.p if self.training else 0.0
    out = attend_module(self, query, key, value, attention_mask, form, dropout)
    out = functional.dropout(self.dense(out.flatten(2)), self.hidden_dropout, self.training)
    return residual + out, None
