"""A server of a tiny model, in a thread, the official client for it, and raw sockets for what that never does."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import torch

from vitalfew.generate._transformers_weights import load
from vitalfew.generate.server._fastapi import Server
from vitalfew.generate.server.serving import Serving, Settings

from .tiny import tiny_model


@contextlib.contextmanager
def serving(
    folder: Path, change: Callable[[Any, Any], None] = lambda model, tokenizer: None, **settings: Any
) -> Iterator[tuple[Serving, str]]:
    """Serve a model on a free port, after a change to it and its tokenizer; yields it and its address."""
    model, tokenizer = load(folder)
    change(model, tokenizer)
    served = Serving(model, tokenizer, Settings("tiny", **{"min_length": 0, **settings}))
    ready = threading.Event()
    found: list[str] = []
    server = Server(served, port=0, ready=lambda url: (found.append(url), ready.set())[0])
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        assert ready.wait(20), "the server does not listen"
        yield served, found[0]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server does not end"


def endless(model: Any, tokenizer: Any) -> None:
    """Let no token end an answer, so that it has as many as were asked for."""
    tokenizer.eos_token = None


def client(url: str, key: str = "none") -> openai.OpenAI:
    """Return the official client, which is not to try again by itself."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)


def sent(url: str, body: dict[str, Any], path: str = "/v1/completions", *, part: float = 1.0) -> socket.socket:
    """Send a request, or the first part of its body, over a socket of its own."""
    host, port = url.removeprefix("http://").split(":")
    raw = json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json", f"Content-Length: {len(raw)}"]
    found = socket.create_connection((host, int(port)), timeout=10)
    found.sendall("".join(f"{line}\r\n" for line in [*head, ""]).encode() + raw[: int(part * len(raw))])
    return found


def rows(url: str) -> dict[str, float]:
    """Return the metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
        lines = [line.split() for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def outcomes(url: str) -> dict[str, float]:
    """Return how many requests had which outcome."""
    head = 'vitalfew_requests_total{outcome="'
    return {name.removeprefix(head)[:-2]: value for name, value in rows(url).items() if name.startswith(head)}


def until(url: str, **wanted: float) -> None:
    """Wait for gauges to have these values."""
    wait_for(lambda: {name: rows(url)[f"vitalfew_{name}"] for name in wanted} == wanted, lambda: rows(url))


def wait_for(what: Callable[[], bool], why: Callable[[], Any] = lambda: "it does not come true") -> None:
    """Wait for something to come true."""
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end, why()
        time.sleep(0.005)


def counted(served: Serving) -> list[int]:
    """Have the bytes checked against what was admitted after each call of the model; returns what they were."""
    engine, pool, seen = served.scheduler.engine, served.scheduler.pool, []
    forward = engine._forward

    def checked(*args: Any) -> torch.Tensor:
        out = forward(*args)
        seen.append(engine.nbytes)
        assert engine.nbytes <= pool.held <= pool.limit
        return out

    engine._forward = checked
    return seen


class Gate:
    """Holds the model up before one of its chunks of a prompt, counted from now, until `open` is called."""

    def __init__(self, served: Serving, at: int = 1) -> None:
        self.engine, self.calls, self._at = served.scheduler.engine, 0, at
        self._inside, self._go = threading.Event(), threading.Event()
        self._advance = self.engine.advance
        self.engine.advance = self._waiting

    def _waiting(self) -> torch.Tensor | None:
        self.calls += 1
        if self.calls == self._at:
            self._inside.set()
            assert self._go.wait(30)
        return self._advance()

    def reached(self) -> None:
        """Wait until the model stands before that chunk."""
        assert self._inside.wait(30)

    def open(self) -> None:
        """Let it go on."""
        self._go.set()


def chain_model(folder: Path, text: str) -> Path:
    """Write a model that after a byte of a text writes the text's next one, and after the last its end token.

    No byte may occur twice. Attention and the layers' other parts add nothing, so a token is a function of the last.
    """
    model, tokenizer = load(tiny_model(folder))
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert len(set(ids)) == len(ids), "a byte occurs twice"
    size = model.config.vocab_size
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        codes = torch.nn.functional.normalize(torch.randn(size, 32, generator=torch.Generator().manual_seed(0)), dim=1)
        model.model.embed_tokens.weight.copy_(codes)
        model.lm_head.weight.zero_()
        for now, then in itertools.pairwise(ids):
            model.lm_head.weight[then] = 10 * codes[now]
    model.save_pretrained(folder)
    return folder
