"""Rows, generations and threads are strangers to each other; a conversation goes on; and all is undone."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.masking_utils import AttentionMaskInterface

from vitalfew.core.errors import InputError
from vitalfew.generate.key_tokens import KeyTokens

from .families import FAMILIES, make, padded

GREEDY = {"max_new_tokens": 12, "do_sample": False}
SOME = ("llama", "gemma3", "gpt2", "gptj", "mpt-6", "bloom", "falcon-alibi")
SLOW_BUT_SOME = [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("name", SLOW_BUT_SOME)
def test_a_row_does_not_know_its_batch(name: str) -> None:
    model = make(name)
    ids, mask = padded(4, 30)
    with KeyTokens(model, 0.5, policy="keyformer-dynamic", min_length=0, seed=2):
        batch = model.generate(ids, attention_mask=mask, **GREEDY)
        for row in range(4):
            own = model.generate(ids[row : row + 1, 3 * row :], **GREEDY)
            assert own[0].equal(batch[row, 3 * row :])
        order = torch.tensor([2, 0, 3, 1])
        assert model.generate(ids[order], attention_mask=mask[order], **GREEDY).equal(batch[order])


@pytest.mark.parametrize("name", ["llama", "gptj", "falcon-alibi"])
def test_generations_do_not_know_each_other(name: str) -> None:
    model = make(name)
    first, second = padded(2, 30, seed=1)[0], padded(2, 24, seed=2)[0]
    first[first == 0] = second[second == 0] = 5

    def step(cache: Any, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)

    with KeyTokens(model, 0.5, min_length=0) as few:
        alone = {len(ids[0]): model.generate(ids, **GREEDY) for ids in (first, second)}
        caches = [few.cache(max_new_tokens=12), few.cache(max_new_tokens=12)]
        said = [[step(caches[k], ids)] for k, ids in enumerate((first, second))]
        for _ in range(11):
            for k in range(2):
                said[k].append(step(caches[k], said[k][-1]))
        for k, ids in enumerate((first, second)):
            assert torch.cat([ids, *said[k]], 1).equal(alone[len(ids[0])])

        found: dict[int, torch.Tensor] = {}
        threads = [
            threading.Thread(target=lambda ids=ids: found.update({len(ids[0]): model.generate(ids, **GREEDY)}))
            for ids in (first, second)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(found[length].equal(alone[length]) for length in alone)


@pytest.mark.parametrize("name", SLOW_BUT_SOME)
def test_a_conversation_goes_on_with_one_cache(name: str) -> None:
    model = make(name)
    ids, mask = padded(2, 24)
    more = padded(2, 9, seed=9)[0].clamp(min=2)

    def turns(cache: Any) -> torch.Tensor:
        said = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
        again = torch.cat([said, more], 1)
        all_of = torch.cat([mask, torch.ones(2, again.shape[1] - 24, dtype=torch.long)], 1)
        return model.generate(again, attention_mask=all_of, past_key_values=cache, **GREEDY)

    expected = turns(DynamicCache(config=model.config))
    with KeyTokens(model, 1.0) as few:
        assert turns(few.cache()).equal(expected)
    with KeyTokens(model, 0.5, min_length=0) as few:
        cache = few.cache()
        once = turns(cache)
        for layer in cache.slot_layers:
            # The second turn's prompt is all that was said, and half of that may be kept.
            assert layer.evicting.slots.filled[0] <= (24 + 12 + 9) // 2
        assert turns(few.cache()).equal(once)


def test_embeddings_instead_of_tokens() -> None:
    model = make("llama")
    ids, mask = padded(2, 24)
    with KeyTokens(model, 0.5, min_length=0):
        tokens = model.generate(ids, attention_mask=mask, **GREEDY)[:, 24:]
        embeds = model.get_input_embeddings()(ids).detach()
        assert model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY).equal(tokens)


@pytest.mark.parametrize("name", ["llama", "bloom", "falcon-alibi"])
def test_padding_anywhere_is_nothing_to_a_call(name: str) -> None:
    """Own positions, not columns: the same tokens with padding on the right and between are the same row."""
    model = make(name)
    ids = padded(1, 20)[0].clamp(min=2)
    wide = torch.cat([ids[:, :14], torch.zeros(1, 5, dtype=torch.long), ids[:, 14:]], 1)
    mask = torch.ones_like(wide)
    mask[:, 14:19] = 0
    at = (mask.cumsum(1) - 1).clamp(min=0)
    place = {} if name == "bloom" else {"position_ids": at}
    with KeyTokens(model, 0.5, min_length=0) as few, torch.no_grad():
        tight, loose = few.cache(), few.cache()
        model(ids[:, :14], past_key_values=tight)
        model(wide[:, :19], attention_mask=mask[:, :19], past_key_values=loose,
              **{key: value[:, :19] for key, value in place.items()})  # fmt: skip
        for k in range(14, 20):
            expected = model(ids[:, k : k + 1], past_key_values=tight).logits
            got = model(wide[:, k + 5 : k + 6], attention_mask=mask[:, : k + 6], past_key_values=loose,
                        **{key: value[:, k + 5 : k + 6] for key, value in place.items()}).logits  # fmt: skip
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def _state(model: Any) -> dict[str, Any]:
    """Return all of a model and its process that enabling might touch."""
    found: dict[str, Any] = {"class": type(model), "settings": model.generation_config.to_dict()}
    for registry in (AttentionInterface, AttentionMaskInterface):
        found[registry.__name__] = dict(registry._global_mapping)
    for path, module in model.named_modules():
        found[path] = {
            key: dict(value) if isinstance(value, dict) else value for key, value in module.__dict__.items()
            if key not in ("config", "generation_config")
        }  # fmt: skip
        if hasattr(module, "config"):
            config = module.config
            found[f"{path}.config"] = (id(config), copy.deepcopy(config.to_dict()), config._attn_implementation)
    return found


class _Breaks(LogitsProcessor):
    def __init__(self, error: type[BaseException]) -> None:
        self.error, self.left = error, 4

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if not self.left:
            raise self.error("in mid-generation")
        return scores


@pytest.fixture
def states() -> Iterator[dict[str, Any]]:
    """Give a place for the first and the second state; they must be the same."""
    both: dict[str, Any] = {}
    yield both
    for key, value in both["before"].items():
        assert both["after"][key] == value, key
    assert both["before"].keys() == both["after"].keys()


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gptj", "codegen", "mpt", "bloom", "falcon"])
def test_everything_is_undone(name: str, error: type[BaseException] | None, states: dict[str, Any]) -> None:
    model = make(name)
    ids, mask = padded(2, 24)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)  # some modules remember their last input's length
    states["before"] = _state(model)
    few = KeyTokens(model, 0.5, min_length=0)
    assert _state(model) != states["before"]
    half = model.generate(ids, attention_mask=mask, **GREEDY)
    if error is None:
        few.undo()
    else:
        with pytest.raises(error), few:
            model.generate(ids, attention_mask=mask, logits_processor=LogitsProcessorList([_Breaks(error)]), **GREEDY)
    states["after"] = _state(model)
    few.undo()
    assert model.generate(ids, attention_mask=mask, **GREEDY).equal(expected)
    with KeyTokens(model, 0.5, min_length=0):
        assert model.generate(ids, attention_mask=mask, **GREEDY).equal(half)


def test_a_generation_that_broke_goes_on() -> None:
    model = make("llama")
    ids = padded(1, 24)[0].clamp(min=2)
    with KeyTokens(model, 0.5, min_length=0) as few:
        expected = model.generate(ids, **GREEDY)
        cache = few.cache()
        with pytest.raises(ValueError, match="mid-generation"):
            model.generate(
                ids, past_key_values=cache, logits_processor=LogitsProcessorList([_Breaks(ValueError)]), **GREEDY
            )
        so_far = expected[:, : cache.length + 1]
        cache.expect(24, 12)
        with torch.no_grad():
            for _ in range(expected.shape[1] - so_far.shape[1]):
                next_one = model(so_far[:, -1:], past_key_values=cache).logits.argmax(-1)
                so_far = torch.cat([so_far, next_one], 1)
        assert so_far.equal(expected)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("start", [0, 24])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gptj"])
def test_a_call_that_fails_half_way(name: str, error: type[BaseException], start: int, count: int) -> None:
    model = make(name)
    ids = padded(2, 29)[0].clamp(min=2)
    fails = [False]

    def hook(module: Any, args: Any, out: Any) -> None:
        if fails[0]:
            raise error("half way")

    with KeyTokens(model, 0.5, min_length=0) as few, torch.no_grad():
        good, cache = few.cache(prompt=24), few.cache(prompt=24)
        if start:
            model(ids[:, :24], past_key_values=good)
            model(ids[:, :24], past_key_values=cache)
        expected = model(ids[:, start : start + count], past_key_values=good).logits
        # In the last layer, after it has taken the tokens in.
        last = [m for m in model.modules() if "MLP" in type(m).__name__][-1].register_forward_hook(hook)
        fails[0] = True
        with pytest.raises(error, match="half way"):
            model(ids[:, start : start + count], past_key_values=cache)
        fails[0] = False
        last.remove()
        if start and count > 1:
            # What several tokens displaced is gone: the cache must say so rather than go on without them.
            with pytest.raises(InputError, match="half way"):
                model(ids[:, start : start + count], past_key_values=cache)
            cache.reset()
            model(ids[:, :24], past_key_values=cache)
        assert model(ids[:, start : start + count], past_key_values=cache).logits.equal(expected)


def test_models_with_one_configuration() -> None:
    model, other = make("llama"), make("llama", seed=1)
    other.config = other.model.config = model.config
    for layer in other.model.layers:
        layer.self_attn.config = model.config
    ids = padded(1, 24)[0].clamp(min=2)
    expected = other.generate(ids, **GREEDY)
    with KeyTokens(model, 0.5, min_length=0):
        assert other.generate(ids, **GREEDY).equal(expected)
        with pytest.raises(InputError, match="shares its configuration"):
            KeyTokens(other, 0.5)
    assert model.config._attn_implementation == "sdpa"


def test_two_models_at_a_time() -> None:
    model, other = make("llama"), make("gptj")
    first, second = KeyTokens(model, 0.5, min_length=0), KeyTokens(other, 0.5, min_length=0)
    ids = padded(1, 24)[0].clamp(min=2)
    model.generate(ids, **GREEDY)
    first.undo()
    other.generate(ids, **GREEDY)
    assert second.generations[0].nbytes < second.generations[0].full_nbytes
    second.undo()
    assert "vitalfew_slots" not in AttentionInterface._global_mapping
