"""Calls that nobody planned for: each does what it says, or is refused with a reason; none writes a wrong text."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import GenerationConfig, LlamaForCausalLM

from vitalfew.core import Budget, InputError
from vitalfew.generate import H2O, POLICIES, TOVA, Keyformer, KeyTokens, Random, Recent, SnapKV, Streaming, then
from vitalfew.generate._transformers import SlotCache
from vitalfew.generate._transformers_weights import quiet

from .families import make, padded

GREEDY = {"max_new_tokens": 12, "do_sample": False}


def text(count: int = 60, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return padded(rows, count, seed=seed)[0].clamp(min=2)


def positions(cache: SlotCache, layer: int = 0, row: int = 0, head: int = 0) -> list[int]:
    return sorted(p for p in cache.slot_layers[layer].evicting.slots.pos[row, head].tolist() if p >= 0)


def step(model: Any, cache: SlotCache, token: int = 5, rows: int = 1, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.full((rows, 1), token), past_key_values=cache, **more).logits


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make("llama")


# Models


def test_a_copy_of_an_enabled_model_would_write_with_the_model(model: LlamaForCausalLM) -> None:
    with KeyTokens(model, 0.5, min_length=0):
        for taken in (copy.deepcopy, pickle.dumps):
            with pytest.raises(InputError, match="copied or pickled"):
                taken(model)
    other = copy.deepcopy(model)
    other.lm_head.weight.data.neg_()
    assert not other.generate(text(), **GREEDY).equal(model.generate(text(), **GREEDY))


def test_an_enabled_model_is_saved_as_it_is(model: LlamaForCausalLM, tmp_path: Path) -> None:
    expected = model.generate(text(), **GREEDY)
    with KeyTokens(model, 0.5, min_length=0):
        model.save_pretrained(tmp_path)
    assert "vitalfew" not in (tmp_path / "config.json").read_text()
    assert LlamaForCausalLM.from_pretrained(tmp_path).eval().generate(text(), **GREEDY).equal(expected)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda m: "smollm2", "got str"),
        (lambda m: m.model, "does not generate"),
        (lambda m: transformers.LlamaForSequenceClassification(m.config), "does not generate"),
        (torch.compile, "got OptimizedModule"),
    ],
    ids=["name", "base", "classifier", "compiled"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile imports
def test_what_is_no_generating_model(model: LlamaForCausalLM, build: Callable[..., Any], why: str) -> None:
    given = build(model)
    with pytest.raises(InputError, match=why) as caught:
        KeyTokens(given)
    assert caught.value.hint
    assert model.config._attn_implementation == "sdpa"
    assert not isinstance(given, torch.nn.Module) or not given._forward_pre_hooks


@pytest.mark.filterwarnings("ignore::FutureWarning")  # newer names are not in all versions
def test_gradient_checkpointing_in_training_has_no_cache() -> None:
    model = make("llama")
    model.gradient_checkpointing_enable()
    model.train()
    with KeyTokens(model, 0.5, min_length=0) as few, quiet():
        with pytest.raises(InputError, match="holds 0 tokens of 60"):
            model.generate(text(), **GREEDY)
        model.eval()
        assert model.generate(text(), **GREEDY).shape == (1, 72)
        assert few.generations[0].nbytes < few.generations[0].full_nbytes


def test_another_attention_within_the_block(model: LlamaForCausalLM) -> None:
    with KeyTokens(model, 0.5, min_length=0):
        model.set_attn_implementation("eager")
        with pytest.raises(InputError, match="never asked for its slots"):
            model.generate(text(), **GREEDY)
    assert model.config._attn_implementation == "sdpa"


# Caches


@pytest.mark.parametrize("layers", [1, 2])
def test_a_cache_ends_with_its_key_tokens(layers: int) -> None:
    model = make("llama", num_hidden_layers=layers)
    few = KeyTokens(model, 0.5, min_length=0)
    cache = few.cache()
    model.generate(text(), past_key_values=cache, **GREEDY)
    few.undo()
    with pytest.raises(InputError, match="undone"):
        step(model, cache)


@pytest.mark.parametrize(
    ("other", "why"),
    [({"num_hidden_layers": 3}, "has 2 layers, the model 3"), ({"num_hidden_layers": 1}, "has 2 layers, the model 1"),
     ({"hidden_size": 64}, r"8 \+ 8 channels.*16 \+ 16"), ({"num_key_value_heads": 4}, "2 heads.*4 heads")],
)  # fmt: skip
def test_a_cache_of_another_model(model: LlamaForCausalLM, other: dict[str, int], why: str) -> None:
    strange = make("llama", **other)
    with KeyTokens(model, 0.5, min_length=0) as few, KeyTokens(strange, 0.5, min_length=0):
        cache = few.cache()
        model.generate(text(), past_key_values=cache, **GREEDY)
        held = cache.nbytes, cache.length
        with pytest.raises(InputError, match=why):
            step(strange, cache)
        assert (cache.nbytes, cache.length) == held
        step(model, cache)


@pytest.mark.parametrize(("name", "budget"), [("llama", 0.5), ("llama", 1.0), ("gemma3", 0.5)])
def test_copies_of_a_cache_go_their_own_ways(name: str, budget: float) -> None:
    """As transformers' recipe for prefixes has it: read once, copy for each question."""
    # One head, whose keys are in one piece, and may be kept as they come.
    model = make(name, num_key_value_heads=1)
    few = KeyTokens(model, budget, policy="keyformer-dynamic", min_length=0)
    # Without `no_grad`, where the windows, which are not ours, can be copied at all.
    with few, torch.set_grad_enabled(name == "llama"):
        start = few.cache()
        model(text(), past_key_values=start)
        for seed in (1, 2, 1):
            ids = torch.cat([text(), text(9, seed=seed)], 1)
            straight = few.cache()
            model(text(), past_key_values=straight)
            expected = model.generate(ids, past_key_values=straight, **GREEDY)
            assert model.generate(ids, past_key_values=copy.deepcopy(start), **GREEDY).equal(expected)
        assert start.length == 60
        assert not any(layer.evicting.slots.keys.requires_grad for layer in start.slot_layers)


def test_rows_are_taken_as_those_of_a_tensor(model: LlamaForCausalLM) -> None:
    ids = text(40, rows=3)
    with KeyTokens(model, 0.5, min_length=0) as few:
        for rows in (torch.tensor([True, False, True]), torch.tensor([0, -1])):
            cache, fresh = few.cache(), few.cache()
            model(ids, past_key_values=cache)
            cache.batch_select_indices(rows)
            model(ids[rows], past_key_values=fresh)
            torch.testing.assert_close(step(model, cache, rows=2), step(model, fresh, rows=2), atol=1e-5, rtol=1e-5)
        cache.batch_repeat_interleave(2)
        one, other = step(model, cache, rows=4)[::2]
        assert not one.equal(other)


def test_what_cannot_be_taken_back_leaves_all_layers_as_they_were() -> None:
    model = make("gemma3")
    with KeyTokens(model, 0.5, min_length=0) as few:
        cache, twin = few.cache(), few.cache()
        for each in (cache, twin):
            model(text(10), past_key_values=each)  # shorter than the window, which could drop some
        with pytest.raises(InputError, match="take 3 tokens back"):
            cache.crop(-3)
        with pytest.raises(InputError, match="crop to 3"):
            cache.crop(3)
        cache.crop(0)
        assert step(model, cache).equal(step(model, twin))


def test_recording_is_for_as_long_as_it_takes(model: LlamaForCausalLM) -> None:
    with KeyTokens(model, 0.5, min_length=0) as few:
        cache = few.cache()
        said = model.generate(text(), past_key_values=cache, assistant_model=make("llama", seed=1), **GREEDY)
        model.generate(torch.cat([said, text(9)], 1), past_key_values=cache, **GREEDY)
        assert cache.slot_layers[0].evicting.slots.undoable == 1

        cache = few.cache()
        cache.activate_past_recording()
        model(text(), past_key_values=cache)
        assert len(positions(cache)) == 30  # a prompt is a prompt
        for _ in range(3):
            step(model, cache)
        assert cache.slot_layers[0].evicting.slots.undoable == 3
        cache.reset()
        model(text(), past_key_values=cache)
        for _ in range(3):
            step(model, cache)
        assert cache.slot_layers[0].evicting.slots.undoable == 1


def test_a_cache_that_broke_can_be_loaded_into(model: LlamaForCausalLM) -> None:
    with KeyTokens(model, 0.5, min_length=0) as few:
        cache = few.cache()
        model(text(), past_key_values=cache)
        state = cache.state_dict()
        expected = step(model, cache)
        cache.torn = True
        with pytest.raises(InputError, match="half way"):
            step(model, cache)
        cache.load_state_dict(state)
        assert step(model, cache).equal(expected)


def test_a_generation_that_never_began_leaves_no_prompt_behind(model: LlamaForCausalLM) -> None:
    with KeyTokens(model, 0.5, min_length=0) as few:
        cache = few.cache()
        model.generate(text(), past_key_values=cache, **GREEDY)
        with pytest.raises(ValueError, match="no_such_setting"):
            model.generate(text(100), past_key_values=cache, no_such_setting=1, **GREEDY)
        for token in range(2, 12):
            step(model, cache, token)
        assert len(positions(cache)) == 30


# Masks and tokens


def test_a_mask_may_be_written_into_between_calls(model: LlamaForCausalLM) -> None:
    ids, mask = text(20, rows=2), torch.ones(2, 20, dtype=torch.bool)
    with KeyTokens(model, 0.5, min_length=0) as few, torch.no_grad():
        cache, fresh = few.cache(), few.cache()
        model(ids, attention_mask=mask, past_key_values=cache)
        cache.reset()
        mask[0, :5] = 0
        at = (mask.cumsum(1) - 1).clamp(min=0)
        got = model(ids, attention_mask=mask, position_ids=at, past_key_values=cache).logits
        expected = model(ids, attention_mask=mask.clone(), position_ids=at, past_key_values=fresh).logits
        assert got.equal(expected)
        assert positions(cache)[-1] == 14


def test_a_mask_cannot_hide_what_was_taken_in(model: LlamaForCausalLM) -> None:
    with KeyTokens(model, 0.5, min_length=0) as few:
        cache, twin = few.cache(), few.cache()
        for each in (cache, twin):
            model(text(20), past_key_values=each)
        mask = torch.ones(1, 21, dtype=torch.long)
        mask[0, 3] = 0
        with pytest.raises(InputError, match=r"counts 19 of the tokens that row 0 .* which are 20"):
            step(model, cache, attention_mask=mask)
        assert step(model, cache).equal(step(model, twin))


@pytest.mark.parametrize("shape", [(1, 70), (1, 50), (2, 60)])
def test_a_mask_of_other_tokens(model: LlamaForCausalLM, refuses: Callable[..., Any], shape: tuple[int, int]) -> None:
    """One of ones is dropped on the way, so that nothing else would tell where the prompt ends."""
    with KeyTokens(model, 0.5, min_length=0), refuses(f"mask has shape {shape}"):
        model.generate(text(), attention_mask=torch.ones(shape), **GREEDY)


def test_padding_takes_no_slot_of_a_token(model: LlamaForCausalLM) -> None:
    with KeyTokens(model, 0.5, min_length=0) as few:
        cache, twin = few.cache(), few.cache()
        for each in (cache, twin):
            model(text(20, rows=2), past_key_values=each)
        mask = torch.ones(2, 21, dtype=torch.long)
        mask[1, 20] = 0
        with pytest.raises(InputError, match="padding after its prompt"):
            step(model, cache, rows=2, attention_mask=mask)
        assert step(model, cache, rows=2).equal(step(model, twin, rows=2))


@pytest.mark.parametrize("shape", [(0, 7), (2, 0)])
def test_no_tokens(model: LlamaForCausalLM, shape: tuple[int, int]) -> None:
    with KeyTokens(model, 0.5, min_length=0) as few:
        none = torch.zeros(shape, dtype=torch.long)
        with pytest.raises(InputError, match=r"without tokens, with the shape \("):
            model(none, past_key_values=few.cache())
        with pytest.raises(InputError, match="without tokens, with nothing"):
            model(past_key_values=few.cache())
        with pytest.raises(InputError, match="without tokens"):
            model(torch.tensor([3, 4]), past_key_values=few.cache())


def test_a_cache_in_its_place_among_the_arguments() -> None:
    model = make("gpt2")
    with KeyTokens(model, 0.5, min_length=0) as few, torch.no_grad():
        cache = few.cache()
        model(text(), cache)
        assert cache._began is None
        assert cache.length == 60
        hook = model.transformer.h[1].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(text(1), cache)
        hook.remove()
        model(text(1), cache)  # which notices, and goes back to where the failed call began
        assert cache.length == 61


@pytest.mark.parametrize("name", POLICIES)
def test_prompts_of_a_token_or_two(model: LlamaForCausalLM, name: str) -> None:
    with KeyTokens(model, 0.5, policy=name, min_length=0) as few:
        for count in (1, 2, 3):
            out = model.generate(text(count), max_new_tokens=25, do_sample=False)
            assert out.shape == (1, count + 25)
        assert all(run.nbytes < run.full_nbytes for run in few.generations)
        ids, mask = padded(3, 3, step=1)
        model.generate(ids, attention_mask=mask, max_new_tokens=25, do_sample=False)


@pytest.mark.parametrize("policy", [Streaming(4), SnapKV(8), H2O()], ids=str)
def test_as_many_tokens_as_slots(policy: Any) -> None:
    """Nothing has to go at the prompt's end, and what goes next is the policy's choice all the same."""
    model = make("llama", num_key_value_heads=1)  # whose keys are in one piece
    with KeyTokens(model, 60, policy=policy, min_length=0, protect=[slice(10, 12)]) as few:
        cache = few.cache()
        model(text(), past_key_values=cache)
        for _ in range(15):
            step(model, cache)
        held = set(positions(cache))
        assert {10, 11} <= held
        assert set(range(policy.sinks)) <= held
        if policy.sinks:
            assert held == {*range(4), 10, 11, *range(21, 75)}


# generate()


def test_settings_of_the_model_hold_where_the_call_says_nothing() -> None:
    model = make("llama")
    model.generation_config.max_new_tokens = 9
    with KeyTokens(model, 0.5, min_length=0) as few:
        cache = few.cache()
        assert model.generate(text(), GenerationConfig(do_sample=False), past_key_values=cache).shape == (1, 69)
        assert cache.request.planned == 9
        model.generation_config.use_cache = False
        with pytest.raises(InputError, match="use_cache=False"):
            model.generate(text(), GenerationConfig(do_sample=False))


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"assistant_early_exit": 1}, "assistant_early_exit"),
        ({"cache_implementation": "offloaded"}, "offloaded"),
        ({"cache_implementation": "paged"}, "paged"),
    ],
)
def test_ways_that_have_a_cache_of_their_own(model: LlamaForCausalLM, more: dict[str, Any], why: str) -> None:
    with KeyTokens(model, 0.5, min_length=0):
        with pytest.raises(InputError, match=why):
            model.generate(text(), **GREEDY, **more)
        with pytest.raises(InputError, match="pages"):
            model(text(), cache=object())


def test_an_enabled_model_drafts_for_none(model: LlamaForCausalLM) -> None:
    with KeyTokens(model, 0.5, min_length=0), pytest.raises(InputError, match="draft for another"):
        make("llama", seed=1).generate(text(), assistant_model=model, **GREEDY)


def test_a_share_of_less_than_a_slot_waits_for_more_tokens(model: LlamaForCausalLM) -> None:
    with KeyTokens(model, 0.01, min_length=62) as few:
        model.generate(text(), **GREEDY)  # is 62 tokens long on the way
        assert "1 of 1 texts were kept whole" in few.receipt().notes[0]


def test_memory_is_not_taken_for_what_will_be_cut(model: LlamaForCausalLM) -> None:
    with KeyTokens(model, 0.5, min_length=80) as few:
        cache = few.cache(prompt=60, max_new_tokens=4_000)
        model(text(), past_key_values=cache)
        assert cache.slot_layers[0].evicting.slots.keys.shape[2] <= 80
        for _ in range(30):
            step(model, cache)
        assert len(positions(cache)) == 40


@pytest.mark.parametrize("way", [{"prompt_lookup_num_tokens": 5}, {"assistant_model": None}, {"num_beams": 3}])
def test_rows_are_chosen_from_amid_drafts_and_beams(model: LlamaForCausalLM, way: dict[str, Any]) -> None:
    """A token that made a row long enough may be taken back, and the choice with it."""
    if "assistant_model" in way:
        way = {"assistant_model": make("llama", seed=1)}
    ids = torch.cat([text(20), text(20), text(17)], 1)
    with KeyTokens(model, 0.5, min_length=60) as few:
        for length in range(50, 58):
            want = {} if "num_beams" not in way else way
            expected = model.generate(ids[:, :length], max_new_tokens=20, do_sample=False, **want)
            assert model.generate(ids[:, :length], max_new_tokens=20, do_sample=False, **way).equal(expected)
        assert all(run.whole == 0 for run in few.generations)


def test_a_step_that_fails_after_a_row_was_chosen_from(model: LlamaForCausalLM) -> None:
    with KeyTokens(model, 0.5, min_length=61) as few:
        cache, twin = few.cache(), few.cache()
        for each in (cache, twin):
            model(text(), past_key_values=each)
        hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step(model, cache)
        hook.remove()
        for _ in range(3):
            assert step(model, cache).equal(step(model, twin))
        assert len(positions(cache)) == 30


def test_a_handle_that_was_undone_opens_no_block(model: LlamaForCausalLM) -> None:
    with KeyTokens(model, 0.5, min_length=0) as few:
        pass
    with pytest.raises(InputError, match="undone"), few:
        model.generate(text(), **GREEDY)


@pytest.mark.parametrize("name", ["gemma3", "lfm2"])
def test_a_size_is_for_windows_too(name: str) -> None:
    model = make(name)
    with KeyTokens(model, "16 KB", min_length=0) as few:
        cache = few.cache()
        model.generate(text(rows=2), past_key_values=cache, **GREEDY)
        assert 13_000 < cache.nbytes <= 16_000


# Policies and settings


def test_what_is_protected_protects_no_neighbour(model: LlamaForCausalLM) -> None:
    with KeyTokens(model, 30, policy=SnapKV(8), min_length=0, protect=[slice(20, 22)]) as few:
        cache, said = few.cache(), text()
        for turn in range(4):
            ones = torch.ones_like(said)  # else what was generated might pass for padding
            said = model.generate(said, attention_mask=ones, past_key_values=cache, max_new_tokens=4, do_sample=False)
            said = torch.cat([said, text(20, seed=turn)], 1)
            slots = cache.slot_layers[0].evicting.slots
            pinned = slots.pos[slots.score == torch.inf]
            assert set(pinned.tolist()) == {20, 21}
        assert all(0 < low <= mean <= 1 for run in few.generations for low, mean in run.mass)
        assert few.receipt().lines


def test_mass_is_that_of_the_last_prompt(model: LlamaForCausalLM) -> None:
    """Of the second turn's queries: what they gave to slots that stay, of what they gave to all they saw."""
    ids = text(90)
    with KeyTokens(model, 30, policy=H2O(), min_length=0, protect=[slice(3, 5)]) as few, torch.no_grad():
        cache = few.cache(prompt=60)
        model(ids[:, :60], past_key_values=cache)
        layer = cache.slot_layers[0].evicting
        seen = layer.slots.pos[0, 0].tolist() + list(range(60, 90))
        weights = _first_layer_weights(model, ids, seen)
        cache.expect(90, 0)
        model(ids[:, 60:], past_key_values=cache)
        kept = [p in positions(cache) for p in seen]
        want = weights[:, :, torch.tensor(kept)].sum() / weights.sum()
        assert float(layer.mass[0, 0]) == pytest.approx(float(want), abs=1e-5)


@pytest.mark.parametrize("policy", [H2O(recent=4), SnapKV(8, recent=4), Keyformer(recent=4)], ids=str)
def test_a_later_prompt_keeps_its_share_of_votes_too(model: LlamaForCausalLM, policy: Any) -> None:
    with KeyTokens(model, Budget.cover(0.6), policy=policy, min_length=0) as few:
        cache, said = few.cache(), text()
        for turn in range(3):
            ones = torch.ones_like(said)  # else what was generated might pass for padding
            said = model.generate(said, attention_mask=ones, past_key_values=cache, max_new_tokens=4, do_sample=False)
            said = torch.cat([said, text(20, seed=turn)], 1)
        assert all(0.6 - 1e-4 < mean < 0.75 for run in few.generations for _, mean in run.mass)


def _first_layer_weights(model: Any, ids: torch.Tensor, seen: list[int]) -> torch.Tensor:
    """Return what queries 60 to 89 of KV head 0 give to the tokens at these positions, (G, n, m)."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    layer, at = model.model.layers[0], torch.arange(ids.shape[1])[None]
    x = layer.input_layernorm(model.model.embed_tokens(ids))
    both = layer.self_attn.q_proj, layer.self_attn.k_proj
    q, k = (each(x).view(1, ids.shape[1], -1, 8).transpose(1, 2) for each in both)
    q, k = apply_rotary_pos_emb(q, k, *model.model.rotary_emb(x, at))
    where = torch.tensor(seen)
    logits = q[0, :2, 60:] @ k[0, 0, where].T / 8**0.5
    return logits.masked_fill(where > torch.arange(60, 90)[:, None], -torch.inf).softmax(-1)


@pytest.mark.parametrize("policy", [SnapKV(8), TOVA(), H2O()], ids=str)
def test_pieces_are_chosen_from_by_their_own_votes(model: LlamaForCausalLM, policy: Any) -> None:
    """With `evict="chunk"` the first piece keeps what it would keep as a whole prompt."""
    with KeyTokens(model, 0.5, policy=policy, min_length=0, evict="chunk") as few, torch.no_grad():
        cache, alone = few.cache(prompt=60), few.cache(prompt=30)
        model(text()[:, :30], past_key_values=cache)
        model(text()[:, :30], past_key_values=alone)
        for layer in range(2):
            for head in range(2):
                assert positions(cache, layer, head=head) == positions(alone, layer, head=head)
        model(text()[:, 30:], past_key_values=cache)
        assert len(positions(cache)) == 30


@pytest.mark.parametrize("policy", [SnapKV(8), then(SnapKV(8), H2O())], ids=str)
def test_no_recent_window_is_none(policy: Any) -> None:
    assert policy.recent_of(30) > 0
    for none in (0, 0.0):
        with KeyTokens(make("llama"), 0.5, policy=policy, recent=none) as few:
            assert few.policy.recent_of(30) == 0


def test_votes_are_not_added_to_what_are_none(model: LlamaForCausalLM) -> None:
    """Positions and random numbers are no votes: those that come later start from nothing."""
    for first in (Recent(), Random(), Streaming(2)):
        with KeyTokens(model, 0.5, policy=then(first, H2O()), min_length=0) as few:
            cache = few.cache(prompt=60)
            model(text(), past_key_values=cache)
            for k in range(1, 9):
                step(model, cache)
                score = cache.slot_layers[0].evicting.slots.score[0, 0]
                assert float(score[score < torch.inf].sum()) <= k + 1e-4


def test_the_receipt_says_what_had_no_effect(model: LlamaForCausalLM) -> None:
    with KeyTokens(model, 0.5, policy="streaming", question=4, min_length=70) as few:
        model.generate(text(), max_new_tokens=4, do_sample=False)
        model.generate(text(75, rows=2), max_new_tokens=4, do_sample=False)
        first, second = few.receipt().notes
    assert "1 of 3 texts were kept whole" in first
    assert "min_length=70" in first
    assert "question=4 changed nothing" in second
    with KeyTokens(model, 1.0) as few:
        model.generate(text(), max_new_tokens=4, do_sample=False)
        assert not few.receipt().notes


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"min_length": 0.5}, "0.5"), ({"min_length": "256"}, "256"), ({"seed": "a"}, "a"), ({"seed": True}, "True"),
        ({"seed": 2**64}, "64 bits"), ({"policy": H2O}, "H2O"), ({"policy": 3}, "got 3"), ({"question": True}, "True"),
        ({"question": 0.5}, "0.5"), ({"protect": slice(0, 4)}, "list of slices"), ({"protect": [slice(0, 4.0)]}, "4.0"),
        ({"budget": 20, "of": "total"}, "total"), ({"budget": "1 MiB", "of": "total"}, "total"),
        ({"budget": Budget.cover(0.9), "layers": "pyramid"}, "coverage"),
        ({"budget": Budget.cover(0.9), "layers": [1.0, 2.0]}, "coverage"),
    ],
)  # fmt: skip
def test_settings_that_say_nothing(
    model: LlamaForCausalLM, refuses: Callable[..., Any], settings: dict[str, Any], said: str
) -> None:
    with refuses(said):
        KeyTokens(model, **settings)
    assert "generate" not in model.__dict__


def test_spans_that_lie_behind_the_prompt(model: LlamaForCausalLM, refuses: Callable[..., Any]) -> None:
    with KeyTokens(model, 0.5, min_length=0, protect=[slice(60, 64)]), refuses("row 0 has 60 tokens"):
        model.generate(text(), **GREEDY)
    with KeyTokens(model, 0.5, min_length=0, protect=[slice(0, 0), slice(90, 90), slice(-4, None)]):
        model.generate(text(), **GREEDY)
    with KeyTokens(model, 0.5, min_length=0, protect=[slice(40, 44)], evict="chunk"):  # the first piece ends before
        model.generate(text(), prefill_chunk_size=20, **GREEDY)


def test_numbers_of_numpy(model: LlamaForCausalLM) -> None:
    with KeyTokens(model, np.float64(0.5), recent=np.float64(0.3), min_length=0) as few:
        model.generate(text(), **GREEDY)
        assert few.policy.recent_of(30) == 9
