"""Bytes of a cache as transformers holds them, and the ceiling of a step's speed that follows from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitalfew.core import InputError
from vitalfew.generate.ceiling import KVShape, decode_ceiling, foretell, weight_bytes

SMOLLM2 = KVShape(layers=30, heads=3, head_dim=64, element_size=4)
WEIGHTS = 538_060_032
"""Of SmolLM2-135M in float32: 134,515,008 numbers, the output layer shared with the embedding."""


def small(family: str) -> Any:
    """Return a tiny random model of a family."""
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 32, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6}
    grouped = {**common, "intermediate_size": 16, "num_key_value_heads": 2}
    configs = {
        "llama": lambda: transformers.LlamaConfig(**grouped),
        "qwen3": lambda: transformers.Qwen3Config(**grouped, head_dim=8),
        "mistral": lambda: transformers.MistralConfig(**grouped, sliding_window=6),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **grouped, head_dim=8, sliding_window=6,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        ),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=32, n_embd=24, n_layer=3, n_head=6),
        "gptj": lambda: transformers.GPTJConfig(vocab_size=32, n_embd=24, n_layer=3, n_head=6, rotary_dim=4),
        "opt": lambda: transformers.OPTConfig(**common, ffn_dim=16, word_embed_proj_dim=24),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**common, intermediate_size=16),
        "mpt": lambda: transformers.MptConfig(vocab_size=32, d_model=24, n_layers=3, n_heads=6),
        "bloom": lambda: transformers.BloomConfig(vocab_size=32, hidden_size=24, n_layer=3, n_head=6),
        "falcon": lambda: transformers.FalconConfig(**common, multi_query=True, new_decoder_architecture=False),
        "falcon new": lambda: transformers.FalconConfig(**common, num_kv_heads=2, new_decoder_architecture=True),
        "falcon plain": lambda: transformers.FalconConfig(**common, multi_query=False, new_decoder_architecture=False),
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(configs[family]()).eval()


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen3", "mistral", "gemma3", "gpt2", "gptj", "opt", "gpt_neox", "mpt", "bloom", "falcon", "falcon new",
     "falcon plain"],
)  # fmt: skip
def test_bytes_equal_what_the_cache_holds(family: str) -> None:
    from transformers import DynamicCache

    model = small(family)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.arange(20).view(2, 10) % 32, past_key_values=cache)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert KVShape.of(model.config, 4).full_bytes(2, 10) == held


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_are_counted_without_tables_of_single_rows(family: str) -> None:
    model = small(family)
    numbers = sum(p.numel() for p in model.parameters())
    tied = family == "gpt2"
    tables = 1024 * 24 if tied else 32 * 24  # learned positions, or tokens
    assert weight_bytes(model) == 4 * (numbers - tables)


@pytest.mark.parametrize(
    ("weights", "batch", "length", "per_token", "bounds"),
    [
        (0.54e9, 1, 7168, 2 * 30 * 3 * 64 * 4, (1.23, 1.44)),
        (0.54e9, 4, 4096, 2 * 30 * 3 * 64 * 4, (1.41, 1.87)),
        (16e9, 32, 8192, 2 * 32 * 8 * 128 * 2, (1.51, 2.19)),
        (13.3e9, 16, 8192, 2 * 32 * 32 * 128 * 2, (1.72, 3.0)),
    ],
)
def test_the_table_of_ceilings(
    weights: float, batch: int, length: int, per_token: int, bounds: tuple[float, float]
) -> None:
    for share, bound in zip((0.5, 0.2), bounds, strict=True):
        assert decode_ceiling(weights, batch, length, share * length, per_token) == pytest.approx(bound, abs=0.035)


def test_no_speed_to_gain_is_said_beforehand() -> None:
    ceiling = foretell(SMOLLM2, WEIGHTS, 1, 2048, 1024)
    assert ceiling.ratio == pytest.approx(1.08, abs=0.005)
    assert ceiling.declined is not None
    assert "weights are 85% of the bytes" in ceiling.declined.reason
    assert (ceiling.full, ceiling.kept) == (94_371_840, 47_185_920)
    paying = foretell(SMOLLM2, WEIGHTS, 4, 4096, 819)
    assert paying.declined is None
    assert paying.against(1.5).measured == 1.5
    assert paying.against(1.5).predicted == paying.ratio


@given(
    batch=st.integers(1, 64), length=st.integers(1, 10**5), slots=st.integers(1, 10**5),
    weights=st.integers(0, 10**11),
)  # fmt: skip
def test_laws(batch: int, length: int, slots: int, weights: int) -> None:
    ceiling = foretell(SMOLLM2, weights, batch, length, slots)
    assert 1 <= ceiling.ratio <= max(1.0, length / slots) + 1e-9
    expected = decode_ceiling(weights, batch, length, slots, SMOLLM2.bytes_per_token)
    assert ceiling.ratio == pytest.approx(expected)
    assert foretell(SMOLLM2, weights, batch + 1, length, slots).ratio >= ceiling.ratio - 1e-12
    assert foretell(SMOLLM2, weights, batch, length, slots + 1).ratio <= ceiling.ratio + 1e-12
    assert (ceiling.declined is None) == (ceiling.ratio >= 1.1)


def test_what_cannot_be_counted_is_refused() -> None:
    from types import SimpleNamespace

    plain = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8, "model_type": "odd"}
    with pytest.raises(InputError, match="odd holds latent vectors"):
        KVShape.of(SimpleNamespace(**plain, kv_lora_rank=4), 2)
    with pytest.raises(InputError, match="linear_attention"):
        KVShape.of(SimpleNamespace(**plain, layer_types=["linear_attention", "full_attention"]), 2)
    with pytest.raises(InputError, match="0 rows"):
        decode_ceiling(1, 0, 1, 1, 1)
    with pytest.raises(InputError, match="0 slots"):
        foretell(SMOLLM2, WEIGHTS, 1, 1, 0)
