"""A model and a tokenizer of a few thousand numbers, made on the spot; and the real weights where they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def tiny_model(folder: Path, *, seed: int = 0, context: int = 512) -> Path:
    """Write a random Llama whose tokens are bytes, and return its folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: k + 2 for k, letter in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}assistant:"
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, bos_token_id=0, eos_token_id=None, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    # Larger weights give attention something to choose between.
    for weight in model.parameters():
        weight.data *= 3.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def smollm2_folder() -> Path:
    """Return the folder of the real weights, or skip the test and say why."""
    from vitalfew.generate.weights import _cached

    folder = Path(os.environ.get("VITALFEW_SMOLLM2") or _cached())
    if not (folder / "config.json").is_file():
        pytest.skip(f"no SmolLM2 weights: set VITALFEW_SMOLLM2, or run `vitalfew demo generate` once ({folder})")
    return folder
