"""The server as the official client sees it."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from vitalfew.generate.server.serving import Serving

from .serving import client, serving
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


BAD_CHAT: list[Any] = [
    [], "hello", [3], [{"content": "x"}], [{"role": "user", "content": None}], [{"role": "user", "content": []}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}],
    [{"role": "assistant", "content": "x", "tool_calls": [1]}],
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


def test_bad_http(server: tuple[Serving, str]) -> None:
    url = server[1]
    assert post(f"{url}/v1/completions", b"{}", **{"Content-Type": "text/plain"})[0] == 415
    assert post(f"{url}/v1/completions", b"x" * 30_000)[0] == 413
    code, answer = post(f"{url}/v1/nothing", b"{}")
    assert (code, answer["error"]["type"]) == (404, "invalid_request_error")
    assert post(f"{url}/v1/models", b"{}")[0] == 405


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
            sent = f"Bearer {wrong}".encode().decode("latin-1")
            code, answer = post(f"{url}/v1/completions", b"{}", Authorization=sent)
            assert (code, answer["error"]["code"]) == (401, "invalid_api_key")
        with client(url, "other") as other, pytest.raises(openai.AuthenticationError):
            other.models.list()
        with urllib.request.urlopen(f"{url}/health", timeout=5) as health:
            assert json.loads(health.read()) == {"status": "ok"}


def test_no_chat_template(folder: Any, tmp_path: Any) -> None:
    from shutil import copytree

    bare = copytree(folder, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with serving(bare, kv_memory="1 MiB") as (_, url), client(url) as api:  # noqa: SIM117 - the server outlives it
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            api.chat.completions.create(model="tiny", messages=CHAT)


def rows(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
        lines = [line.split() for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def until(url: str, **wanted: float) -> None:
    """Wait for gauges to have these values."""
    end = time.monotonic() + 10
    while {name: rows(url)[f"vitalfew_{name}"] for name in wanted} != wanted:
        assert time.monotonic() < end, rows(url)
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_killed_client_frees_its_slots(server: tuple[Serving, str], stream: bool) -> None:
    _, url = server
    until(url, rows=0, queue=0)
    cancelled = rows(url).get('vitalfew_requests_total{outcome="cancelled"}', 0)
    body = json.dumps({"model": "tiny", "prompt": "Once", "max_tokens": 300, "n": 3, "stream": stream}).encode()
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        until(url, rows=3)
    until(url, rows=0, kv_bytes=0, kv_bytes_reserved=0)
    assert rows(url)['vitalfew_requests_total{outcome="cancelled"}'] == cancelled + 1


def test_metrics_add_up(server: tuple[Serving, str], api: openai.OpenAI) -> None:
    until(server[1], rows=0)
    before = rows(server[1])
    usage = api.completions.create(model="tiny", prompt="Once", max_tokens=7).usage
    until(server[1], rows=0)
    after = rows(server[1])
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown['vitalfew_requests_total{outcome="done"}'] == 1
    assert grown['vitalfew_tokens_total{kind="prompt"}'] == 4
    assert grown['vitalfew_tokens_total{kind="answer"}'] == usage.completion_tokens  # type: ignore[union-attr]
    assert grown["vitalfew_step_seconds_count"] == usage.completion_tokens - 1  # type: ignore[union-attr]
    assert after["vitalfew_kv_bytes_peak"] <= after["vitalfew_kv_bytes_limit"]


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
