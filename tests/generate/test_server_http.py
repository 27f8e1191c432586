"""The server as the official client sees it."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from vitalfew.generate.server.serving import Serving

from .serving import chain_model, client, endless, rows, sent, serving
from .tiny import tiny_model

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a slot?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(folder: Any) -> Iterator[tuple[Serving, str]]:
    with serving(folder, kv_memory="2 MiB", max_tokens=300, body_bytes=20_000) as found:
        yield found


@pytest.fixture(scope="module")
def api(server: tuple[Serving, str]) -> Iterator[openai.OpenAI]:
    with client(server[1]) as found:
        yield found


def post(url: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_lists_its_model(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == ["tiny"]
    assert api.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("other")


def test_chat_and_completion(api: openai.OpenAI) -> None:
    said = api.chat.completions.create(model="tiny", messages=CHAT, max_tokens=6, temperature=0)
    assert said.choices[0].message.role == "assistant"
    assert said.usage is not None
    assert said.usage.completion_tokens <= 6
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens
    # The tiny template, written out: the same tokens, so the same answer.
    text = "<s>system: Be brief.</s><s>user: What is a slot?</s>assistant:"
    same = api.completions.create(model="tiny", prompt=text, max_tokens=6, temperature=0)
    assert same.choices[0].text == said.choices[0].message.content
    assert same.usage.prompt_tokens == said.usage.prompt_tokens  # type: ignore[union-attr]


def test_reports_kept_and_full_bytes(api: openai.OpenAI) -> None:
    usage = api.completions.create(model="tiny", prompt="a" * 400, max_tokens=20, temperature=0).usage
    assert usage is not None
    kept, full = usage.kv_cache["kept_bytes"], usage.kv_cache["full_bytes"]  # type: ignore[attr-defined]
    assert full == (400 + usage.completion_tokens) * 2 * 2 * 2 * 8 * 4  # layers, K and V, heads, head size, bytes
    assert kept < 0.7 * full


@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_is_the_whole_answer_in_pieces(api: openai.OpenAI, chat: bool) -> None:
    how: dict[str, Any] = {"model": "tiny", "max_tokens": 40, "seed": 5, "n": 2}
    if chat:
        whole = [c.message.content for c in api.chat.completions.create(messages=CHAT, **how).choices]
        chunks: Any = api.chat.completions.create(
            messages=CHAT, stream=True, stream_options={"include_usage": True}, **how
        )
    else:
        whole = [c.text for c in api.completions.create(prompt="Once", **how).choices]
        chunks = api.completions.create(prompt="Once", stream=True, stream_options={"include_usage": True}, **how)
    texts, finish, usage = ["", ""], [None, None], []
    for chunk in chunks:
        usage += [chunk.usage] if chunk.usage else []
        for choice in chunk.choices:
            texts[choice.index] += (choice.delta.content or "") if chat else choice.text
            finish[choice.index] = finish[choice.index] or choice.finish_reason
    assert texts == whole
    assert set(finish) <= {"stop", "length"}
    assert len(usage) == 1
    assert usage[0].completion_tokens <= 80


def test_seed_n_and_temperature(api: openai.OpenAI) -> None:
    how: dict[str, Any] = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 12}
    first = [c.text for c in api.completions.create(n=3, seed=1, **how).choices]
    assert [c.text for c in api.completions.create(n=3, seed=1, **how).choices] == first
    assert [c.text for c in api.completions.create(n=1, seed=1, **how).choices] == first[:1]
    assert len(set(first)) == 3
    greedy = [c.text for c in api.completions.create(n=3, temperature=0, **how).choices]
    assert len(set(greedy)) == 1
    assert [c.text for c in api.completions.create(top_p=0, seed=9, **how).choices] == greedy[:1]


def test_several_prompts_and_tokens(api: openai.OpenAI) -> None:
    how: dict[str, Any] = {"model": "tiny", "max_tokens": 5, "temperature": 0}
    both = api.completions.create(prompt=["one", "another"], n=2, **how)
    alone = [api.completions.create(prompt=text, **how).choices[0].text for text in ("one", "another")]
    assert [c.text for c in both.choices] == [alone[0], alone[0], alone[1], alone[1]]
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    assert len(api.completions.create(prompt=[5, 6, 7], **how).choices) == 1


def test_stop(api: openai.OpenAI) -> None:
    how: dict[str, Any] = {"model": "tiny", "prompt": "Tell me", "max_tokens": 60, "seed": 2}
    whole = api.completions.create(**how).choices[0].text
    at = next(k for k in range(5, len(whole)) if whole[k] != "\ufffd" and whole[k + 1] != "\ufffd")
    stop = whole[at : at + 2]
    cut = api.completions.create(stop=["never here", stop], **how).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")
    streamed = "".join(c.choices[0].text for c in api.completions.create(stop=stop, stream=True, **how))
    assert streamed == cut.text


def test_logprobs(api: openai.OpenAI) -> None:
    said = api.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    tokens = said.choices[0].logprobs.content  # type: ignore[union-attr]
    assert tokens is not None
    assert len(tokens) == said.usage.completion_tokens  # type: ignore[union-attr]
    for token in tokens:
        assert token.logprob == max(top.logprob for top in token.top_logprobs)
        assert len(token.top_logprobs) == 3
    old = api.completions.create(model="tiny", prompt="Hello", max_tokens=4, temperature=0, logprobs=2)
    found = old.choices[0].logprobs
    assert found is not None
    assert len(found.tokens or []) == len(found.token_logprobs or []) == len(found.text_offset or []) == 4
    assert (found.text_offset or [])[0] == 0
    streamed = api.completions.create(
        model="tiny", prompt="Hello", max_tokens=4, temperature=0, logprobs=2, stream=True
    )
    pieces = [c.choices[0].logprobs for c in streamed if c.choices[0].logprobs]
    assert [t for piece in pieces for t in piece.token_logprobs or []] == found.token_logprobs


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "gpt-5"}, 404, "model"),
    ({"prompt": "a" * 600}, 400, "prompt"),
    ({"max_tokens": 301}, 400, "max_tokens"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 2.5}, 400, "max_tokens"),
    ({"temperature": 3}, 400, "temperature"),
    ({"temperature": True}, 400, "temperature"),
    ({"top_p": -0.1}, 400, "top_p"),
    ({"n": 0}, 400, "n"),
    ({"stop": [""]}, 400, "stop"),
    ({"stop": ["a"] * 5}, 400, "stop"),
    ({"stop": 3}, 400, "stop"),
    ({"seed": "x"}, 400, "seed"),
    ({"stream": "yes"}, 400, "stream"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": "yes"}}, 400, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, 400, "stream_options"),
    ({"stream": True, "stream_options": [1]}, 400, "stream_options"),
    ({"temperature": 10**300}, 400, "temperature"),
    ({"stop": "a" * 1001}, 400, "stop"),
    ({"prompt": ["Once"] * 257}, 400, "prompt"),
    ({"model": "m" * 10_000}, 404, "model"),
    ({"b" * 10_000: 1}, 400, "b" * 80),
    ({"logprobs": 21}, 400, "logprobs"),
    ({"prompt": [[]]}, 400, "prompt"),
    ({"prompt": [100_000]}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": 7}, 400, "prompt"),
    ({"echo": True}, 400, "echo"),
    ({"kv_budget": 0}, 400, "kv_budget"),
    ({"kv_budget": "50%"}, 400, "kv_budget"),
    ({"logit_bias": {"5": 3}}, 400, "logit_bias"),
    ({"best_of": 2}, 400, "best_of"),
    ({"bananas": 2}, 400, "bananas"),
    ({"messages": CHAT}, 400, "messages"),
    ({"prompt": "a" * 450, "n": 128}, 400, ""),
]


@pytest.mark.parametrize(("change", "status", "param"), BAD, ids=[str(bad[0])[:40] for bad in BAD])
def test_bad_values(server: tuple[Serving, str], change: dict[str, Any], status: int, param: str) -> None:
    body = {"model": "tiny", "prompt": "Once", "max_tokens": 3, **change}
    code, answer = post(f"{server[1]}/v1/completions", json.dumps(body).encode())
    assert code == status, answer
    assert answer["error"]["param"] == (param or None)
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert len(answer["error"]["message"]) < 250


BAD_CHAT: list[Any] = [
    [], "hello", [3], [{"content": "x"}], [{"role": "user", "content": None}], [{"role": "user", "content": []}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}],
    [{"role": "assistant", "content": "x", "tool_calls": [1]}],
    [{"role": "assistant", "content": "x", "refusal": "no"}],
    [{"role": "user", "content": "x", "name": 3}],
    [{"role": "user", "content": [{"type": "image", "text": "x"}]}],
]  # fmt: skip


@pytest.mark.parametrize("messages", BAD_CHAT, ids=str)
def test_bad_messages(server: tuple[Serving, str], messages: Any) -> None:
    body = json.dumps({"model": "tiny", "messages": messages}).encode()
    code, answer = post(f"{server[1]}/v1/chat/completions", body)
    assert code == 400
    assert answer["error"]["param"].startswith("messages")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b'{"model": NaN}',
        b"\xff\xfe",
        b"[" * 9000,
        b'{"model": "\xed\xa0\x80"}',
        b'{"a": "\\ud800"}',
        b"null",
    ],
)
def test_bad_json(server: tuple[Serving, str], body: bytes) -> None:
    code, answer = post(f"{server[1]}/v1/completions", body)
    assert (code, answer["error"]["code"]) == (400, "invalid_json")


def test_bad_http(server: tuple[Serving, str], monkeypatch: pytest.MonkeyPatch) -> None:
    url = server[1]
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert post(f"{url}/v1/completions", b"{}", **{"Content-Type": kind})[0] == 415
    code, answer = post(f"{url}/v1/completions", b"x" * 30_000)
    assert (code, answer["error"]["code"]) == (413, "body_too_large")
    monkeypatch.setattr("vitalfew.generate.server._fastapi._BODY_SECONDS", 0.1)
    with sent(url, {"model": "tiny", "prompt": "Once"}, part=0.5) as slow:
        assert slow.recv(1 << 16).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/nothing", 404), ("GET", "/", 404), ("GET", "/docs", 404), ("GET", "/v1/models/%ff/x", 404),
        ("POST", "/v1/models", 405), ("GET", "/v1/completions", 405), ("OPTIONS", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models/tiny", 405), ("HEAD", "/v1/models", 405), ("BREW", "/health", 405),
    ],
)  # fmt: skip
def test_unknown_routes_and_methods(server: tuple[Serving, str], method: str, path: str, status: int) -> None:
    request = urllib.request.Request(f"{server[1]}{path}", method=method)
    with pytest.raises(urllib.error.HTTPError) as found, urllib.request.urlopen(request, timeout=5):
        pass
    with found.value as answer:
        assert answer.code == status
        assert ("Allow" in answer.headers) == (status == 405)
        body = answer.read()
    if method == "HEAD":
        assert body == b""
    else:
        error = json.loads(body)["error"]
        assert error["type"] == "invalid_request_error"
        assert path.startswith("/v1/models/%") or error["message"].startswith(f"{method} {path}: ")


def test_text_parts_are_text(api: openai.OpenAI) -> None:
    how: dict[str, Any] = {"model": "tiny", "max_tokens": 4, "temperature": 0}
    parts = [{"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "text", "text": "is it?"}]}]
    plain = [{"role": "user", "content": "What is it?"}]
    answers = [api.chat.completions.create(messages=m, **how).choices[0].message.content for m in (parts, plain)]
    assert answers[0] == answers[1]


def test_keys(folder: Any) -> None:
    with serving(folder, api_key="secret", kv_memory="1 MiB") as (_, url):
        with client(url, "secret") as right:
            assert len(right.models.list().data) == 1
        for wrong in ("Secret", "secre", "s\u00e9cret", ""):
            key = f"Bearer {wrong}".encode().decode("latin-1")
            code, answer = post(f"{url}/v1/completions", b"{}", Authorization=key)
            assert (code, answer["error"]["code"]) == (401, "invalid_api_key")
            assert answer["error"]["type"] == "authentication_error"
        assert post(f"{url}/v1/completions", b"{}", Authorization="bearer secret")[0] == 400
        assert post(f"{url}/v1/completions", b"{}", Authorization="secret")[0] == 401
        with client(url, "other") as other, pytest.raises(openai.AuthenticationError) as refused:
            other.models.list()
        assert refused.value.response.headers["WWW-Authenticate"] == "Bearer"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            rows(url)
        with urllib.request.urlopen(f"{url}/health", timeout=5) as health:
            assert json.loads(health.read()) == {"status": "ok"}


def test_chat_templates(folder: Any) -> None:
    """One that refuses is the client's error, one that shows names gets them, and without one there is no chat."""
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m.name or m.role }}: {{ m.content }}{% endfor %}"
    )
    how: dict[str, Any] = {"model": "tiny", "max_tokens": 4, "temperature": 0}

    def with_template(text: str | None) -> Any:
        return serving(folder, lambda model, tokenizer: setattr(tokenizer, "chat_template", text), kv_memory="1 MiB")

    with with_template(template) as (_, url), client(url) as api:
        with pytest.raises(openai.BadRequestError, match="no system here") as error:
            api.chat.completions.create(messages=CHAT, **how)
        assert error.value.param == "messages"
        named = [{"role": "user", "content": "x", "name": "Ada"}]
        said = api.chat.completions.create(messages=named, **how)
        assert said.usage.prompt_tokens == len("Ada: x")
        echoed = [*named, said.choices[0].message.model_dump(), {"role": "user", "content": "y", "tool_calls": []}]
        assert api.chat.completions.create(messages=echoed, **how).choices
    with with_template(None) as (_, url), client(url) as api:  # noqa: SIM117 - the server outlives it
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            api.chat.completions.create(messages=CHAT, **how)


def test_usage_and_finish_reason(folder: Any) -> None:
    """Without an end token an answer has as many tokens as asked for; with several, the first of any ends it."""
    how: dict[str, Any] = {"model": "tiny", "prompt": "Once upon", "max_tokens": 30, "temperature": 0}
    with serving(folder, endless, kv_memory="2 MiB") as (served, url), client(url) as api:
        assert not served.scheduler._ends
        whole = api.completions.create(logprobs=0, n=3, **how)
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (9, 90)
        assert {choice.finish_reason for choice in whole.choices} == {"length"}
        # What is not asked for ends with the context.
        rest = api.chat.completions.create(model="tiny", messages=CHAT)
        assert rest.usage.total_tokens == 512
        assert rest.choices[0].finish_reason == "length"
        for name in ("max_tokens", "max_completion_tokens"):
            few = api.chat.completions.create(model="tiny", messages=CHAT, **{name: 7})
            assert few.usage.completion_tokens == 7
        with pytest.raises(openai.BadRequestError, match="send one"):
            api.chat.completions.create(model="tiny", messages=CHAT, max_tokens=7, max_completion_tokens=8)
    tokens = whole.choices[0].logprobs.tokens
    ids: dict[str, int] = {}

    def several(model: Any, tokenizer: Any) -> None:
        ids.update({tokenizer.decode([k], skip_special_tokens=False): k for k in range(model.config.vocab_size)})
        plain = [name for name in dict.fromkeys(tokens[5:]) if name != "\ufffd" and name not in tokens[:5]]
        model.generation_config.eos_token_id = [ids[name] for name in plain[:3]]

    with serving(folder, several, kv_memory="2 MiB") as (served, url), client(url) as api:
        ends = {name for name, k in ids.items() if k in served.scheduler._ends}
        at = next(k for k, name in enumerate(tokens) if name in ends)
        cut = api.completions.create(logprobs=0, **how)
        assert cut.choices[0].finish_reason == "stop"
        assert cut.usage.completion_tokens == at + 1
        assert cut.choices[0].logprobs.tokens == tokens[:at]


def test_characters_and_stops_over_several_tokens(folder: Any, tmp_path: Any) -> None:
    """A model whose tokens are bytes, and that writes this text: characters of one to four tokens, then its end."""
    text = "a\u00e9\u20ac\U0001f600b"
    with serving(chain_model(tmp_path / "chain", text), kv_memory="1 MiB") as (_, url), client(url) as api:
        how: dict[str, Any] = {"model": "tiny", "prompt": "xa", "max_tokens": 20, "temperature": 0}

        def pieces(**more: Any) -> tuple[list[str], str | None, int]:
            asked = {**how, **more}
            chunks = list(api.completions.create(stream=True, stream_options={"include_usage": True}, **asked))
            choices, usage = [choice for chunk in chunks for choice in chunk.choices], chunks[-1].usage
            whole = api.completions.create(**asked)
            assert "".join(choice.text for choice in choices) == whole.choices[0].text
            assert choices[-1].finish_reason == whole.choices[0].finish_reason
            assert usage == whole.usage
            texts = [choice.text for choice in choices if choice.text]
            return texts, choices[-1].finish_reason, usage.completion_tokens

        assert pieces() == (["\u00e9", "\u20ac", "\U0001f600", "b"], "stop", 11)
        assert pieces(max_tokens=10) == (["\u00e9", "\u20ac", "\U0001f600", "b"], "length", 10)
        assert pieces(max_tokens=4) == (["\u00e9"], "length", 4)  # half a character is none
        assert pieces(stop="\u20ac\U0001f600") == (["\u00e9"], "stop", 9)
        assert pieces(stop=["\U0001f600c", "\u20acb"]) == (["\u00e9", "\u20ac", "\U0001f600b"], "stop", 11)
        assert pieces(stop="b\u00e9") == (["\u00e9", "\u20ac", "\U0001f600", "b"], "stop", 11)
        assert pieces(stop=["b", "\u00e9"]) == ([], "stop", 2)


def test_sixteen_staggered_streams_are_each_as_alone(server: tuple[Serving, str], api: openai.OpenAI) -> None:
    def ask(k: int) -> str:
        how: dict[str, Any] = {"model": "tiny", "max_tokens": 20 + 3 * k, "temperature": 0}
        chunks = api.completions.create(prompt=f"{k} times " * (3 + k % 7), stream=True, **how)
        return "".join(chunk.choices[0].text for chunk in chunks)

    def late(k: int) -> str:
        time.sleep(0.02 * k)
        return ask(k)

    alone = [ask(k) for k in range(16)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(late, range(16))) == alone
    assert rows(server[1])["vitalfew_kv_bytes_peak"] <= rows(server[1])["vitalfew_kv_bytes_limit"]
