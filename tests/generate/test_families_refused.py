"""What cannot be served is refused with its reason, and the next right call works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

from vitalfew.core.errors import InputError
from vitalfew.generate._transformers_families import head_shape, position_limit, supported
from vitalfew.generate.families import ADAPTED, SEEN
from vitalfew.generate.key_tokens import KeyTokens

from .families import FAMILIES, make, padded

GREEDY = {"max_new_tokens": 8, "do_sample": False}
_SMALL = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "pad_token_id": 0}


def _t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    )


def _deepseek() -> Any:
    return transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **_SMALL, intermediate_size=48, moe_intermediate_size=16, n_routed_experts=4, n_group=1, topk_group=1,
            num_experts_per_tok=1, first_k_dense_replace=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
            qk_nope_head_dim=4, v_head_dim=8,
        )
    )  # fmt: skip


def _mamba() -> Any:
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    )


def _gpt_neo() -> Any:
    return transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
            max_position_embeddings=64, window_size=8,
        )
    )  # fmt: skip


def _cross() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True)
    )


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (_t5, "attends to another sequence"),
        (_cross, "attends to another sequence"),
        (_deepseek, "latents"),
        (_mamba, "no layer with full attention|linear_attention|registry"),
        (_gpt_neo, "registry"),
        (lambda: make("mistral", sliding_window=16), "no layer with full attention"),
    ],
    ids=["t5", "cross", "deepseek", "mamba", "gpt-neo", "sliding"],
)
def test_models_that_cannot_be_served(build: Callable[[], Any], why: str) -> None:
    model = build()
    implementation = model.config._attn_implementation
    with pytest.raises(InputError, match=why) as caught:
        KeyTokens(model, 0.5)
    assert caught.value.hint
    assert type(model).__name__ in str(caught.value)
    assert "generate" not in model.__dict__
    assert model.config._attn_implementation == implementation


@pytest.fixture(scope="module")
def model() -> Any:
    return make("llama")


def _works(model: Any, few: KeyTokens) -> None:
    ids, mask = padded(2, 24)
    model.generate(ids, attention_mask=mask, **GREEDY)
    assert few.generations[-1].nbytes < few.generations[-1].full_nbytes


IDS, MASK = padded(2, 24)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda m: m.generate(IDS, attention_mask=MASK, past_key_values=DynamicCache(), **GREEDY), "DynamicCache"),
        (lambda m: m.generate(IDS, attention_mask=MASK, cache_implementation="static", **GREEDY), "static"),
        (lambda m: m.generate(IDS, attention_mask=MASK, use_cache=False, **GREEDY), "use_cache=False"),
        (lambda m: m.generate(IDS, attention_mask=MASK * torch.tensor([[1], [0]]), **GREEDY), "row 1 is all padding"),
        (lambda m: m.generate(IDS, attention_mask=MASK.flip(1), **GREEDY), "row 1 .*ends with padding"),
        (lambda m: m.generate(IDS, attention_mask=MASK, output_attentions=True, **GREEDY), "attention weights"),
    ],
    ids=["dynamic", "static", "no-cache", "all-padding", "right", "weights"],
)
def test_calls_of_generate_that_cannot_be(model: Any, call: Callable[[Any], Any], why: str) -> None:
    with KeyTokens(model, 0.5, min_length=0) as few:
        with pytest.raises(InputError, match=why) as caught:
            call(model)
        assert caught.value.hint
        _works(model, few)


def test_calls_of_the_model_that_cannot_be(model: Any) -> None:
    ids = IDS.clamp(min=2)
    with KeyTokens(model, 0.5, min_length=0) as few, torch.no_grad():
        cache = few.cache()
        first = model(ids, past_key_values=cache).logits
        held = cache.nbytes
        for wrong, why in [
            (lambda: model(ids[:1, :1], past_key_values=cache), "holds 2 rows"),
            (lambda: model(ids[:, :1], attention_mask=torch.ones(2, 9), past_key_values=cache), "mask has shape"),
            (lambda: model(ids[:, :1], attention_mask=torch.zeros(2, 1, 1, 25), past_key_values=cache), "4 dimensions"),
        ]:
            with pytest.raises(InputError, match=why):
                wrong()
            assert cache.nbytes == held
            assert cache.length == 24
        expected = model(ids[:, :1], past_key_values=cache).logits
        again = few.cache()
        assert model(ids, past_key_values=again).logits.equal(first)
        assert model(ids[:, :1], past_key_values=again).logits.equal(expected)
        full = DynamicCache(config=model.config)
        model(ids, past_key_values=full)
        with pytest.raises(InputError, match="another cache"):
            model(ids[:, :1], past_key_values=full)
        _works(model, few)


def test_another_dtype_or_size_on_a_cache() -> None:
    model = make("llama")
    ids = IDS.clamp(min=2)
    with KeyTokens(model, 0.5, min_length=0) as few, torch.no_grad():
        cache = few.cache()
        model(ids, past_key_values=cache)
        model.to(torch.bfloat16)
        with pytest.raises(InputError, match=r"float32.*bfloat16"):
            model(ids[:, :1], past_key_values=cache)
        model.float()
        model(ids[:, :1], past_key_values=cache)


def test_training_with_dropout() -> None:
    model = make("llama", attention_dropout=0.1).train()
    with KeyTokens(model, 0.5, min_length=0) as few:
        with pytest.raises(InputError, match="training mode"):
            model.generate(IDS, attention_mask=MASK, **GREEDY)
        model.eval()
        _works(model, few)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gptj", "codegen"])
def test_positions_past_the_end_of_the_table(name: str) -> None:
    model = make(name, **{"max_position_embeddings" if name == "opt" else "n_positions": 32})
    ids, mask = padded(2, 24)
    assert position_limit(model) == 32
    with KeyTokens(model, 0.5, min_length=0) as few:
        model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)  # the last is never fed
        with pytest.raises(InputError, match=r"33 tokens .* 32 positions"):
            model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
        # Padding takes no position.
        model.generate(ids[1:], attention_mask=mask[1:], max_new_tokens=12, do_sample=False)
        assert len(few.generations) == 2


def test_computed_positions_have_no_end() -> None:
    assert position_limit(make("llama")) is None
    assert position_limit(make("mpt")) is None
    model = make("mpt", max_seq_len=32)
    ids = padded(1, 24)[0].clamp(min=2)
    with KeyTokens(model, 0.5, min_length=0):
        assert model.generate(ids, max_new_tokens=20, do_sample=False).shape == (1, 44)


def test_what_is_served() -> None:
    tried = {getattr(transformers, kind)(**settings).model_type for kind, settings in FAMILIES.values()}
    assert tried == {*SEEN, *ADAPTED}
    for kind, settings in FAMILIES.values():
        config = getattr(transformers, kind)(**settings)
        how = supported(config)
        assert how == ("registry" if config.model_type in SEEN else "adapter")
        assert supported(config.model_type) == how
    assert supported("helium") == "registry, untested"
    for family in ("t5", "gpt_neo", "no such model"):
        assert supported(family) is None
    assert supported(transformers.MistralConfig(sliding_window=8)) is None
    assert supported(transformers.BertConfig()) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_the_shape_of_slots_is_known_beforehand(name: str) -> None:
    model = make(name)
    with KeyTokens(model, 0.5, min_length=0) as few, torch.no_grad():
        cache = few.cache()
        model(IDS.clamp(min=2), past_key_values=cache)
        slots = cache.slot_layers[0].evicting.slots
        assert head_shape(model.config) == (slots.keys.shape[1], slots.keys.shape[-1], slots.values.shape[-1])
