"""Many clients at once, and clients that leave at any moment: bytes, turns and figures, over real sockets."""

from __future__ import annotations

import itertools
import random
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from vitalfew.generate.server.jobs import Done
from vitalfew.generate.server.requests import ApiError, parse
from vitalfew.generate.server.serving import Serving

from .serving import Gate, client, counted, endless, outcomes, rows, sent, serving, until, wait_for
from .tiny import tiny_model

Server = tuple[Serving, str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"), context=1024)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder, endless, kv_memory="2 MiB", chunk=16) as found:
        yield found


def test_thirty_two_streams_in_the_memory_of_eight(folder: Path) -> None:
    """Eight of the longest requests fit in full; all are answered in that memory, and more than eight at a time."""
    draw = random.Random(0)
    asks = [(draw.randint(100, 400), draw.randint(20, 40)) for _ in range(31)] + [(400, 40)]
    with serving(folder, endless, budget=1.0) as (served, _):
        engine = served.scheduler.engine
        memory = 8 * engine.shape.need(engine.plan, 400, 40, 1).most
    with serving(folder, endless, budget=0.5, kv_memory=memory) as (served, url), client(url) as api:
        held, step, at_once = counted(served), served.scheduler.engine.step, []

        def counting(tokens: Any) -> Any:
            at_once.append(len(tokens))
            return step(tokens)

        served.scheduler.engine.step = counting

        def ask(k: int) -> tuple[int, int, set[str | None]]:
            prompt, new = asks[k]
            stream = api.completions.create(
                model="tiny", prompt=chr(97 + k % 26) * prompt, max_tokens=new, seed=k, stream=True,
                stream_options={"include_usage": True}, logprobs=0,
            )  # fmt: skip
            tokens, usage, ends = 0, None, set()
            for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    tokens += len(choice.logprobs.tokens or []) if choice.logprobs else 0
                    ends.add(choice.finish_reason)
            assert usage is not None
            assert usage.completion_tokens == tokens
            return usage.prompt_tokens, tokens, ends - {None}

        with ThreadPoolExecutor(32) as pool:
            assert list(pool.map(ask, range(32))) == [(prompt, new, {"length"}) for prompt, new in asks]
        until(url, rows=0, queue=0, kv_bytes=0, kv_bytes_reserved=0)
        assert outcomes(url) == {"cancelled": 0, "done": 32, "error": 0, "refused": 0, "timeout": 0}
        assert rows(url)["vitalfew_kv_bytes_peak"] == max(held)
    assert max(at_once) > 8
    assert 0.7 * memory < max(held) <= memory


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("where", ["waiting", "reading", "writing"])
def test_a_killed_client_is_forgotten_wherever_it_is(server: Server, where: str, stream: bool) -> None:
    served, url = server
    until(url, rows=0, queue=0)
    before, scheduler = outcomes(url), served.scheduler
    jobs: list[Any] = []
    submit = scheduler.submit
    scheduler.submit = lambda found: (jobs.extend(found), submit(found))[1]  # type: ignore[method-assign]
    # Prompts of 300 tokens are read in 19 chunks.
    gate = Gate(served, at={"waiting": 1, "reading": 8, "writing": 10_000}[where])
    try:
        if where == "waiting":
            first = sent(url, {"model": "tiny", "prompt": "a" * 300, "max_tokens": 2})
            gate.reached()
        raw = sent(url, {"model": "tiny", "prompt": "b" * 300, "max_tokens": 700, "n": 2, "stream": stream})
        if where == "writing":
            until(url, rows=2)
        elif where == "reading":
            gate.reached()
        wait_for(lambda: len(jobs) == 1 + (where == "waiting"))
        raw.close()
        wait_for(lambda: jobs[-1].cancelled)
        gate.open()
        if where == "waiting":
            assert first.recv(1 << 16).startswith(b"HTTP/1.1 200")
            first.close()
        until(url, rows=0, queue=0, kv_bytes=0, kv_bytes_reserved=0)
    finally:
        scheduler.submit, scheduler.engine.advance = submit, gate._advance  # type: ignore[method-assign]
    assert gate.calls == {"waiting": 19, "reading": 8, "writing": 19}[where], "its prompt was read on"
    assert jobs[-1].held == 0
    assert jobs[-1].written < 2 * 700
    after = outcomes(url)
    assert after["cancelled"] == before["cancelled"] + 1
    assert after["done"] == before["done"] + (where == "waiting")


def test_a_client_that_leaves_while_it_asks(server: Server) -> None:
    _, url = server
    before = outcomes(url)
    sent(url, {"model": "tiny", "prompt": "a" * 300}, part=0.5).close()
    with client(url) as api:
        assert api.completions.create(model="tiny", prompt="Once", max_tokens=2).choices
    assert {name: n - before[name] for name, n in outcomes(url).items() if n != before[name]} == {"done": 1}


def test_a_long_prompt_takes_turns_with_streams(server: Server) -> None:
    """Counted, not timed: after each chunk of a prompt every running answer gets its next token."""
    served, url = server
    until(url, rows=0, queue=0)
    engine, order = served.scheduler.engine, []
    advance, step = engine.advance, engine.step
    engine.advance = lambda: (order.append(0), advance())[1]
    engine.step = lambda tokens: (order.append(len(tokens)), step(tokens))[1]
    try:
        with client(url) as api, ThreadPoolExecutor(5) as pool:

            def ask(prompt: str, new: int) -> int:
                how: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": new, "logprobs": 0}
                return len([chunk for chunk in api.completions.create(stream=True, **how) if chunk.choices])

            streams = [pool.submit(ask, f"once {k}", 400) for k in range(4)]
            until(url, rows=4)
            begun = len(order)
            assert pool.submit(ask, "a" * 900, 3).result() == 3
            turns = order[begun:]
            assert [one.result() for one in streams] == [400] * 4
    finally:
        engine.advance, engine.step = advance, step
    chunks = [k for k, rows_of_step in enumerate(turns) if not rows_of_step]
    assert len(chunks) == -(-900 // 16)
    assert {b - a for a, b in itertools.pairwise(chunks)} == {2}, "more than a chunk between two steps"
    assert {turns[k + 1] for k in chunks[:-1]} == {4}, "a step left a running answer out"


SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{([a-zA-Z_]\w*)="((?:[^"\\\n]|\\[\\"n])*)"\})? (\S+)')


def parsed(text: str) -> dict[str, dict[tuple[str, str], float]]:
    """Read the text format of Prometheus 0.0.4 strictly: a type before its samples, and all of one kind together."""
    kinds: dict[str, str] = {}
    out: dict[str, dict[tuple[str, str], float]] = {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("#"):
            mark, word, name, kind = line.split(" ")
            assert (mark, word) == ("#", "TYPE")
            assert kind in ("counter", "gauge", "histogram")
            assert name not in kinds
            kinds[name], out[name] = kind, {}
            continue
        found = SAMPLE.fullmatch(line)
        assert found is not None, line
        name, last = found[1], list(kinds)[-1]
        suffixes = ("_bucket", "_sum", "_count") if kinds[last] == "histogram" else ("",)
        assert name in {last + suffix for suffix in suffixes}, f"{name} stands under {last}"
        assert (kinds[last] == "counter") == name.endswith("_total")
        key = (name.removeprefix(last), found[3] or "")
        assert key not in out[last]
        out[last][key] = float(found[4])
    for name, kind in kinds.items():
        if kind == "histogram":
            buckets = {float(le): n for (suffix, le), n in out[name].items() if suffix == "_bucket"}
            assert list(buckets) == sorted(buckets)
            assert list(buckets.values()) == sorted(buckets.values())
            assert buckets[float("inf")] == out[name]["_count", ""]
    return out


def test_metrics_add_up_after_all_kinds_of_ends(folder: Path) -> None:
    with serving(folder, endless, kv_memory="1 MiB", queue=2) as (served, url), client(url) as api:
        how: dict[str, Any] = {"model": "tiny", "prompt": "Once", "max_tokens": 5}
        scheduler = served.scheduler
        written = sum(api.completions.create(n=k, **how).usage.completion_tokens for k in (1, 2))  # type: ignore[union-attr]
        for wrong in ({"model": "other"}, {"top_p": 2}, {"prompt": "a" * 2000}):  # none of them was ever a request
            with pytest.raises(openai.APIStatusError):
                api.completions.create(**{**how, **wrong})
        broken, scheduler.engine.advance = scheduler.engine.advance, lambda: 1 / 0  # type: ignore[assignment, return-value]
        with pytest.raises(openai.InternalServerError, match="failed on this prompt"):
            api.completions.create(**how)
        scheduler.engine.advance = broken
        gate = Gate(served)
        with ThreadPoolExecutor(4) as pool:
            first = pool.submit(api.completions.create, **how)
            gate.reached()
            late = pool.submit(api.completions.create, n=2, **how)
            wait_for(lambda: len(scheduler._queue) == 1)
            scheduler._queue[0].deadline = time.monotonic()
            left = sent(url, how)
            wait_for(lambda: len(scheduler._queue) == 2)
            with pytest.raises(openai.RateLimitError) as full:
                api.completions.create(**how)
            assert int(full.value.response.headers["Retry-After"]) >= 1
            job = scheduler._queue[-1]
            left.close()
            wait_for(lambda: job.cancelled)
            gate.open()
            assert first.result().usage is not None
            with pytest.raises(openai.InternalServerError, match="more than"):
                late.result()
        until(url, rows=0, queue=0, kv_bytes_reserved=0)
        with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            found = parsed(answer.read().decode())
    ends = {label: n for (_, label), n in found["vitalfew_requests_total"].items()}
    assert ends == {"done": 3, "error": 1, "timeout": 1, "cancelled": 1, "refused": 1}
    assert found["vitalfew_tokens_total"] == {("", "answer"): written + 5, ("", "prompt"): 3 * len("Once")}
    assert found["vitalfew_step_seconds"]["_count", ""] == 3 * 4  # of each prompt the chunk gives the first token
    assert found["vitalfew_chunk_seconds"]["_count", ""] == 3


def test_cancels_from_many_threads_lose_nothing(folder: Path) -> None:
    """Requests come and go from six threads at any moment; each ends exactly once, and all bytes come back."""
    interval = sys.getswitchinterval()
    with serving(folder, endless, kv_memory=300_000, queue=40, chunk=32) as (served, url):
        seen, scheduler = counted(served), served.scheduler
        lock, ends, refused = threading.Lock(), [0] * 240, [0]

        def come_and_go(start: int) -> None:
            draw = random.Random(start)
            for k in range(start, 240, 6):
                body = {
                    "model": "tiny", "prompt": "x" * draw.randint(2, 200), "max_tokens": draw.randint(1, 12),
                    "n": draw.choice((1, 1, 3)), "kv_budget": draw.choice((0.5, 0.5, 1.0)),
                }  # fmt: skip

                def emit(found: Any, k: int = k) -> None:
                    with lock:
                        ends[k] += isinstance(found, (Done, ApiError))

                jobs = served.jobs(parse(body, chat=False), emit)
                try:
                    scheduler.submit(jobs)
                except ApiError:  # the queue is full
                    with lock:
                        ends[k] += 1
                        refused[0] += 1
                if draw.random() < 0.4:
                    time.sleep(draw.random() * 0.005)
                    scheduler.cancel(jobs)

        sys.setswitchinterval(1e-5)
        try:
            threads = [threading.Thread(target=come_and_go, args=(k,)) for k in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            until(url, queue=0, rows=0, kv_bytes=0, kv_bytes_reserved=0)
        finally:
            sys.setswitchinterval(interval)
        found = outcomes(url)
        assert sum(found.values()) == 240
        assert (found["error"], found["timeout"], found["refused"]) == (0, 0, refused[0])
        assert max(ends) == 1
        assert sum(ends) == 240 - found["cancelled"]
        assert scheduler.alive
    assert seen
