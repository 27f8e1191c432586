"""The command `vitalfew serve` as a process: clients that come and go, an end that drains, memory that stays."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from vitalfew.cli._app import run

from .serving import client
from .test_server_http import rows, until
from .tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny", context=2048)


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


def test_sigterm_lets_answers_finish_and_begins_no_other(folder: Path) -> None:
    with command(folder, "--kv-memory", "4MiB") as (process, url), client(url) as api:
        stream = api.completions.create(model="tiny", prompt="Once", max_tokens=400, seed=1, stream=True)
        until(url, rows=1)
        process.send_signal(signal.SIGTERM)
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")
        assert process.wait(20) == 0
        assert "stopped" in process.said()  # type: ignore[attr-defined]
        assert "Traceback" not in process.said()  # type: ignore[attr-defined]
        with pytest.raises(Exception, match="Connection"):
            api.models.list()


@pytest.mark.slow
def test_a_drain_ends(folder: Path) -> None:
    with command(folder, "--kv-memory", "4MiB", "--drain", "1") as (process, url), client(url) as api:
        stream = api.completions.create(model="tiny", prompt="Once", max_tokens=2000, n=8, temperature=2, stream=True)
        until(url, rows=8)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(Exception):  # the stream is cut off
            list(stream)
        assert process.wait(20) == 0
        assert time.monotonic() - start < 15


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
    ],
)
def test_bad_flags(folder: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", str(folder), "--port", "0", *flags]) == 2
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
        assert found['vitalfew_requests_total{outcome="done"}'] >= 300
        assert found["vitalfew_kv_bytes_peak"] <= 2 << 20
        assert "Exception" not in process.said()  # type: ignore[attr-defined]
    half = len(held) // 2
    assert sum(held[half:]) / len(held[half:]) - sum(held[:half]) / half < 2 << 20, held
