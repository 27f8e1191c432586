"""The handle and its cache: budgets, what stays, what it holds, taking back, going on, and giving the model back."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vitalfew.core import Budget, InputError
from vitalfew.generate import H2O, Keyformer, KeyTokens, SnapKV, Streaming, then
from vitalfew.generate._transformers import SlotCache

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TOKENS = {"vocab_size": 64, "eos_token_id": None, "pad_token_id": 0, "bos_token_id": 1}
HEADS, SIZE_OF_HEAD, LAYERS = 2, 8, 3
SLOT = HEADS * (2 * SIZE_OF_HEAD * 4 + 4 + 4)
MARK = HEADS * 8


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**SIZE, **TOKENS, num_key_value_heads=HEADS)).eval()
    for weight in made.parameters():
        weight.data *= 3.0  # attention then has something to choose between
    return made


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    return torch.randint(1, 64, (1, 60), generator=torch.Generator().manual_seed(1))


def text(model: LlamaForCausalLM, prompt: torch.Tensor, count: int = 20, **kwargs: object) -> torch.Tensor:
    return model.generate(prompt, max_new_tokens=count, do_sample=False, **kwargs)


def positions(cache: SlotCache, layer: int = 0, row: int = 0, head: int = 0) -> list[int]:
    slots = cache.slot_layers[layer].evicting.slots
    assert slots is not None
    return sorted(p for p in slots.pos[row, head].tolist() if p >= 0)


# What it holds


@pytest.mark.parametrize("budget", [0.5, 0.29, "20%", 24, Budget.of(17)])
def test_bytes_are_those_of_the_slots(model: LlamaForCausalLM, prompt: torch.Tensor, budget: float | int | str) -> None:
    kept = {0.5: 30, 0.29: 17, "20%": 12, 24: 24}.get(budget, 17)  # type: ignore[call-overload]
    with KeyTokens(model, budget, min_length=0) as few:
        cache = few.cache()
        text(model, prompt, past_key_values=cache)
        assert cache.nbytes == LAYERS * (kept * SLOT + MARK)
        assert all(len(positions(cache, layer)) == kept for layer in range(LAYERS))
        assert cache.get_seq_length() == 79
        [run] = few.generations
        assert (run.rows, run.prompt, run.new, run.nbytes) == (1, 60, 20, cache.nbytes)
        assert run.full_nbytes == 79 * LAYERS * HEADS * 2 * SIZE_OF_HEAD * 4


def test_a_size_is_for_all_rows(model: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    for rows in (1, 3):
        with KeyTokens(model, "20 KB", min_length=0) as few:
            cache = few.cache()
            text(model, prompt.expand(rows, -1), past_key_values=cache)
            assert 20_000 - rows * LAYERS * SLOT < cache.nbytes <= 20_000
    with KeyTokens(model, "400 B", min_length=0) as few, pytest.raises(InputError, match=r"needed"):
        text(model, prompt)


def test_memory_does_not_move_or_grow(model: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    with KeyTokens(model, 0.3, min_length=0) as few:
        cache = few.cache(prompt=60, max_new_tokens=300)
        model(prompt, past_key_values=cache)
        where, held = [], cache.nbytes
        for k in range(300):
            model(torch.tensor([[k % 60 + 1]]), past_key_values=cache)
            slots = cache.slot_layers[1].evicting.slots
            assert slots is not None
            where.append((slots.keys.data_ptr(), slots.values.data_ptr(), slots.pos.data_ptr(), slots.score.data_ptr()))
        assert len(set(where)) == 1
        assert cache.nbytes == held


def test_nothing_goes_below_the_least_length(model: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    with KeyTokens(model, 0.5, min_length=70) as few:
        cache = few.cache()
        assert text(model, prompt, 8, past_key_values=cache).equal(text(model, prompt, 8))
        assert len(positions(cache)) == 67
        cache = few.cache()
        text(model, prompt, 20, past_key_values=cache)  # chosen from at 70 tokens
        assert len(positions(cache)) == 35


def test_a_short_row_in_a_long_batch_is_left_whole(model: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    ids = prompt.repeat(2, 1)
    mask = torch.ones_like(ids)
    ids[0, :40] = mask[0, :40] = 0
    with KeyTokens(model, 0.5, min_length=30) as few:
        cache = few.cache()
        both = text(model, ids, 15, attention_mask=mask, past_key_values=cache)
        assert len(positions(cache, row=1)) == 30
        assert len(positions(cache, row=0)) == 15  # it reached 30 tokens on the way
        assert both[0, 40:].equal(text(model, ids[:1, 40:], 15)[0])
        assert both[1].equal(text(model, ids[1:], 15)[0])


# What stays


def test_sinks_window_and_protected_tokens_stay(model: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    policy = Streaming(4)
    with KeyTokens(model, 20, policy=policy, min_length=0) as few:
        cache = few.cache()
        text(model, prompt, 30, past_key_values=cache)
        assert positions(cache) == [0, 1, 2, 3, *range(73, 89)]
    with KeyTokens(model, 20, policy=H2O(), min_length=0, protect=[slice(8, 12)]) as few:
        cache = few.cache()
        text(model, prompt, 30, past_key_values=cache)
        for layer in range(LAYERS):
            for head in range(HEADS):
                held = positions(cache, layer, head=head)
                assert set(range(8, 12)) <= set(held)
                assert set(range(79, 89)) <= set(held)  # half of 20 are recent
                assert len(held) == 20
    with KeyTokens(model, 20, min_length=0, protect=[slice(0, 30)]), pytest.raises(InputError, match="keeps 20"):
        text(model, prompt)


def test_frozen_keys_never_change(model: LlamaForCausalLM) -> None:
    ids = torch.randint(1, 64, (1, 40), generator=torch.Generator().manual_seed(3))
    with KeyTokens(model, 0.6, policy=Keyformer.frozen(), min_length=0) as few:
        cache = few.cache(prompt=40, max_new_tokens=24)
        model(ids, past_key_values=cache)
        seen = []
        for k in range(24):
            model(torch.tensor([[k + 1]]), past_key_values=cache)
            held = positions(cache)
            assert held[17:] == list(range(34 + k, 41 + k))
            assert 33 not in held
            seen.append(held[:17])
        assert len({tuple(keys) for keys in seen}) == 1
        assert max(seen[0]) <= 32


def test_layers_may_hold_different_shares(model: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    for layers, want in (("pyramid", None), ([1.0, 2.0, 3.0], [15, 30, 45])):
        with KeyTokens(model, 0.5, min_length=0, layers=layers) as few:
            cache = few.cache()
            out = text(model, prompt, past_key_values=cache)
            held = [len(positions(cache, layer)) for layer in range(LAYERS)]
            assert sum(held) == 90
            assert want is None or held == want
            assert want is not None or held[0] > held[1] > held[2]
            assert out.shape == (1, 80)


def test_a_mass_is_reached_with_as_few_slots_as_it_takes(model: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    held = []
    for mass in (0.6, 0.9, 0.99):
        with KeyTokens(model, Budget.cover(mass), policy=H2O(recent=4), min_length=0) as few:
            text(model, prompt, 2)
            found = [m[1] for m in few.generations[0].mass if m is not None]
            assert len(found) == LAYERS
            assert min(found) >= mass - 1e-4
            cache = few.cache()
            text(model, prompt, 2, past_key_values=cache)
            held.append([len(positions(cache, layer)) for layer in range(LAYERS)])
    assert all(a <= b <= c for a, b, c in zip(*held, strict=True))
    assert sum(held[0]) < sum(held[2])
    with pytest.raises(InputError, match="no votes"):
        KeyTokens(model, Budget.cover(0.9), policy="streaming")
    assert "generate" not in model.__dict__


def test_the_question_alone_votes(model: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    held = []
    for question in (None, 8, slice(-8, None)):
        with KeyTokens(model, 0.3, policy=H2O(recent=4), min_length=0, question=question) as few:
            cache = few.cache()
            text(model, prompt, 1, past_key_values=cache)
            held.append([positions(cache, k, head=h) for k in range(LAYERS) for h in range(HEADS)])
    assert held[1] == held[2] != held[0]
    with pytest.raises(InputError, match="end the prompt"):
        KeyTokens(model, question=slice(3, 9))


def test_retained_mass_is_that_of_plain_attention(model: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        weights = eager(prompt, output_attentions=True).attentions
    with KeyTokens(model, 0.4, policy=H2O(), min_length=0) as few:
        cache = few.cache(prompt=60)
        model(prompt, past_key_values=cache)
    for layer, full in enumerate(weights):
        votes = full[0].view(HEADS, -1, 60, 60).sum((1, 2))
        mass = cache.slot_layers[layer].evicting.mass
        assert mass is not None
        for head in range(HEADS):
            held = positions(cache, layer, head=head)
            assert float(mass[0, head]) == pytest.approx(float(votes[head, held].sum() / votes[head].sum()), abs=1e-5)


# Chunks, turns, taking back, going on


@pytest.mark.parametrize("policy", ["keyformer", "keyformer-dynamic", "h2o", "snapkv", "tova", "streaming", "random"])
def test_chunks_of_a_prompt_change_nothing(model: LlamaForCausalLM, prompt: torch.Tensor, policy: str) -> None:
    with KeyTokens(model, 0.5, policy=policy, min_length=0):
        whole = text(model, prompt)
        for size in (7, 59, 60):
            assert text(model, prompt, prefill_chunk_size=size).equal(whole)


def test_choosing_after_each_chunk_bounds_the_peak(model: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    with KeyTokens(model, 0.25, min_length=0, evict="chunk") as few:
        cache = few.cache(prompt=60)
        for lo in range(0, 60, 20):
            model(prompt[:, lo : lo + 20], past_key_values=cache)
            assert len(positions(cache)) == (lo + 20) // 4


def test_a_later_turn_goes_on_from_what_is_left(model: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    with KeyTokens(model, 0.5, min_length=0) as few:
        cache = few.cache()
        first = text(model, prompt, 10, past_key_values=cache)
        longer = torch.cat([first, prompt[:, :20]], 1)
        second = text(model, longer, 10, past_key_values=cache)
        assert second.shape == (1, 100)
        assert cache.get_seq_length() == 99
        assert len(positions(cache)) == 45
    with KeyTokens(model, 1.0) as few:
        cache = few.cache()
        longer = torch.cat([text(model, prompt, 10, past_key_values=cache), prompt[:, :20]], 1)
        second = text(model, longer, 10, past_key_values=cache)
    assert second.equal(text(model, longer, 10))


def test_steps_taken_back_leave_no_trace(model: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    with KeyTokens(model, 0.5, policy="keyformer-dynamic", min_length=0) as few:
        straight, back = (few.cache(prompt=60, max_new_tokens=30) for _ in range(2))
        for cache in (straight, back):
            model(prompt, past_key_values=cache)
        back.activate_past_recording()
        for k in range(12):
            model(torch.tensor([[k + 1]]), past_key_values=straight)
            model(torch.tensor([[k + 1, 9, 8, 7]]), past_key_values=back)
            back.crop(-3)
        # Logits of several tokens at once are those of one after the other.
        a = model(torch.tensor([[5, 6, 7]]), past_key_values=back).logits
        b = torch.cat([model(torch.tensor([[t]]), past_key_values=straight).logits for t in (5, 6, 7)], 1)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        with pytest.raises(InputError, match="take 9 tokens back"):
            straight.crop(-9)
    one, two = straight.state_dict(), back.state_dict()
    for x, y in zip(one["layers"], two["layers"], strict=True):
        for name in ("keys", "pos", "score", "marked"):
            torch.testing.assert_close(x[name], y[name], atol=1e-5, rtol=1e-5)


def test_a_saved_cache_goes_on_bit_for_bit(model: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    with KeyTokens(model, 0.4, min_length=0) as few:
        cache = few.cache(prompt=60, max_new_tokens=20)
        model(prompt, past_key_values=cache)
        model(torch.tensor([[3]]), past_key_values=cache)
        again = few.cache()
        again.load_state_dict(cache.state_dict())
        for token in (4, 5, 6, 7):
            x, y = (model(torch.tensor([[token]]), past_key_values=c).logits for c in (cache, again))
            assert x.equal(y)
        with pytest.raises(InputError, match="empty"):
            few.cache().state_dict()


def test_rows_are_reordered_with_all_they_have(model: LlamaForCausalLM) -> None:
    ids = torch.randint(1, 64, (3, 50), generator=torch.Generator().manual_seed(5))
    order = torch.tensor([2, 0, 0, 1])
    with KeyTokens(model, 0.4, min_length=0) as few:
        cache = few.cache(prompt=50, max_new_tokens=9)
        model(ids, past_key_values=cache)
        cache.reorder_cache(order)
        fresh = few.cache(prompt=50, max_new_tokens=9)
        model(ids[order], past_key_values=fresh)
        for token in range(1, 6):
            step = torch.full((4, 1), token)
            torch.testing.assert_close(
                model(step, past_key_values=cache).logits,
                model(step, past_key_values=fresh).logits,
                atol=1e-5,
                rtol=1e-5,
            )


# What goes wrong


def test_a_step_that_fails_leaves_the_cache_as_it_was(model: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    with KeyTokens(model, 0.5, min_length=0) as few:
        cache, twin = (few.cache(prompt=60, max_new_tokens=9) for _ in range(2))
        for c in (cache, twin):
            model(prompt, past_key_values=c)
        broken = model.model.layers[1].self_attn.v_proj.weight
        kept = broken.data.clone()
        broken.data.fill_(float("nan"))
        with pytest.raises(InputError, match="layer 1"):
            model(torch.tensor([[3]]), past_key_values=cache)
        broken.data.copy_(kept)
        assert cache.get_seq_length() == 60
        assert cache.nbytes == twin.nbytes
        x, y = (model(torch.tensor([[3]]), past_key_values=c).logits for c in (cache, twin))
        assert x.equal(y)
        broken.data.fill_(float("nan"))
        empty = few.cache(prompt=60)
        with pytest.raises(InputError):
            model(prompt, past_key_values=empty)
        broken.data.copy_(kept)
        assert empty.get_seq_length() == 0
        model(prompt, past_key_values=empty)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"budget": 0}, "keeps nothing"),
        ({"budget": 0.0}, "keeps nothing"),
        ({"budget": 1.5}, "1.5"),
        ({"budget": float("nan")}, "nan"),
        ({"budget": 3, "policy": Streaming(4)}, "3 slots"),
        ({"budget": 5, "recent": 8}, "5 slots"),
        ({"policy": "best"}, "best"),
        ({"layers": "funnel"}, "funnel"),
        ({"layers": [1.0, 2.0]}, "2 weights for 3"),
        ({"of": "all"}, "all"),
        ({"evict": "never"}, "never"),
        ({"min_length": -1}, "-1"),
        ({"question": 0}, "at least one"),
        ({"protect": [3]}, "slice"),
    ],
)
def test_bad_settings_are_refused_and_nothing_is_changed(
    model: LlamaForCausalLM, settings: dict[str, object], match: str
) -> None:
    before = model.config._attn_implementation
    with pytest.raises(InputError, match=match) as caught:
        KeyTokens(model, **settings)  # type: ignore[arg-type]
    assert caught.value.hint
    assert model.config._attn_implementation == before
    assert "generate" not in model.__dict__


def test_a_model_is_enabled_once(model: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    few = KeyTokens(model, 0.5, min_length=0)
    with pytest.raises(InputError, match="enabled already"):
        KeyTokens(model)
    few.undo()
    few.undo()
    with pytest.raises(InputError, match="undone"):
        few.cache()
    with pytest.raises(InputError, match="nothing was generated"):
        few.receipt()
    assert text(model, prompt).shape == (1, 80)


def test_receipt_counts_what_was_held(model: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    with KeyTokens(model, 0.5, policy=then(SnapKV(16), H2O()), min_length=0) as few:
        text(model, prompt)
        text(model, prompt.repeat(2, 1))
    receipt = few.receipt()
    held = next(line for line in receipt.lines if line.what == "keys and values at the end")
    assert held.after == sum(run.nbytes for run in few.generations) == 3 * LAYERS * (30 * SLOT + MARK)
    assert held.before == 3 * 79 * LAYERS * HEADS * 2 * SIZE_OF_HEAD * 4
    assert receipt.verdict == "undecided"
    assert all(0 < m[0] <= m[1] <= 1 for run in few.generations for m in run.mass if m is not None)


@pytest.mark.slow
def test_ten_thousand_tokens_at_constant_memory(model: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    with KeyTokens(model, 0.5, min_length=0) as few, torch.no_grad():
        cache = few.cache(prompt=60, max_new_tokens=10_000)
        model.model(prompt, past_key_values=cache)
        held = cache.nbytes
        for k in range(10_000):
            model.model(torch.tensor([[k % 60 + 1]]), past_key_values=cache)
        assert cache.nbytes == held == LAYERS * (30 * SLOT + MARK)
        assert cache.get_seq_length() == 10_060
