"""The verb that answers requests over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitalfew.cli._output import say

__all__ = ["serve"]

_LOCAL = ("127.0.0.1", "::1", "localhost")


def serve(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder of transformers, or smollm2 for the sample weights.")
    ],
    budget: Annotated[
        str, typer.Option(help="What may stay of each prompt: a share such as 50%, or tokens such as 512.")
    ] = "50%",
    policy: Annotated[str, typer.Option(help="Who stays, as for generate.")] = "keyformer",
    kv_memory: Annotated[str, typer.Option(help="For keys and values of all requests, such as 2GiB.")] = "1GiB",
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="VITALFEW_API_KEY", help="What clients must send; better in the environment.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; else its folder's name.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer at most; else the context's end.")] = None,
    queue: Annotated[int, typer.Option(help="Requests that may wait; one more is refused.")] = 256,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take, its waiting included.")] = 600,
    drain: Annotated[int, typer.Option(min=0, help="Seconds that running answers have after SIGTERM.")] = 60,
    seed: Annotated[int, typer.Option(help="Of the policy's noise.")] = 0,
) -> None:
    """Answer OpenAI-style requests over HTTP.

    The keys and values of all requests stay within --kv-memory. Ctrl-C or SIGTERM lets running answers finish; a
    second one ends them.
    """
    from vitalfew.cli._generate import open_model
    from vitalfew.core import need
    from vitalfew.generate.comparing import budget_of
    from vitalfew.generate.server.serving import Serving, Settings

    settings = Settings(
        name or Path(model).resolve().name, budget_of(budget), policy, seed=seed, kv_memory=kv_memory, queue=queue,
        timeout=timeout, max_tokens=max_tokens, api_key=api_key,
    )  # fmt: skip
    for module in ("fastapi", "uvicorn"):
        need(module)
    from vitalfew.generate.server._fastapi import Server

    if host not in _LOCAL and api_key is None:
        say(f"anyone who reaches {host} can use this server: set --api-key, or VITALFEW_API_KEY")
    served = Serving(*open_model(model), settings)
    server = Server(served, host, port, drain=drain, ready=lambda url: say(f"serving {settings.name} on {url}/v1"))
    server.serve_forever()
    say("stopped")
