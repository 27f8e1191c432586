"""Every family: a full budget changes nothing, and a smaller one is attention over exactly what is kept."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from vitalfew.generate.key_tokens import KeyTokens
from vitalfew.generate.policies import POLICIES

from .families import FAMILIES, make, padded

GREEDY = {"max_new_tokens": 12, "do_sample": False}
SOME = ("llama", "gemma3", "gpt2", "gptj", "mpt-6", "bloom", "falcon-alibi")
"""One of each kind; the rest of the matrix is slow."""

WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 4},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "sampling": {"do_sample": True, "top_k": 10},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "chunks": {"prefill_chunk_size": 7},
    "assisted": {"assistant_model": None},
}


def _slow_but(names: tuple[str, ...]) -> list[Any]:
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("name", FAMILIES)
def test_full_budget_changes_nothing(name: str) -> None:
    model = make(name)
    ids, mask = padded(4, 24)
    real = mask.bool()
    full = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = [model(ids[:, :9], attention_mask=mask[:, :9], past_key_values=full).logits]
        expected += [model(ids[:, 9:20], attention_mask=mask[:, :20], past_key_values=full).logits]
        expected += [model(ids[:, k : k + 1], attention_mask=mask[:, : k + 1], past_key_values=full).logits
                     for k in range(20, 24)]  # fmt: skip
    tokens = model.generate(ids, attention_mask=mask, **GREEDY)
    alone = model.generate(ids[:1], **GREEDY)
    with KeyTokens(model, 1.0) as few, torch.no_grad():
        cache = few.cache(prompt=20)
        got = [model(ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache).logits]
        got += [model(ids[:, 9:20], attention_mask=mask[:, :20], past_key_values=cache).logits]
        got += [model(ids[:, k : k + 1], attention_mask=mask[:, : k + 1], past_key_values=cache).logits
                for k in range(20, 24)]  # fmt: skip
        assert model.generate(ids, attention_mask=mask, **GREEDY).equal(tokens)
        assert model.generate(ids[:1], **GREEDY).equal(alone)
        without = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(torch.cat(got, 1)[real], torch.cat(expected, 1)[real], rtol=0, atol=1e-5)
    torch.testing.assert_close(without[real], torch.cat(expected, 1)[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["bloom-6", "falcon-alibi", "mpt-6"])
def test_a_long_text_has_the_biases_of_the_model(name: str) -> None:
    """Falcon rounds its biases to 8 bits, which shows from 256 tokens on."""
    model = make(name, **({"max_seq_len": 512} if name == "mpt-6" else {}))
    ids, mask = padded(2, 400)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        with KeyTokens(model, 1.0) as few:
            got = model(ids, attention_mask=mask, past_key_values=few.cache()).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", _slow_but(SOME))
def test_every_way_of_generating(name: str) -> None:
    model, assistant = make(name), make("llama", seed=1)
    ids, mask = padded(3, 24)
    ids[0, 12:] = ids[0, :12]  # something to look up

    def run(way: str) -> torch.Tensor:
        settings = dict(WAYS[way])
        if "assistant_model" in settings:
            settings["assistant_model"] = assistant
        rows = slice(0, 1) if way in ("lookup", "assisted") else slice(None)
        torch.manual_seed(5)
        return model.generate(ids[rows], attention_mask=mask[rows], **(GREEDY | settings))

    expected = {way: run(way) for way in WAYS}
    with KeyTokens(model, 1.0):
        for way in WAYS:
            assert run(way).equal(expected[way]), way
    with KeyTokens(model, 0.5, min_length=0) as few:
        one = model.generate(ids[:1], attention_mask=mask[:1], **GREEDY)
        assert run("lookup").equal(one)
        assert run("assisted").equal(one)
        assert run("chunks").equal(model.generate(ids, attention_mask=mask, **GREEDY))
        assert run("several").equal(run("several"))
        beams = run("beams")
        assert beams.shape == expected["beams"].shape
        assert all(g.nbytes < g.full_nbytes for g in few.generations)


class Oracle:
    """The plain model with all its keys, and in each full layer and head a mask over those that are kept."""

    def __init__(self, name: str) -> None:
        # Falcon in eager mode adds its ALiBi twice.
        self.model = make(name, attention="sdpa" if "alibi" in name else "eager")
        self.cache = DynamicCache(config=self.model.config)
        self.visible: dict[int, torch.Tensor] = {}
        self.masked = self.model.config.model_type == "mpt"
        for module in self.model.modules():
            if "Attention" in type(module).__name__ and hasattr(module, "layer_idx"):
                module.register_forward_pre_hook(self._mask, with_kwargs=True)

    def _mask(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        visible = self.visible.get(module.layer_idx)
        if visible is None:
            return args, kwargs
        heads = self.model.config.num_attention_heads
        visible = visible.repeat_interleave(heads // visible.shape[1], 1)[:, :, None]
        given = kwargs["attention_mask"]  # that of ALiBi may hold the bias
        if given is None or given.dtype == torch.bool:
            given = torch.zeros(())
        mask = ~visible if self.masked else torch.where(visible, given, torch.finfo(torch.float32).min)
        return args, kwargs | {"attention_mask": mask}

    def keep(self, cache: Any, padding: torch.Tensor, total: int) -> None:
        """See what a slot cache holds, and nothing else."""
        for layer in cache.slot_layers:
            pos = layer.evicting.slots.view()[2].long()
            seen = torch.zeros((*pos.shape[:2], total + 1), dtype=torch.bool)
            at = torch.where(pos < 0, total, pos + padding[:, None, None])
            self.visible[layer.evicting.layer] = seen.scatter_(2, at, True)[..., :total]


def _call(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    more = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        logits: torch.Tensor = model(ids, attention_mask=mask, past_key_values=cache, **more).logits
    return logits


def _follow(name: str, policy: str) -> None:
    prompt, steps = 24, 10
    model, oracle = make(name), Oracle(name)
    ids, mask = padded(2, prompt + steps, step=5)
    padding = (mask == 0).sum(1)
    with KeyTokens(model, 0.5, policy=policy, min_length=0, seed=3) as few:
        cache = few.cache(prompt=prompt, max_new_tokens=steps)
        got = _call(model, cache, ids[:, :prompt], mask[:, :prompt])
        expected = _call(oracle.model, oracle.cache, ids[:, :prompt], mask[:, :prompt])
        real = mask[:, :prompt].bool()
        torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-5)
        kept = []
        for k in range(prompt, prompt + steps):
            got = _call(model, cache, ids[:, k : k + 1], mask[:, : k + 1])
            oracle.keep(cache, padding, k + 1)
            expected = _call(oracle.model, oracle.cache, ids[:, k : k + 1], mask[:, : k + 1])
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
            kept.append([int(seen[row].sum(-1).max()) for seen in oracle.visible.values() for row in (0, 1)])
    assert all(counts == kept[0] for counts in kept)
    assert max(kept[0]) == prompt // 2
    assert min(kept[0]) == (prompt - 5) // 2


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_is_attention_over_what_is_kept(name: str) -> None:
    _follow(name, "keyformer")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["llama", pytest.param("mpt-6", marks=pytest.mark.slow)])
def test_a_step_is_attention_over_what_is_kept_by_every_policy(name: str, policy: str) -> None:
    _follow(name, policy)


@pytest.mark.parametrize("name", _slow_but((*SOME, "opt", "falcon-new")))
def test_half_precision(name: str) -> None:
    model = make(name).to(torch.bfloat16)
    ids, mask = padded(2, 24)
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).logits.float()
        with KeyTokens(model, 1.0) as few:
            got = model(ids, attention_mask=mask, past_key_values=few.cache()).logits.float()
            model.generate(ids, attention_mask=mask, **GREEDY)
            assert few.generations[0].nbytes > few.generations[0].full_nbytes  # scores are float32 at any rate
    real = mask.bool()
    # Two ways of rounding to 8 bits, layer after layer.
    assert (got - plain)[real].abs().mean() < 0.03 * plain[real].abs().mean() + 1e-3
