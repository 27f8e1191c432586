"""A server of a tiny model, in a thread, and the official client for it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai

from vitalfew.generate._transformers_weights import load
from vitalfew.generate.server._fastapi import Server
from vitalfew.generate.server.serving import Serving, Settings


@contextlib.contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[tuple[Serving, str]]:
    """Serve a model on a free port; yields it and its address."""
    model, tokenizer = load(folder)
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


def client(url: str, key: str = "none") -> openai.OpenAI:
    """Return the official client, which is not to try again by itself."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)
