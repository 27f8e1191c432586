"""The command `vitalfew serve` as a process: clients that come and go, an end that drains, memory that stays."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from vitalfew.cli._app import run
from vitalfew.generate._transformers_weights import load

from .serving import client, endless, outcomes, rows, sent, until
from .tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model(tmp_path_factory.mktemp("model") / "tiny", context=2048)
    _, tokenizer = load(folder)
    endless(None, tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def command(folder: Path, *flags: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command on a free port; yields the process and its address."""
    words = [sys.executable, "-W", "error", "-m", "vitalfew", "serve", str(folder), "--port", "0", *flags]
    process = subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    )
    lines: queue.Queue[str] = queue.Queue()
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: [lines.put(line) for line in process.stderr or ()])
    reader.start()
    said = ""
    try:
        while not (found := re.search(r"http://\S+:\d+", said)):
            said += lines.get(timeout=60)
        process.said = lambda: said + "".join(lines.queue)  # type: ignore[attr-defined]
        yield process, found[0]
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()


def test_clients_that_leave_leave_no_trace_and_sigterm_lets_answers_finish(folder: Path) -> None:
    """Killed at any moment, streaming or not, in the middle of their body or of an answer: nothing is written of it."""
    with command(folder, "--kv-memory", "2MiB") as (process, url), client(url) as api:
        body = {"model": "tiny", "prompt": "a" * 500, "max_tokens": 1000}
        for k in range(40):
            raw = sent(url, {**body, "stream": bool(k % 2)}, part=0.5 if k % 4 == 3 else 1.0)
            time.sleep(0.002 * (k % 7))
            if k % 3 == 0:  # a reset, as of a process that dies with something unread
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raw.close()
        stream = api.completions.create(model="tiny", prompt="Once", max_tokens=400, stream=True)
        until(url, rows=1, queue=0)
        found = outcomes(url)
        assert found["cancelled"] > 0
        assert sum(found.values()) == found["cancelled"], found
        process.send_signal(signal.SIGTERM)
        assert list(stream)[-1].choices[0].finish_reason == "length"
        assert process.wait(20) == 0
        assert re.fullmatch(r"serving tiny on \S+\nstopped\n", process.said())  # type: ignore[attr-defined]
        with pytest.raises(openai.APIConnectionError):
            api.models.list()


@pytest.mark.parametrize(
    "end", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow), pytest.param("drain", marks=pytest.mark.slow)]
)
def test_a_drain_ends_with_its_time_or_a_second_signal(folder: Path, end: str) -> None:
    """Those who still wait then are told so; a client that reads nothing cannot hold the end up."""
    how: dict[str, Any] = {"model": "tiny", "prompt": "Once", "max_tokens": 2000, "n": 8, "temperature": 2}
    drain = "0" if end == "drain" else "60"
    with (
        command(folder, "--kv-memory", "8MiB", "--drain", drain) as (process, url),
        client(url) as api,
        sent(url, how) as whole,
        sent(url, {**how, "stream": True, "logprobs": 20}),
    ):
        stream = iter(api.completions.create(stream=True, **how))
        until(url, rows=24)
        process.send_signal(signal.SIGTERM)
        if end != "drain":
            for _ in range(20):
                assert next(stream).choices  # goes on
            process.send_signal(signal.Signals[end])
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert process.wait(20) == 0
        answer = b"".join(iter(lambda: whole.recv(1 << 16), b""))
        assert answer.startswith(b"HTTP/1.1 503")
        assert b'"code":"shutting_down"' in answer
        assert re.fullmatch(r"serving tiny on \S+\nstopped\n", process.said())  # type: ignore[attr-defined]


def test_a_port_in_use(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        assert run(["serve", str(folder), "--port", str(port)]) == 2
    errors = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1, port {port}" in errors
    assert "hint: choose another" in errors
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.slow
def test_a_key_from_the_environment(folder: Path) -> None:
    with command(folder, "--name", "small", VITALFEW_API_KEY="secret") as (_, url):
        with client(url, "secret") as api:
            assert [model.id for model in api.models.list()] == ["small"]
        with client(url, "wrong") as api, pytest.raises(Exception, match="key"):
            api.models.list()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--kv-memory", "lots"], "cannot read the size 'lots'"),
        (["--kv-memory", "0B"], "positive"),
        (["--budget", "64MiB"], "per request"),
        (["--policy", "best"], "no policy 'best'"),
        (["--queue", "0"], "queue must be at least 1"),
        (["--port", "70000"], "--port"),
        (["--drain", "-1"], "--drain"),
        (["--api-key", "secret\n"], "printable ASCII"),
    ],
)
def test_bad_flags(folder: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", str(folder), *flags]) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert "hint: " in errors


@pytest.mark.slow
def test_five_hundred_requests_leave_no_memory_behind(folder: Path) -> None:
    """Answered, streamed, refused and abandoned ones; the last three hundred may cost 2 MiB at most."""
    with command(folder, "--kv-memory", "2MiB") as (process, url), client(url) as api:

        def ask(k: int) -> None:
            how: dict[str, Any] = {"model": "tiny", "prompt": "a" * (30 + 7 * (k % 40)), "max_tokens": 20, "seed": k}
            if k % 5 == 4:
                with pytest.raises(Exception, match="no model"):
                    api.completions.create(**{**how, "model": "other"})
            elif k % 5 == 3:
                with api.completions.create(stream=True, **how) as stream:
                    next(iter(stream))  # and away
            elif k % 5 == 2:
                assert list(api.completions.create(stream=True, **how))
            else:
                assert api.completions.create(logprobs=3, stop=["zzz"], **how).choices

        held = []
        for k in range(500):
            ask(k)
            if k >= 200 and k % 20 == 0:
                held.append(psutil.Process(process.pid).memory_info().rss)
        until(url, rows=0, queue=0, kv_bytes=0, kv_bytes_reserved=0)
        found = rows(url)
        ends = outcomes(url)
        assert ends["done"] >= 300  # and those of the hundred that left whose answer was complete by then
        assert ends["done"] + ends["cancelled"] == 400
        assert found["vitalfew_kv_bytes_peak"] <= 2 << 20
        assert "Exception" not in process.said()  # type: ignore[attr-defined]
    half = len(held) // 2
    assert sum(held[half:]) / len(held[half:]) - sum(held[:half]) / half < 2 << 20, held
