"""A step that is ready to be captured equals the ordinary one, moves no memory, and is traced only once."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from vitalfew.core.errors import InputError
from vitalfew.generate.key_tokens import KeyTokens
from vitalfew.generate.noise import gumbel_table
from vitalfew.generate.policies import POLICIES
from vitalfew.generate.quant import Int8

ROWS, PROMPT, STEPS = 3, 40, 12


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def padded():
    ids = torch.randint(1, 64, (ROWS, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(ROWS):
        ids[row, : 5 * row] = mask[row, : 5 * row] = 0
    return ids, mask


def begin(model, few):
    """Run a padded prompt, and return its cache and the first new tokens."""
    ids, mask = padded()
    cache = few.cache(prompt=PROMPT, max_new_tokens=STEPS)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    return cache, logits[:, -1:].argmax(-1)


def ordinary(model, cache, token, steps):
    _, mask = padded()
    got = []
    for _ in range(steps):
        done = cache.length - PROMPT
        mask_now = torch.cat((mask, mask.new_ones(ROWS, done + 1)), 1)
        positions = mask_now.sum(1, keepdim=True) - 1
        out = model(token, attention_mask=mask_now, position_ids=positions, past_key_values=cache)
        token = out.logits.argmax(-1)
        got.append(token)
    return torch.cat(got, 1)


def steady(call, clock, cache, token, steps):
    got, token = [], token.clone()
    for _ in range(steps):
        token.copy_(call(token, position_ids=clock.pos[:, None], past_key_values=cache).logits.argmax(-1))
        got.append(token.clone())
    return torch.cat(got, 1)


def held(cache):
    return [
        getattr(layer.evicting.slots, name)
        for layer in cache.slot_layers
        for name in ("keys", "values", "pos", "score", "marked")
    ]


@pytest.mark.parametrize("codec", [None, Int8()], ids=["plain", "int8"])
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_steady_steps_are_the_ordinary_ones(model, policy, codec):
    """Also in what they leave behind, and in what follows after the block."""
    with KeyTokens(model, 0.5, policy=policy, min_length=0, codec=codec) as few:
        cache, first = begin(model, few)
        want = ordinary(model, cache, first, STEPS)
        other, first = begin(model, few)
        got = ordinary(model, other, first, 2)
        with other.steady() as clock:
            got = torch.cat((got, steady(model, clock, other, got[:, -1:], STEPS - 4)), 1)
        assert other.length == cache.length - 2
        got = torch.cat((got, ordinary(model, other, got[:, -1:], 2)), 1)
    assert torch.equal(got, want)
    assert other.length == cache.length
    for mine, its in zip(held(other), held(cache), strict=True):
        if mine.dtype == torch.float32:
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(mine, its)
    for mine, its in zip(other.slot_layers, cache.slot_layers, strict=True):
        assert mine.evicting.slots.counts == its.evicting.slots.counts


@torch.no_grad()
def test_memory_stays_where_it_is(model):
    with KeyTokens(model, 0.5, policy="keyformer-dynamic", min_length=0) as few:
        cache, token = begin(model, few)
        with cache.steady() as clock:
            before = [tensor.data_ptr() for tensor in (*held(cache), clock.pos, clock.tau, clock.seen)]
            steady(model, clock, cache, token, 4)
            assert before == [tensor.data_ptr() for tensor in (*held(cache), clock.pos, clock.tau, clock.seen)]
            assert clock.pos.tolist() == [PROMPT - 5 * row + 4 for row in range(ROWS)]


class Asked(TorchDispatchMode):
    """Counts what waits for a device, or brings numbers of the host to it."""

    COUNTED = frozenset(("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "equal", "is_nonzero"))

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in self.COUNTED
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("codec", [None, Int8()], ids=["plain", "int8"])
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_a_step_neither_asks_the_host_nor_is_told(model, policy, codec, monkeypatch):
    """So that one can be captured."""
    with KeyTokens(model, 0.5, policy=policy, min_length=0, codec=codec) as few:
        cache, token = begin(model, few)
        with cache.steady() as clock:
            with Asked() as asked, monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "tolist", None)  # which on a CPU goes unseen
                steady(model, clock, cache, token, 2)
            # On a CPU alone a codec looks at the scales of each key and value that it writes.
            assert asked.count == (0 if codec is None else 2 * 2 * len(cache.layers))
            with Asked() as asked:
                assert int(clock.seen) + torch.tensor(1) > 0
            assert asked.count == 3


@torch.no_grad()
def test_the_temperature_ends_where_it_was_planned_to(model):
    with KeyTokens(model, 0.5, min_length=0) as few:
        cache, token = begin(model, few)
        with cache.steady() as clock:
            taus = []
            for _ in range(STEPS + 2):
                taus.append(clock.tau[0].item())
                steady(model, clock, cache, token, 1)
        want = [few.policy.temperature(step, STEPS) for step in range(1, STEPS + 3)]
    assert taus == pytest.approx(want)


@torch.no_grad()
def test_a_compiled_step_is_traced_once(model):
    """The whole step is one graph, and no later step asks for another."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    with KeyTokens(model, 0.5, min_length=0) as few:
        cache, token = begin(model, few)
        want = ordinary(model, cache, token, STEPS)
        cache, token = begin(model, few)
        compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
        with cache.steady() as clock:
            got = steady(compiled, clock, cache, token, STEPS)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(got, want)
    torch._dynamo.reset()


@torch.no_grad()
def test_rows_that_grow_are_refused(model):
    for settings in ({"budget": 1.0}, {"min_length": 100}):
        with KeyTokens(model, **{"min_length": 0, **settings}) as few:
            cache, token = begin(model, few)
            with pytest.raises(InputError, match="still grow"), cache.steady():
                pass
            ordinary(model, cache, token, 1)


@torch.no_grad()
def test_a_refusal_changes_nothing(model):
    with KeyTokens(model, 0.5, min_length=0) as few:
        cache, token = begin(model, few)
        ordinary(model, cache, token, 1)
        caps = cache.slot_layers[1].evicting.slots.caps
        cache.slot_layers[1].evicting.slots.caps = [None, *caps[1:]]
        with pytest.raises(InputError, match="layer 1 has rows that still grow"), cache.steady():
            pass
        cache.slot_layers[1].evicting.slots.caps = caps
        cache.crop(-1)
        assert cache.length == PROMPT


@torch.no_grad()
def test_what_a_captured_step_reads_stays(model):
    """Whatever noise others ask for meanwhile."""
    with KeyTokens(model, 0.5, policy="keyformer-dynamic", min_length=0, seed=7) as few:
        cache, token = begin(model, few)
        with cache.steady() as clock:
            steady(model, clock, cache, token, 1)
            table = weakref.ref(gumbel_table(7, torch.device("cpu")))
            gumbel_table.cache_clear()
            assert table() is not None
            before = table().data_ptr()
            assert gumbel_table(7, torch.device("cpu")).data_ptr() != before


@torch.no_grad()
def test_what_cannot_be_done_within_is_refused(model):
    with KeyTokens(model, 0.5, min_length=0) as few:
        cache, token = begin(model, few)
        with cache.steady() as clock:
            steady(model, clock, cache, token, 1)
            with pytest.raises(InputError, match="goes step by step"):
                model.generate(torch.ones(ROWS, PROMPT + 5, dtype=torch.int64), past_key_values=cache)
            with pytest.raises(InputError, match="cannot take 1 tokens back"):
                cache.crop(-1)
            for move in (
                cache.reset, cache.state_dict, lambda: cache.reorder_cache(torch.arange(ROWS)),
                lambda: cache.batch_repeat_interleave(2),
            ):  # fmt: skip
                with pytest.raises(InputError, match="stay where they are"):
                    move()
            steady(model, clock, cache, token, 1)


@torch.no_grad()
def test_a_block_of_tokens_is_refused(model):
    with KeyTokens(model, 0.5, min_length=0) as few:
        cache, token = begin(model, few)
        with cache.steady(), pytest.raises(InputError, match="take one token of 3 rows, got 2 of 3"):
            model(token.expand(-1, 2), past_key_values=cache)


@torch.no_grad()
def test_what_is_not_finite_is_told_on_leaving(model):
    with KeyTokens(model, 0.5, min_length=0) as few:
        cache, token = begin(model, few)
        hook = model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda module, args, out: out * torch.nan)
        try:
            with pytest.raises(InputError, match="not finite"), cache.steady() as clock:
                steady(model, clock, cache, token, 1)
        finally:
            hook.remove()
