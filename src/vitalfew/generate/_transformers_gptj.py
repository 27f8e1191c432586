"""GPT-J and CodeGen: rotary positions, logits in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.models.codegen.modeling_codegen import CodeGenAttention
from transformers.models.gptj.modeling_gptj import GPTJAttention

from vitalfew.generate._transformers_attention import attend_module
from vitalfew.generate.scores import Logits

__all__ = ["methods"]


def methods(module: torch.nn.Module) -> dict[str, Callable[..., Any]]:
    """Return the methods that a module gets."""
    if isinstance(module, GPTJAttention):
        # The variant for flash attention never calls `_attn`.
        return {"_attn": _attn} | ({} if type(module) is GPTJAttention else {"forward": GPTJAttention.forward})
    return {"_attn": _attn} if isinstance(module, CodeGenAttention) else {}


def _attn(
    self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, None]:
    dropout = self.attn_dropout.p if self.training else 0.0
    query = query.to(value.dtype)  # CodeGen turns queries in float32
    out = attend_module(self, query, key, value, attention_mask, Logits(1 / self.scale_attn), dropout)
    return out.transpose(1, 2), None
