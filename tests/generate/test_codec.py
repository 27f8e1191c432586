"""Coded slots: kernels equal plain arithmetic, one slot changes alone, bytes as counted, and generation as ever."""

from __future__ import annotations

import gzip
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitalfew.core import InputError
from vitalfew.generate import _kernels_coded
from vitalfew.generate.budgets import slot_bytes
from vitalfew.generate.following import follow, measure
from vitalfew.generate.key_tokens import KeyTokens
from vitalfew.generate.packed import Packed, attend_held, pack
from vitalfew.generate.quant import CODECS, Codec, Int8, hadamard
from vitalfew.generate.scores import Logits, attend_slots

from .families import make, padded
from .tiny import smollm2_folder

DATA = Path(os.environ.get("VITALFEW_DATA", Path(__file__).parents[3] / "shared" / "data")) / "generate" / "essays"
GREEDY = {"max_new_tokens": 12, "do_sample": False}
each = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


def coded(x: torch.Tensor, codec: Codec) -> Packed:
    return Packed(pack(x, codec), codec, x.shape[-1])


@each
@given(
    seed=st.integers(0, 10**6), rows=st.integers(1, 3), heads=st.integers(1, 3), group=st.integers(1, 4),
    slots=st.integers(1, 70), sizes=st.sampled_from([(64, 64), (8, 16), (80, 80), (128, 64), (24, 40)]),
    bent=st.booleans(),
)  # fmt: skip
def test_attention_is_that_of_the_decoded_slots(
    codec: Codec, seed: int, rows: int, heads: int, group: int, slots: int, sizes: tuple[int, int], bent: bool
) -> None:
    dice = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, heads * group, 1, sizes[0], generator=dice)
    keys, values = (coded(torch.randn(rows, heads, slots, d, generator=dice), codec) for d in sizes)
    pos = torch.arange(slots, dtype=torch.int32).repeat(rows, heads, 1)
    empty = torch.rand(pos.shape, generator=dice) < 0.2
    empty[..., 0] = False
    pos[empty] = -1
    for held in (keys, values):  # what an empty slot holds is nobody's concern
        held.data[empty] = torch.randint(0, 256, held.data.shape, generator=dice, dtype=torch.uint8)[empty]
    form, at = Logits(sizes[0] ** -0.5), torch.full((rows,), slots)
    if bent:
        form = Logits(form.scale, 5.0, torch.rand(heads * group) * 0.1, torch.randn(heads * group))
    expected = attend_slots(q, keys.decode(torch.float32), values.decode(torch.float32), form, pos, at)
    got = attend_held(q, keys, values, form, pos, at)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_kernels_coded, "KINDS", {})
        twin = attend_held(q, keys, values, form, pos, at)
    for found in (got, twin):
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-6)


@each
def test_more_slots_than_a_block(codec: Codec) -> None:
    q, k, v = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 1100, 64), torch.randn(1, 2, 1100, 64)
    pos, at, form = torch.arange(1100, dtype=torch.int32).repeat(1, 2, 1), torch.tensor([1100]), Logits(0.125)
    # Views of a larger memory, as slots are.
    keys, values = (Packed(pack(x, codec)[:, :, :1099], codec, 64) for x in (k, v))
    expected = attend_slots(q, keys.decode(torch.float32), values.decode(torch.float32), form, pos[..., :1099], at)
    torch.testing.assert_close(attend_held(q, keys, values, form, pos[..., :1099], at), expected, rtol=1e-5, atol=1e-6)
    half = attend_held(q.bfloat16(), keys, values, form, pos[..., :1099], at)[0]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected[0], rtol=0, atol=0.02)


@given(seed=st.integers(0, 10**6), power=st.integers(0, 8), rows=st.integers(1, 5))
def test_the_kernel_turns_as_plain_arithmetic_does(seed: int, power: int, rows: int) -> None:
    x = torch.randn(rows, 3, 2**power, generator=torch.Generator().manual_seed(seed))
    y, width = x.clone(), 1
    while width < 2**power:
        pairs = y.reshape(rows, 3, -1, 2, width)
        y = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), -2)
        y, width = y.reshape(x.shape), 2 * width
    assert hadamard(x).equal(y * (1 / math.sqrt(2**power)))


def held(cache: Any) -> list[torch.Tensor]:
    return [t.clone() for layer in cache.slot_layers for t in (layer.evicting.slots.keys, layer.evicting.slots.values)]


@each
def test_a_step_rewrites_one_slot_alone(codec: Codec) -> None:
    model = make("llama")
    ids, mask = padded(3, 40)
    with KeyTokens(model, 0.5, min_length=0, codec=codec) as few, torch.no_grad():
        cache = few.cache(max_new_tokens=20)
        model(ids, attention_mask=mask, past_key_values=cache)
        for step in range(20):
            marks = [layer.evicting.slots.marked.clone() for layer in cache.slot_layers for _ in range(2)]
            before = held(cache)
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
            at = mask.sum(1, keepdim=True) - 1
            model(torch.full((3, 1), step + 2), attention_mask=mask, position_ids=at, past_key_values=cache)
            for old, new, marked in zip(before, held(cache), marks, strict=True):
                assert new.dtype == torch.uint8
                same = (old == new).all(-1)
                same.scatter_(2, marked[..., None], True)
                assert same.all()


@each
@pytest.mark.parametrize("name", ["llama", "qwen3", "mpt-6"])
def test_bytes_are_as_counted(codec: Codec, name: str) -> None:
    model, ids = make(name), padded(2, 40)[0].clamp(min=2)
    heads = 2 if name != "mpt-6" else 6
    with KeyTokens(model, 0.5, min_length=0, codec=codec) as few, torch.no_grad():
        cache = few.cache(max_new_tokens=6)
        for step in range(6):
            model(ids if not step else ids[:, :1], past_key_values=cache)
            assert cache.nbytes == 2 * 2 * heads * (20 * slot_bytes(8, 8, 4, codec) + 8)
    with KeyTokens(model, f"{cache.nbytes} B", min_length=0, codec=codec) as few:
        model.generate(ids, **GREEDY)
        assert few.generations[0].nbytes == cache.nbytes
        assert few.generations[0].full_nbytes == 2 * 2 * heads * 51 * 64


@each
def test_a_row_does_not_know_its_batch(codec: Codec) -> None:
    model = make("llama")
    ids, mask = padded(4, 30)
    with KeyTokens(model, 0.5, policy="keyformer-dynamic", min_length=24, codec=codec):
        batch = model.generate(ids, attention_mask=mask, **GREEDY)
        for row in range(4):
            own = model.generate(ids[row : row + 1, 3 * row :], **GREEDY)
            assert own[0].equal(batch[row, 3 * row :])


@each
def test_beams_drafts_and_chunks(codec: Codec) -> None:
    model, other = make("llama"), make("llama", seed=1)
    ids = padded(1, 40)[0].clamp(min=2)
    with KeyTokens(model, 0.5, min_length=0, codec=codec):
        greedy = model.generate(ids, **GREEDY)
        assert model.generate(ids, prefill_chunk_size=7, **GREEDY).equal(greedy)
        assert model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY).equal(greedy)
        assert model.generate(ids, assistant_model=other, **GREEDY).equal(greedy)
        many = model.generate(ids, num_beams=4, num_return_sequences=4, **GREEDY)
        assert model.generate(ids.repeat(2, 1), num_beams=4, num_return_sequences=4, **GREEDY).equal(many.repeat(2, 1))


@each
def test_a_conversation_goes_on(codec: Codec) -> None:
    """What was coded in the first turn is not coded again: its bytes stay, wherever its slots move."""
    model = make("llama")
    ids, more = padded(2, 24)[0].clamp(min=2), padded(2, 9, seed=9)[0].clamp(min=2)
    with KeyTokens(model, 64, min_length=0, codec=codec) as few:
        cache = few.cache()
        said = model.generate(ids, past_key_values=cache, **GREEDY)
        before = held(cache)
        count = cache.length
        model.generate(torch.cat([said, more], 1), past_key_values=cache, **GREEDY)
        for old, new in zip(before, held(cache), strict=True):
            assert new[:, :, :count].equal(old[:, :, :count])
        again = few.cache()
        assert model.generate(ids, past_key_values=again, **GREEDY).equal(said)


def test_the_prompt_is_attended_to_as_it_is() -> None:
    model, ids = make("llama"), padded(2, 40)[0].clamp(min=2)
    with torch.no_grad():
        expected = model(ids).logits
        with KeyTokens(model, 0.3, min_length=0, codec="int4") as few:
            torch.testing.assert_close(model(ids, past_key_values=few.cache()).logits, expected, rtol=0, atol=1e-5)
            cache = few.cache(prompt=40)
            parts = [model(ids[:, k : k + 10], past_key_values=cache).logits for k in range(0, 40, 10)]
            torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-5)


def test_int8_at_full_budget_stays_near_the_model() -> None:
    model, ids = make("llama"), padded(2, 40)[0].clamp(min=2)
    with torch.no_grad():
        expected = model(ids).logits[:, 30:].log_softmax(-1)
        with KeyTokens(model, 1.0, codec="int8") as few:
            cache = few.cache(prompt=30)
            model(ids[:, :30], past_key_values=cache)
            got = torch.cat([model(ids[:, k : k + 1], past_key_values=cache).logits for k in range(30, 40)], 1)
    found = got.log_softmax(-1)
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 1e-3


@each
def test_what_was_saved_goes_on_to_the_bit(codec: Codec) -> None:
    model, ids = make("llama"), padded(2, 40)[0].clamp(min=2)
    with KeyTokens(model, 0.5, min_length=0, policy="keyformer-dynamic", codec=codec) as few, torch.no_grad():
        cache, again, within = few.cache(max_new_tokens=9), few.cache(), few.cache()
        model(ids, past_key_values=cache)
        again.load_state_dict(cache.state_dict())
        # In the midst of a prompt its tokens are held as they are.
        part = few.cache(prompt=40, max_new_tokens=9)
        model(ids[:, :25], past_key_values=part)
        within.load_state_dict(part.state_dict())
        assert within.nbytes == part.nbytes > cache.nbytes
        model(ids[:, 25:], past_key_values=within)
        model(ids[:, 25:], past_key_values=part)
        for token in range(2, 11):
            one = torch.full((2, 1), token)
            logits = model(one, past_key_values=cache).logits
            assert model(one, past_key_values=again).logits.equal(logits)
            assert model(one, past_key_values=within).logits.equal(model(one, past_key_values=part).logits)
        other = KeyTokens(make("llama", seed=1), 0.5, min_length=0)
        with other, pytest.raises(InputError, match=f"coded as {codec.name}, these slots' as None"):
            other.cache().load_state_dict(cache.state_dict())


def test_bad_codecs() -> None:
    model = make("llama")
    with pytest.raises(InputError, match="there is no codec 'int3'"):
        KeyTokens(model, 0.5, codec="int3")
    with pytest.raises(InputError, match="multiple of 8 channels, got 6"):
        KeyTokens(make("qwen3", head_dim=6), 0.5, codec="int4")
    with KeyTokens(make("qwen3", head_dim=6), 0.5, min_length=0, codec=Int8()) as few:  # no power of two
        assert few.model.generate(padded(1, 40)[0].clamp(min=2), **GREEDY).shape == (1, 52)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="no essays: set VITALFEW_DATA")
def test_int8_costs_next_to_nothing_on_a_real_model() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    path = sorted(DATA.glob("*.txt.gz"))[3]
    tokens = tokenizer(gzip.decompress(path.read_bytes()).decode(), verbose=False).input_ids[:912]
    full, kl = follow(model, tokens, 768), {}
    for codec in (None, "int8", "fp8"):
        with KeyTokens(model, 0.5, policy="h2o", codec=codec) as few:
            ours = follow(model, tokens, 768, few.cache(prompt=768, max_new_tokens=144))
        kl[codec] = measure(ours, full, tokens[768:]).kl
    assert kl["int8"] <= kl[None] + 0.003
    assert kl["fp8"] <= kl[None] + 0.02
