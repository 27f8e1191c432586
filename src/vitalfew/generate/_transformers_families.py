"""Which models of transformers can generate from slots, and what there is to know of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vitalfew.core.errors import InputError
from vitalfew.generate.families import ADAPTED, SEEN

__all__ = ["check_model", "head_shape", "position_limit", "slot_layers", "supported", "window_tokens"]

VERSIONS = ((5, 23), (5, 23))
"""The first and the last version of transformers whose caches are known."""

_KINDS = ("full_attention", "sliding_attention", "chunked_attention", "conv", "linear_attention", "dummy")


def check_model(model: PreTrainedModel) -> None:
    """Raise, with the reason, where a model cannot be served."""
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if not VERSIONS[0] <= version <= VERSIONS[1]:
        low, high = (".".join(map(str, v)) for v in VERSIONS)
        raise InputError(
            f"transformers {transformers.__version__} was never tested here",
            hint=f"install transformers {low} to {high}",
        )
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"a model of transformers is needed, got {type(model).__name__}", hint="pass what from_pretrained returned"
        )
    if not callable(getattr(model, "generate", None)):
        raise InputError(f"{type(model).__name__} does not generate", hint="load it with AutoModelForCausalLM")
    config = model.config.get_text_config(decoder=True)
    reason = _of_class(type(model), config.model_type) or _of_config(config)
    if reason:
        raise InputError(f"{type(model).__name__} ({config.model_type}) {reason[0]}", hint=reason[1])


def supported(family: str | PreTrainedConfig) -> str | None:
    """Return how a model type or a configuration is served, None where it is not.

    Examples
    --------
    >>> supported("llama"), supported("gptj"), supported("t5")
    ('registry', 'adapter', None)
    """
    if isinstance(family, str) and family not in CONFIG_MAPPING:
        return None
    kind = CONFIG_MAPPING[family] if isinstance(family, str) else type(family)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    if isinstance(family, PreTrainedConfig) and _of_config(family.get_text_config(decoder=True)):
        return None
    if _of_class(MODEL_FOR_CAUSAL_LM_MAPPING[kind], kind.model_type):
        return None
    if kind.model_type in ADAPTED:
        return "adapter"
    return "registry" if kind.model_type in SEEN else "registry, untested"


def _of_class(model: type[PreTrainedModel], family: str) -> tuple[str, str] | None:
    """Return why a class cannot be served and what to do, or None."""
    if family in ADAPTED or model._can_set_attn_implementation():
        return None
    known = ", ".join((*SEEN, *ADAPTED))
    return "does not take its attention from transformers' registry, so its cache could not evict", f"tested: {known}"


def _of_config(config: PreTrainedConfig) -> tuple[str, str] | None:
    """Return why a configuration cannot be served and what to do, or None."""
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        return "attends to another sequence", "only decoders can be served"
    causal = getattr(config, "is_causal", True)
    # Some decoders say of themselves that they are none.
    if not causal or not (getattr(config, "is_decoder", True) or config.model_type in SEEN):
        return "attends to later tokens", "only causal models can be served"
    if getattr(config, "kv_lora_rank", None) is not None:
        return "keeps latents instead of keys and values", "its cache is small already"
    if getattr(config, "kv_sharing_modes", None) is not None or getattr(config, "num_kv_shared_layers", None):
        return "shares keys between layers, which is not supported", "use its full cache"
    kinds = get_layer_types_and_kwargs(config)[0]
    if strange := sorted(set(kinds) - set(_KINDS)):
        return f"has layers of the kind {', '.join(strange)}", "use its full cache"
    if "full_attention" not in kinds:
        return "has no layer with full attention: nothing grows", "use its own cache"
    return None


def slot_layers(config: PreTrainedConfig) -> list[int]:
    """Return the layers whose keys and values grow with the text."""
    kinds = get_layer_types_and_kwargs(config.get_text_config(decoder=True))[0]
    return [k for k, kind in enumerate(kinds) if kind == "full_attention"]


def window_tokens(config: PreTrainedConfig) -> int:
    """Return how many tokens a row has in all layers with a window, once each is full."""
    kwargs = get_layer_types_and_kwargs(config.get_text_config(decoder=True))[1]
    return sum(each["sliding_window"] - 1 for each in kwargs if "sliding_window" in each)


def head_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Return how many KV heads a layer stores, and the numbers in a key and in a value of each."""
    queries = config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or queries
    if config.model_type == "falcon":
        heads = config.num_kv_heads if config.new_decoder_architecture or not config.multi_query else 1
    elif getattr(config, "multi_query", False):
        heads = 1
    size = getattr(config, "head_dim", None) or config.hidden_size // queries
    biased = config.model_type == "falcon" and config.alibi  # its keys carry their ALiBi
    return heads, size + (queries // heads if biased else 0), size


def position_limit(model: PreTrainedModel) -> int | None:
    """Return how many tokens a table of positions has room for; None where positions are computed."""
    found: list[tuple[str, Any]] = [*model.named_modules(), *model.named_buffers()]
    for path, what in found:
        name = path.rpartition(".")[2]
        if isinstance(what, (torch.nn.Embedding, torch.Tensor)) and (name == "wpe" or "position" in name):
            return int(model.config.get_text_config(decoder=True).max_position_embeddings)
    return None
