"""Models of many families, of a few thousand random numbers each."""

from __future__ import annotations

from typing import Any

import torch

_TOKENS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_SIZE = _TOKENS | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256,
}  # fmt: skip
_GROUPED = _SIZE | {"num_key_value_heads": 2}
_GPT = _TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_MPT = _TOKENS | {"n_layers": 2, "max_seq_len": 256, "use_cache": True}
_STEEP = {"hidden_size": 64, "num_attention_heads": 16}  # with which no slope of ALiBi is a round number
_MIXED = {"head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", _GROUPED | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", _GROUPED | {"head_dim": 8}),
    "gemma2": ("Gemma2Config", _GROUPED | _MIXED | {"query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", _GROUPED | _MIXED | {"query_pre_attn_scalar": 8}),
    "mixtral": ("MixtralConfig", _GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None}),
    "smollm3": ("SmolLM3Config", _GROUPED),
    "lfm2": ("Lfm2Config", _GROUPED | {"layer_types": ["conv", "full_attention"]}),
    "phi": ("PhiConfig", _GROUPED),
    "phi3": ("Phi3Config", _GROUPED),
    "gpt2": ("GPT2Config", _GPT),
    "bigcode": ("GPTBigCodeConfig", _GPT),
    "opt": ("OPTConfig", _SIZE | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "neox": ("GPTNeoXConfig", _SIZE),
    "starcoder2": ("Starcoder2Config", _GROUPED | {"sliding_window": None}),
    "cohere": ("CohereConfig", _GROUPED | {"logit_scale": 1.0}),
    "olmo2": ("Olmo2Config", _GROUPED),
    "granite": ("GraniteConfig", _GROUPED),
    "gpt-oss": ("GptOssConfig", _GROUPED | _MIXED | {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "gptj": ("GPTJConfig", _GPT | {"rotary_dim": 4}),
    "codegen": ("CodeGenConfig", _GPT | {"rotary_dim": 4}),
    "mpt": ("MptConfig", _MPT | {"d_model": 32, "n_heads": 4}),
    "mpt-6": ("MptConfig", _MPT | {"d_model": 48, "n_heads": 6}),
    "bloom": ("BloomConfig", _TOKENS | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "bloom-6": ("BloomConfig", _TOKENS | {"hidden_size": 48, "n_layer": 2, "n_head": 6}),
    "falcon": ("FalconConfig", _SIZE | {"multi_query": True}),
    "falcon-heads": ("FalconConfig", _SIZE | {"multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon-new": ("FalconConfig", _SIZE | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": ("FalconConfig", _SIZE | _STEEP | {"multi_query": False, "alibi": True}),
    "falcon-alibi-1": ("FalconConfig", _SIZE | {"multi_query": True, "alibi": True}),
}  # fmt: skip
"""Name to the class of the configuration and its settings."""


def make(name: str, *, seed: int = 0, attention: str | None = None, **more: Any) -> Any:
    """Return a random model in which attention has something to choose between."""
    import transformers

    kind, settings = FAMILIES[name]
    config = getattr(transformers, kind)(**settings | more)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        how = {} if attention is None else {"attn_implementation": attention}
        model = transformers.AutoModelForCausalLM.from_config(config, **how).eval()
        for weight in model.parameters():
            # Norms and biases keep their sizes; where biases start at 0, they would hide a fault.
            weight.data = weight.data * 3.0 if weight.ndim > 1 else weight.data + 0.1 * torch.randn_like(weight)
    return model


def padded(rows: int, length: int, step: int = 3, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask of rows of which each has `step` more tokens of padding, on the left, than the one before."""
    ids = torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(length) >= step * torch.arange(rows)[:, None]).long()
    return ids * mask, mask
