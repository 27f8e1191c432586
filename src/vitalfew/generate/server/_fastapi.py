"""The HTTP side: routes, keys, limits, streams, and an end that lets running answers finish."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from vitalfew.core.errors import InputError
from vitalfew.generate.server.jobs import Done, Job, Piece
from vitalfew.generate.server.requests import ApiError, Ask, parse, read_json
from vitalfew.generate.server.responses import Answer, event
from vitalfew.generate.server.serving import Serving

__all__ = ["Server", "build"]

_BODY_SECONDS = 60
_LAST_WORDS = 1.0
"""Seconds that the errors at the end of a drain have to reach those who still wait."""


class _Left(Exception):
    """The client has closed the connection."""


def build(serving: Serving) -> FastAPI:
    """Return the application for a model that is served."""
    settings, scheduler = serving.settings, serving.scheduler

    async def check_key(request: Request) -> None:
        if settings.api_key is None:
            return
        kind, _, sent = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(sent.strip().encode(), settings.api_key.encode()):
            raise ApiError(
                401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key"
            )

    # No pages that load scripts from elsewhere.
    app = FastAPI(title="vitalfew", docs_url=None, redoc_url=None, openapi_url=None)
    for kind in (ApiError, 404, 405, Exception):
        app.add_exception_handler(kind, _as_error)
    app.add_exception_handler(_Left, _as_nothing)
    keyed = [Depends(check_key)]

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not scheduler.alive:
            raise ApiError(503, "the model no longer runs")
        return {"status": "ok"}

    @app.get("/metrics", dependencies=keyed)
    async def metrics() -> Response:
        return PlainTextResponse(scheduler.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", dependencies=keyed)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}", dependencies=keyed)
    async def one_model(name: str) -> dict[str, Any]:
        if name != settings.name:
            raise ApiError(404, f"there is no model {name!r}", param="model", code="model_not_found")
        return model

    @app.post("/v1/chat/completions", dependencies=keyed)
    async def chat(request: Request) -> Response:
        return await _respond(serving, request, chat=True)

    @app.post("/v1/completions", dependencies=keyed)
    async def completion(request: Request) -> Response:
        return await _respond(serving, request, chat=False)

    model = {"id": settings.name, "object": "model", "created": 0, "owned_by": "vitalfew", "context": serving.context}
    return app


async def _as_error(request: Request, error: Exception) -> Response:
    headers: dict[str, str] = {}
    if not isinstance(error, ApiError):
        status, headers = getattr(error, "status_code", 500), dict(getattr(error, "headers", None) or {})
        what = getattr(error, "detail", "the server failed on this request")
        error = ApiError(status, f"{request.method} {request.url.path}: {what}")
    if error.retry is not None:
        headers["Retry-After"] = str(error.retry)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


async def _as_nothing(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _body(request: Request, most: int) -> bytes:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # Also what a page of another site could send without asking.
        raise ApiError(415, "send the body as Content-Type: application/json")
    raw, more = bytearray(), True
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise _Left
                raw += message.get("body", b"")
                more = message.get("more_body", False)
                if len(raw) > most:
                    raise ApiError(413, f"the body has more than {most:,} bytes", code="body_too_large")
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {_BODY_SECONDS} s") from None
    return bytes(raw)


async def _respond(serving: Serving, request: Request, *, chat: bool) -> Response:
    raw = await _body(request, serving.settings.body_bytes)
    queue: asyncio.Queue[Piece | Done | ApiError | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def emit(found: Piece | Done | ApiError) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            loop.call_soon_threadsafe(queue.put_nowait, found)

    def understand() -> tuple[Ask, list[Job]]:
        ask = parse(read_json(raw), chat=chat)
        return ask, serving.jobs(ask, emit)

    ask, jobs = await asyncio.to_thread(understand)  # a long prompt would hold up all streams
    answer = Answer(ask, serving.token_name)
    serving.scheduler.submit(jobs)
    found = _found(request, queue, len(jobs))
    if ask.stream:
        return _Events(_stream(answer, found), lambda: serving.scheduler.cancel(jobs))
    try:
        async for part in found:
            answer.add(part)
    finally:
        serving.scheduler.cancel(jobs)
    return JSONResponse(answer.whole())


class _Events(StreamingResponse):
    """A stream of events that lets go of its jobs when it ends, however it ends; those that are done do not mind."""

    def __init__(self, parts: AsyncIterator[bytes], let_go: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(parts, media_type="text/event-stream", headers=headers)
        self._let_go = let_go

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._let_go()


async def _found(
    request: Request, queue: asyncio.Queue[Piece | Done | ApiError | None], left: int
) -> AsyncIterator[Piece | Done]:
    """Hand on what the scheduler sends, until so many jobs are done or the client has left."""
    gone = asyncio.create_task(_gone(request))
    gone.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while left:
            part = await queue.get()
            if part is None:
                raise _Left
            if isinstance(part, ApiError):
                raise part
            left -= isinstance(part, Done)
            yield part
    finally:
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(answer: Answer, found: AsyncIterator[Piece | Done]) -> AsyncIterator[bytes]:
    try:
        for chunk in answer.opening():
            yield event(chunk)
        async for part in found:
            if isinstance(part, Piece):
                yield event(answer.chunk(part))
            else:
                answer.add(part)
        for chunk in answer.closing():
            yield event(chunk)
        yield event("[DONE]")
    except ApiError as error:  # the status is sent already
        yield event(error.body())
    except _Left:
        return


class Server(uvicorn.Server):
    """Serves a model over HTTP until a signal; then answers that run are finished, and no other is begun.

    A second signal ends those too: each gets an error.

    Parameters
    ----------
    serving
        The model.
    host, port
        Where to listen; port 0 takes a free one.
    drain
        Seconds that running answers have after the signal.
    ready
        Called with the address when the server listens.
    """

    def __init__(
        self, serving: Serving, host: str = "127.0.0.1", port: int = 8000, *, drain: float = 60,
        ready: Callable[[str], None] = lambda url: None,
    ) -> None:  # fmt: skip
        super().__init__(
            uvicorn.Config(
                build(serving),
                host=host,
                port=port,
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
            )
        )
        self._serving, self._drain, self._ready = serving, drain, ready
        self._hurry = False

    async def startup(self, sockets: Any = None) -> None:
        where = f"{self.config.host}, port {self.config.port}"
        try:
            await super().startup(sockets)
        except (SystemExit, OverflowError) as error:  # uvicorn has said why
            raise InputError(f"cannot listen on {where}", hint="choose another --port or --host") from error
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        self._ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, end at the second; neither is raised again, as an end asked for is no failure."""
        self._hurry, self.should_exit = self.should_exit, True

    async def shutdown(self, sockets: Any = None) -> None:
        end = asyncio.create_task(self._hang_up())
        try:
            await super().shutdown(sockets)
        finally:
            end.cancel()

    async def _hang_up(self) -> None:
        """Once the drain is over, tell those who still wait, and close what is open then."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._drain
        while not self._hurry and loop.time() < end:
            await asyncio.sleep(0.1)
        await asyncio.to_thread(self._serving.scheduler.close)
        await asyncio.sleep(_LAST_WORDS)
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def serve_forever(self) -> None:
        """Run until SIGTERM or Ctrl-C, drain, and give the model back."""
        try:
            self.run()
        finally:
            self._serving.close()
