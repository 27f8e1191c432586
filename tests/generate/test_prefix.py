"""A prefix is read once: forks go on as separate runs do, files are exact, and whatever does not fit is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vitalfew.core import InputError
from vitalfew.core.budget import Budget
from vitalfew.generate.key_tokens import KeyTokens
from vitalfew.generate.policies import Keyformer, Policy, SnapKV, then
from vitalfew.generate.prefix import CompressedPrefix, compress
from vitalfew.generate.quant import CODECS, Int8
from vitalfew.generate.states import load_state, save_state

from .families import make, padded

GREEDY = {"max_new_tokens": 12, "do_sample": False}
HOW: list[dict[str, Any]] = [
    {},
    {"policy": "keyformer-dynamic", "budget": 0.4, "seed": 3},
    {"policy": then(SnapKV(window=16), Keyformer()), "budget": 24, "layers": [3.0, 1.0], "question": slice(-8, None)},
    {"policy": "h2o", "budget": "20 KiB", "protect": [slice(0, 5), slice(-3, None)], "codec": "int8"},
    {"policy": "snapkv", "budget": Budget.cover(0.9), "recent": 0.2, "codec": "int4"},
    {"budget": 1.0, "codec": "fp8", "min_length": 100},
]


def text(count: int = 60, *, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return padded(rows, count, seed=seed)[0].clamp(min=2)


def state_of(cache: Any, row: int) -> list[torch.Tensor]:
    """Return all that a row of a cache holds, but not what lies in slots without a token."""
    found = []
    for layer in cache.slot_layers:
        state = layer.evicting.state_dict()
        live = state["pos"][row] >= 0
        found += [state[name][row][live] for name in ("pos", "keys", "values", "score")]
    return found


@pytest.mark.parametrize("how", HOW)
def test_forks_are_separate_runs(how: dict[str, Any]) -> None:
    model, questions = make("llama"), text(7, rows=8, seed=4)
    prefix = compress(model, text(), **how)
    with prefix.serve(model):
        asked = prefix.followed_by(questions)
        together = model.generate(**asked, **GREEDY)
        for row in range(8):
            cache = prefix.fork()
            ids = torch.cat((text(), questions[row : row + 1]), 1)
            assert model.generate(ids, past_key_values=cache, **GREEDY)[0].equal(together[row])
            for one, many in zip(state_of(cache, 0), state_of(asked["past_key_values"], row), strict=True):
                assert one.shape == many.shape
                if one.dtype == torch.float32:  # sums over rows may be done in another order
                    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-4)
                elif one.dtype == torch.int32:
                    assert one.equal(many)


@pytest.mark.parametrize("how", HOW)
def test_a_fork_is_the_run_that_read_the_text(how: dict[str, Any]) -> None:
    """To the bit: reading the text, then going on, is what the fork does."""
    model = make("llama")
    prefix = compress(model, text(), **how)
    with prefix.serve(model) as few, torch.no_grad():
        cache, fork = few.cache(prompt=60), prefix.fork()
        model(text(), past_key_values=cache)
        assert prefix.nbytes == cache.nbytes == fork.nbytes
        for step in range(12):
            expected = model(torch.tensor([[step + 3]]), past_key_values=cache).logits
            assert model(torch.tensor([[step + 3]]), past_key_values=fork).logits.equal(expected)
        for x, y in zip(state_of(cache, 0), state_of(fork, 0), strict=True):
            assert x.equal(y)
        # The prefix is as it was.
        again = prefix.fork()
        assert again.length == 60
        assert model(torch.tensor([[3]]), past_key_values=again).logits.isfinite().all()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gptj", "mpt-6", "bloom", "falcon-alibi"])
def test_questions_of_any_length_as_whole_texts_or_alone(name: str) -> None:
    model, step = make(name), 0 if name == "gemma3" else 2
    prefix = compress(model, text(), budget=0.5)
    questions, mask = padded(3, 9, step=step, seed=4)
    with prefix.serve(model):
        whole = model.generate(**prefix.followed_by(questions, mask), **GREEDY)
        asked = prefix.followed_by(questions, mask) | {"input_ids": questions}
        assert model.generate(**asked, **GREEDY)[:, 9:].equal(whole[:, 69:])
        for row in range(3):
            alone = model.generate(**prefix.followed_by(questions[row : row + 1, step * row :]), **GREEDY)
            assert alone[0, -12:].equal(whole[row, -12:])


def test_beams_and_a_second_question() -> None:
    model, question = make("llama"), text(7, seed=4)
    prefix = compress(model, text(), budget=0.5)
    with prefix.serve(model):
        whole = model.generate(**prefix.followed_by(question, each=3), num_beams=3, **GREEDY)
        assert whole.shape == (1, 79)
        cache = prefix.fork()
        said = model.generate(torch.cat((text(), question), 1), past_key_values=cache, **GREEDY)
        more = model.generate(torch.cat((said, text(5, seed=6)), 1), past_key_values=cache, **GREEDY)
        assert more.shape == (1, 96)
        assert cache.slot_layers[0].evicting.slots.filled == [(60 + 7 + 12 + 5) // 2]


def test_settings_of_the_one_that_goes_on() -> None:
    model = make("llama")
    prefix = compress(model, text(), budget=0.25)
    with KeyTokens(model, 1.0) as few:
        cache = prefix.fork(few=few)
        model.generate(torch.cat((text(), text(7, seed=4)), 1), past_key_values=cache, **GREEDY)
        assert cache.slot_layers[0].evicting.physical == 15 + 7 + 11  # nothing more went
    with KeyTokens(model, 1.0, codec="int8") as few, pytest.raises(InputError, match="coded as None"):
        prefix.fork(few=few)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_files_are_exact(name: str, how: dict[str, Any], tmp_path: Path) -> None:
    model = make(name)
    if name == "gemma3":
        how = {key: value for key, value in how.items() if key != "layers"}
    prefix = compress(model, text()[0].tolist(), **how)
    prefix.save(tmp_path / "a.safetensors")
    again = CompressedPrefix.load(tmp_path / "a.safetensors", model)
    assert again.key == prefix.key
    assert (again.tokens, again.settings, again.about) == (prefix.tokens, prefix.settings, prefix.about)
    again.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with prefix.serve(model):
        asked = [model.generate(**one.followed_by(text(7, rows=2, seed=4)), **GREEDY) for one in (prefix, again)]
    assert asked[0].equal(asked[1])


def test_the_key_knows_all_that_matters() -> None:
    model = make("llama")
    base: dict[str, Any] = {"policy": "h2o", "budget": 0.5}
    keys = {
        compress(model, ids, **base | more).key
        for ids, more in [
            (text(), {}), (text(seed=1), {}), (text(), {"policy": "snapkv"}), (text(), {"budget": 0.4}),
            (text(), {"budget": 30}), (text(), {"seed": 1}), (text(), {"codec": "int8"}), (text(), {"recent": 3}),
        ]
    }  # fmt: skip
    assert len(keys) == 8
    assert compress(make("llama"), text(), **base).key in keys
    assert compress(make("llama", seed=1), text(), **base).key not in keys
    with KeyTokens(model, 0.3):  # enabled or not, and whatever for
        assert compress(model, text(), **base).key in keys


def _one_weight(model: Any) -> Any:
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1e-6
    return model


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("class", lambda: make("mistral")),
        ("config", lambda: make("llama", rope_parameters={"rope_type": "default", "rope_theta": 20000.0})),
        ("dtype", lambda: make("llama").bfloat16()),
        ("weights", lambda: make("llama", seed=1)),
        ("weights", lambda: _one_weight(make("llama"))),
    ],
)
def test_another_model_is_refused(field: str, other: Callable[[], Any], tmp_path: Path) -> None:
    prefix = compress(make("llama"), text())
    prefix.save(tmp_path / "a.safetensors")
    stranger = other()
    with pytest.raises(InputError, match=f"its {field} is"):
        CompressedPrefix.load(tmp_path / "a.safetensors", stranger)
    with pytest.raises(InputError, match=f"its {field} is"):
        prefix.serve(stranger)
    assert stranger.config._attn_implementation == "sdpa"


def _header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the JSON of a file, and leave its tensors as they are."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    outer = json.loads(raw[8 : 8 + size])
    document = json.loads(outer["__metadata__"]["vitalfew"])
    change(document)
    outer["__metadata__"]["vitalfew"] = json.dumps(document)
    text = json.dumps(outer).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def test_torn_and_altered_files_are_refused(tmp_path: Path) -> None:
    model, path = make("llama"), tmp_path / "a.safetensors"
    prefix = compress(model, text())

    def refuse(words: str) -> None:
        with pytest.raises(InputError, match=words) as caught:
            CompressedPrefix.load(path, model)
        assert caught.value.hint

    refuse("no such file")
    prefix.save(path)
    whole = path.read_bytes()
    for size in (0, 7, 300, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refuse("torn")
    path.write_bytes(whole + b"x")
    refuse("torn")
    places = load_file(tmp_path / "a.safetensors") if path.write_bytes(whole) else {}
    for back in range(1, len(whole) - whole.index(b"}}") - 8, 997):
        altered = bytearray(whole)
        altered[-back] ^= 1
        path.write_bytes(altered)
        refuse(r"the tensor \d\.\w+ of .* was altered")
    assert len(places) == 2 * 5 + 2
    for name, value in (("seed", 1), ("budget", ["share", 0.9])):
        path.write_bytes(whole)
        _header(path, lambda document, name=name, value=value: document["settings"].update({name: value}))
        refuse("header")
    path.write_bytes(whole)
    _header(path, lambda document: document.update(tokens=document["tokens"][:-1]))
    refuse("header")
    path.write_bytes(whole)
    _header(path, lambda document: document.update(version=2))
    refuse("version 2")
    save_state(path, prefix.fork().state_dict())
    refuse("schema 'vitalfew/cache'")
    path.write_bytes(whole)
    assert CompressedPrefix.load(path, model).key == prefix.key
    with pytest.raises(InputError, match="schema 'vitalfew/prefix'"):
        load_state(path)


class _Own(Policy):
    pass


class _Coarse(Int8):
    pass


def test_bad_inputs(refuses: Callable[..., Any]) -> None:
    model = make("llama")
    for ids, value in ((text(rows=2), (2, 60)), (torch.zeros(1, 0, dtype=torch.long), (0,)), (torch.ones(5), (5,))):
        with refuses(value):
            compress(model, ids)
    with refuses("_Own"):
        compress(model, text(), policy=_Own())
    assert CODECS["int8"] == Int8()
    with refuses("_Coarse"):
        compress(model, text(), codec=_Coarse())
    with refuses("int3"):
        compress(model, text(), codec="int3")
    prefix = compress(model, text())
    with refuses(0):
        prefix.fork(0)
    with prefix.serve(model):
        with refuses(7):  # new tokens, and no mask that says so
            model.generate(text(7), past_key_values=prefix.fork(), **GREEDY)
        with refuses(60):
            model.generate(text(), past_key_values=prefix.fork(), **GREEDY)
        with refuses("2"):
            model.generate(torch.cat((text(), text(7)), 1).repeat(2, 1), past_key_values=prefix.fork(3), **GREEDY)
    assert model.config._attn_implementation == "sdpa"
    with refuses("windows"):
        compress(make("gemma3"), text()).followed_by(*padded(2, 7))


@pytest.mark.parametrize("policy", ["keyformer-dynamic", "tova", "random"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom"])
def test_a_generation_goes_on_in_another_process(name: str, policy: str, tmp_path: Path) -> None:
    """Stopped after five tokens, saved, loaded: the rest is to the bit what it would have been."""
    ids, mask = padded(2, 30)
    with KeyTokens(make(name), 0.5, policy=policy, min_length=0, seed=5) as few:
        expected = few.model.generate(ids, attention_mask=mask, **GREEDY)
        cache = few.cache()
        few.model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False,
                           stopping_criteria=[_after(35)])  # fmt: skip
        assert cache.length == 34
        save_state(tmp_path / "run.safetensors", cache.state_dict())
    with KeyTokens(make(name), 0.5, policy=policy, min_length=0, seed=5) as few:
        again = few.cache()
        again.load_state_dict(load_state(tmp_path / "run.safetensors"))
        grown = torch.cat((mask, torch.ones(2, 5, dtype=torch.long)), 1)
        rest = few.model.generate(
            expected[:, :35], attention_mask=grown, past_key_values=again, max_new_tokens=7, do_sample=False
        )
        assert rest.equal(expected)
        few.model.generate(ids, attention_mask=mask, past_key_values=(whole := few.cache()), **GREEDY)
        for row in range(2):
            for x, y in zip(state_of(again, row), state_of(whole, row), strict=True):
                assert x.equal(y)


def _after(count: int) -> Callable[..., torch.Tensor]:
    def stop(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= count)

    return stop
