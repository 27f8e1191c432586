"""Rows of many requests in one batch: each is written as if it were alone, and bytes are counted at every step."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from vitalfew.core.errors import InputError
from vitalfew.generate._transformers_weights import load
from vitalfew.generate.key_tokens import KeyTokens
from vitalfew.generate.policies import H2O, SnapKV, then
from vitalfew.generate.server._transformers_engine import Engine
from vitalfew.generate.server.jobs import Done, Job, Piece
from vitalfew.generate.server.requests import ApiError, parse
from vitalfew.generate.server.serving import Serving, Settings

from .serving import counted, wait_for
from .tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"), context=1024)


class Client:
    """Collects one request's answers."""

    def __init__(self, served: Serving, prompt: Any, **body: Any) -> None:
        self.served, self.found, self.over = served, [], threading.Event()
        ask = parse({"model": "tiny", "prompt": prompt, "temperature": 0, **body}, chat=False)
        self.jobs: list[Job] = served.jobs(ask, self.emit)
        served.scheduler.submit(self.jobs)

    def emit(self, found: Piece | Done | ApiError) -> None:
        self.found.append(found)
        if not isinstance(found, Piece):
            self.over.set()

    def tokens(self, index: int = 0) -> list[int]:
        assert self.over.wait(60)
        pieces = [part for part in self.found if isinstance(part, Piece) and part.index == index]
        assert isinstance(self.found[-1], Done), self.found[-1].message
        return [token.id for piece in pieces for token in piece.tokens]


@contextmanager
def serve(folder: Path, ends: bool = False, **settings: Any) -> Iterator[Serving]:
    model, tokenizer = load(folder)
    before = set(model.__dict__), model.config._attn_implementation
    if not ends:
        tokenizer.eos_token = None  # so that an answer has the tokens that it asked for
    served = Serving(model, tokenizer, Settings("tiny", **{"min_length": 0, "kv_memory": "8 MiB", **settings}))
    try:
        yield served
    finally:
        served.close()
        assert (set(model.__dict__), model.config._attn_implementation) == before


POLICIES: list[Any] = [
    "keyformer", "keyformer-dynamic", "snapkv", "streaming",
    *(
        pytest.param(policy, marks=pytest.mark.slow)
        for policy in ("keyformer-frozen", "h2o", "tova", "random", then(SnapKV(window=8), H2O()))
    ),
]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_sixteen_staggered_requests_are_written_as_each_alone(folder: Path, policy: Any) -> None:
    draw = random.Random(0)
    prompts = [[draw.randrange(2, 258) for _ in range(draw.choice((20, 60, 130, 300)))] for _ in range(16)]
    lengths = [draw.randint(5, 40) for _ in prompts]
    # Some are shorter than min_length when they come, and are chosen from in the midst of the others.
    with serve(folder, policy=policy, min_length=80, chunk=64) as served:
        alone = [Client(served, p, max_tokens=n, logprobs=2) for p, n in zip(prompts, lengths, strict=True) if p]
        for one in alone:
            one.over.wait(60)
    with serve(folder, policy=policy, min_length=80, chunk=64) as served:
        one_by_one = []
        for prompt, length in zip(prompts, lengths, strict=True):
            one = Client(served, prompt, max_tokens=length, logprobs=2)
            one.tokens()
            one_by_one.append(one)
    for together, single in zip(alone, one_by_one, strict=True):
        same_until_a_tie(together, single)


def same_until_a_tie(together: Client, single: Client) -> None:
    """Sums of floats differ with the batch, so that a tie of the two best tokens may go either way."""
    a, b = together.tokens(), single.tokens()
    assert len(a) == len(b)
    if a != b:
        at = next(k for k in range(len(a)) if a[k] != b[k])
        token = [t for part in single.found if isinstance(part, Piece) for t in part.tokens][at]
        assert token.top[0][1] - token.top[1][1] < 1e-4


def test_a_request_alone_is_what_generate_writes(folder: Path) -> None:
    prompt = list(range(2, 202))
    with serve(folder, chunk=512) as served:
        written = Client(served, prompt, max_tokens=30, logprobs=0).tokens()
    model, _ = load(folder)
    # The server knows the answer's length too, so the temperature rises alike.
    with KeyTokens(model, 0.5, min_length=0):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)
    assert out[0, 200:].tolist() == written


def test_full_budget_is_the_plain_model(folder: Path) -> None:
    prompt = list(range(2, 202))
    with serve(folder, budget=1.0) as served:
        clients = [Client(served, prompt[: 50 * k], max_tokens=30, logprobs=0) for k in (1, 2, 3, 4)]
        written = [client.tokens() for client in clients]
    model, _ = load(folder)
    for k, tokens in enumerate(written, 1):
        out = model.generate(torch.tensor([prompt[: 50 * k]]), max_new_tokens=30, do_sample=False)
        assert out[0, 50 * k :].tolist() == tokens


def test_a_request_may_have_a_budget_of_its_own(folder: Path) -> None:
    prompt, shares = list(range(2, 202)), (0.25, 0.5, 1.0, 0.25)
    with serve(folder) as served:
        seen = counted(served)
        both = [Client(served, prompt, max_tokens=30, logprobs=0, kv_budget=share) for share in shares]
        written = [client.tokens() for client in both]
        kept = [client.found[-1].kept_bytes for client in both]
        with pytest.raises(ApiError, match="kv_budget"):
            Client(served, prompt, kv_budget=1.5)
    assert kept == [2 * (144 * slots + 16) for slots in (64, 128, 256, 64)]
    assert seen
    for share, tokens in zip(shares, written, strict=True):
        with serve(folder, budget=share) as served:
            assert Client(served, prompt, max_tokens=30, logprobs=0).tokens() == tokens


def test_answers_to_one_prompt_share_its_reading(folder: Path) -> None:
    with serve(folder) as served:
        client = Client(served, list(range(2, 102)), n=3, max_tokens=20, temperature=1, seed=4, logprobs=0)
        three = [client.tokens(k) for k in range(3)]
        one = Client(served, list(range(2, 102)), n=1, max_tokens=20, temperature=1, seed=4, logprobs=0).tokens()
        assert served.scheduler.metrics.tokens["prompt"] == 200
    assert three[0] == one
    assert len({tuple(tokens) for tokens in three}) == 3


@pytest.mark.parametrize("budget", [0.5, 64, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.25, 1.0))])
def test_overload_never_holds_more_than_the_memory(folder: Path, budget: float) -> None:
    draw = random.Random(1)
    with serve(folder, budget=budget, kv_memory=300_000, min_length=100, chunk=50) as served:
        seen = counted(served)
        clients = [
            Client(
                served, [draw.randrange(2, 258) for _ in range(draw.randint(5, 400))], max_tokens=draw.randint(1, 60),
                n=draw.choice((1, 1, 2)), logprobs=0,
            )
            for _ in range(40)
        ]  # fmt: skip
        for client in clients:
            client.tokens()
        until_free(served)
    assert 0.5 * 300_000 < max(seen) <= 300_000


def test_half_the_budget_is_room_for_more(folder: Path) -> None:
    most = []
    for budget in (1.0, 0.5):
        with serve(folder, budget=budget, kv_memory=8 * 2 * (144 * 640 + 16), chunk=600) as served:
            step, rows = served.scheduler.engine.step, []

            def counting(tokens: Any, step: Callable[..., Any] = step, rows: list[int] = rows) -> torch.Tensor:
                rows.append(len(tokens))
                return step(tokens)

            served.scheduler.engine.step = counting
            clients = [Client(served, [5 + k] * 600, max_tokens=40, logprobs=0) for k in range(24)]
            for client in clients:
                client.tokens()
            most.append(max(rows))
    assert most[0] == 8
    assert most[1] >= 1.8 * most[0]


def test_refuses_what_never_fits_and_what_must_wait_too_long(folder: Path) -> None:
    with serve(folder, kv_memory=100_000, queue=3) as served:
        with pytest.raises(ApiError, match="needs") as error:
            Client(served, [5] * 400, max_tokens=10)
        assert (error.value.status, error.value.code) == (400, "kv_memory_exceeded")
        with held(served) as go:
            first = [Client(served, [5] * 200, max_tokens=5, logprobs=0) for _ in range(3)]
            with pytest.raises(ApiError, match="waiting") as error:
                Client(served, [5] * 200, max_tokens=5)
            assert error.value.status == 429
            assert error.value.retry is not None
            assert error.value.retry >= 1
            go.set()
        for client in first:
            client.tokens()


@contextmanager
def held(served: Serving) -> Iterator[threading.Event]:
    """Let the model wait in its first chunk until the event is set."""
    engine, go, inside = served.scheduler.engine, threading.Event(), threading.Event()
    advance = engine.advance

    def waiting() -> torch.Tensor | None:
        inside.set()
        assert go.wait(20)
        return advance()

    engine.advance = waiting
    first = Client(served, [7] * 20, max_tokens=1, logprobs=0)
    assert inside.wait(10)
    yield go
    go.set()
    engine.advance = advance
    first.tokens()


def test_who_waits_is_overtaken_only_so_often(folder: Path) -> None:
    with serve(folder, kv_memory=100_000) as served, held(served) as go:
        order: list[str] = []
        hold = Client(served, [9] * 100, max_tokens=60, logprobs=0)
        large = Client(served, [5] * 340, max_tokens=5, logprobs=0)  # fits only when nothing else is there
        small = [Client(served, [6 + k] * 20, max_tokens=8, logprobs=0) for k in range(40)]
        for name, client in [("hold", hold), ("large", large), *(("small", one) for one in small)]:
            for job in client.jobs:
                job.emit = lambda found, emit=job.emit, name=name: (order.append(name), emit(found))[1]
        go.set()
        for client in (hold, large, *small):
            client.tokens()
        done = [name for k, name in enumerate(order) if name != (order[k - 1] if k else "")]
    assert large.jobs[0].overtaken <= 16
    assert large.jobs[0].overtaken > 0, "nothing went past a request that found no room"
    assert "large" in done


def test_cancelled_and_late_requests_leave(folder: Path) -> None:
    with serve(folder, timeout=1.0) as served, held(served) as go:
        waiting = Client(served, [5] * 100, max_tokens=50)
        served.scheduler.cancel(waiting.jobs)
        late = Client(served, [5] * 100, max_tokens=50)
        late.jobs[0].deadline = time.monotonic()
        fine = Client(served, [5] * 100, max_tokens=5, logprobs=0)
        go.set()
        assert len(fine.tokens()) == 5
        assert late.over.wait(10)
        assert (late.found[-1].status, late.found[-1].code) == (504, "timeout")
        assert waiting.found == []
        assert served.scheduler.metrics.requests["cancelled"] == 1


def test_cancelling_frees_slots_before_the_next_step(folder: Path) -> None:
    with serve(folder) as served:
        engine, sizes, one = served.scheduler.engine, [], []
        step = engine.step

        def counting(tokens: Any) -> torch.Tensor:
            sizes.append((len(tokens), engine.nbytes))
            if len(sizes) == 5:
                served.scheduler.cancel(one[0].jobs)
            return step(tokens)

        engine.step = counting
        with held(served) as go:
            one.append(Client(served, [5] * 100, max_tokens=60, n=2))
            other = Client(served, [6] * 100, max_tokens=30, logprobs=0)
            go.set()
        other.tokens()
    at = next(k for k, (rows, _) in enumerate(sizes) if rows == max(r for r, _ in sizes))
    after = sizes[5 if at < 5 else at + 1 :]
    assert {rows for rows, _ in sizes[5:]} <= {0, 1}
    assert len({held for _, held in after}) == 1


def test_a_failure_is_one_requests_own(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serve(folder) as served:
        assert len(Client(served, [5], max_tokens=5, logprobs=0).tokens()) == 5  # whole at first
        engine = served.scheduler.engine
        advance, step = engine.advance, engine.step

        def fail(*args: Any) -> torch.Tensor:
            engine.advance, engine.step = advance, step
            raise RuntimeError("broken")

        engine.advance = fail
        bad, good = (Client(served, [5] * 100, max_tokens=5, logprobs=0) for _ in range(2))
        assert len(good.tokens()) == 5
        assert bad.found[-1].status == 500
        engine.step = fail
        bad = Client(served, [5] * 100, max_tokens=5)
        assert bad.over.wait(10)
        assert bad.found[-1].status == 500
        assert "broken" not in bad.found[-1].message
        assert len(Client(served, [5] * 100, max_tokens=5, logprobs=0).tokens()) == 5
        assert served.scheduler.pool.held == 0
    assert "broken" in caplog.text


def test_a_token_that_cannot_be_shown_ends_its_own_request(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = [[5] * 100, [6] * 100]
    with serve(folder) as served:
        first, second = (Client(served, prompt, max_tokens=12, logprobs=0).tokens() for prompt in prompts)
        strange = next(token for token in second if token not in first)
        decode = served.scheduler._decode

        def breaking(ids: Sequence[int]) -> str:
            if strange in ids:
                raise KeyError(strange)
            return decode(ids)

        served.scheduler._decode = breaking
        good, bad = (Client(served, prompt, max_tokens=12, n=2, logprobs=0) for prompt in prompts)
        assert good.tokens() == first
        assert bad.over.wait(10)
        assert (bad.found[-1].status, bad.found[-1].message) == (500, "the model failed while it wrote this answer")
        assert served.scheduler.alive
        until_free(served)
    assert "KeyError" in caplog.text


def test_logits_that_are_no_numbers_end_their_own_request(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serve(folder, policy="streaming") as served:
        served.scheduler.engine.model.model.embed_tokens.weight.data[9] = float("nan")
        good = Client(served, [5] * 100, max_tokens=300, logprobs=0)
        wait_for(lambda: len(good.found) > 3)
        bad = Client(served, [9] * 100, max_tokens=12)
        assert bad.over.wait(10)
        assert len(good.tokens()) == 300
        assert bad.found[-1].status == 500
        until_free(served)


def until_free(served: Serving) -> None:
    wait_for(lambda: (served.scheduler.pool.held, served.scheduler.engine.nbytes) == (0, 0))


def test_temperatures_are_those_of_the_rows_that_are_there(folder: Path) -> None:
    """A row that leaves and one that joins can bring a group to the counts of a step before."""
    model, _ = load(folder)
    with KeyTokens(model, 0.5, min_length=0) as few:
        engine = Engine(few)

        def join(owner: str, prompt: int, new: int) -> None:
            engine.begin(range(5, 5 + prompt), new, engine.plan, engine.shape.need(engine.plan, prompt, new, 1))
            engine.advance()
            engine.join([owner])

        def temperatures() -> list[float]:
            group = next(iter(engine._groups.values()))
            found = group.layers[0].request.temperature(0, group.counts)
            return found.tolist() if isinstance(found, torch.Tensor) else [found] * len(group.counts)

        join("a", 7, 20)
        join("b", 6, 5)
        engine.step([5, 5])  # to 8 and 7 tokens
        assert temperatures() == pytest.approx([1 + 1 / 20, 1 + 1 / 5])
        engine.leave({"a"})
        join("c", 6, 10)
        engine.step([5, 5])  # to 8 and 7 tokens again
        assert temperatures() == pytest.approx([1 + 2 / 5, 1 + 1 / 10])


def test_closing_tells_those_who_wait(folder: Path) -> None:
    with serve(folder) as served:
        client = Client(served, [5] * 100, max_tokens=800)
        served.close()
        assert client.over.wait(10)
        assert client.found[-1].status == 503
        with pytest.raises(ApiError, match="shutting down"):
            Client(served, [5] * 100)


def test_models_and_settings_that_cannot_be_served(folder: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    model, tokenizer = load(folder)
    with pytest.raises(InputError, match="per request"):
        Serving(model, tokenizer, Settings("tiny", "64 MiB"))
    assert "generate" not in model.__dict__, "the model was not given back"
    with pytest.raises(InputError, match="positive"):
        Serving(model, tokenizer, Settings("tiny", kv_memory=0))
    bad: list[dict[str, Any]] = [
        {"queue": 0}, {"chunk": 0}, {"timeout": -1}, {"max_tokens": 0}, {"policy": "best"}, {"api_key": " "},
        {"api_key": ""}, {"api_key": "\u00e9"}, {"api_key": "a\n"},
    ]  # fmt: skip
    for wrong in bad:
        with pytest.raises(InputError):
            Settings("tiny", **wrong)
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=16,
    )  # fmt: skip
    with pytest.raises(InputError):
        Serving(MistralForCausalLM(config).eval(), tokenizer, Settings("tiny"))


@pytest.mark.parametrize("family", ["gpt2", "neox", "mpt", "bloom"])
def test_other_families_in_one_batch(family: str) -> None:
    """Learned positions, partial rotary and ALiBi: rows of different lengths, each as alone."""
    import transformers as hf

    made: dict[str, tuple[Any, Any]] = {
        "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=256)),
        "neox": (
            hf.GPTNeoXForCausalLM,
            hf.GPTNeoXConfig(
                vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
            ),
        ),
        "mpt": (hf.MptForCausalLM, hf.MptConfig(vocab_size=64, d_model=32, n_heads=4, n_layers=2, max_seq_len=256)),
        "bloom": (hf.BloomForCausalLM, hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind, config = made[family]
        model = kind(config).eval()
    prompts = [[(7 * k + j * j) % 60 + 1 for j in range(n)] for k, n in enumerate((30, 64, 100, 101))]

    def write(batches: list[list[list[int]]]) -> dict[int, list[int]]:
        with KeyTokens(model, 0.5, min_length=0) as few:
            engine = Engine(few, chunk=48)
            out: dict[int, list[int]] = {}
            for batch in batches:
                for prompt in batch:
                    engine.begin(prompt, 12, engine.plan, engine.shape.need(engine.plan, len(prompt), 12, 1))
                    while (logits := engine.advance()) is None:
                        pass
                    engine.join([len(prompt)])
                    out[len(prompt)] = [int(logits.argmax())]
                for _ in range(12):
                    after = engine.step([out[owner][-1] for owner in engine.owners])
                    for owner, token in zip(engine.owners, after.argmax(-1).tolist(), strict=True):
                        out[owner].append(token)
                engine.leave(set(engine.owners))
                assert engine.nbytes == 0
        return out

    assert write([prompts]) == write([[prompt] for prompt in prompts])
