"""What OpenAI-style requests may say, checked: an answer that a setting would change never ignores it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ApiError", "Ask", "Sampling", "parse", "read_json", "shown"]

_NO_EFFECT = {"user", "metadata", "safety_identifier", "prompt_cache_key"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,), "echo": (False,), "suffix": ("",), "frequency_penalty": (0,), "presence_penalty": (0,),
    "logit_bias": ({},), "tools": ([],), "tool_choice": ("none", "auto"), "response_format": ({"type": "text"},),
    "store": (False,), "service_tier": ("auto", "default"), "modalities": (["text"],),
}  # fmt: skip
"""Settings that are not served, and the values of theirs that ask for nothing."""

_SHARED = {
    "model", "stream", "stream_options", "temperature", "top_p", "n", "seed", "stop", "max_tokens", "logprobs",
    "kv_budget",
}  # fmt: skip
_OWN = {"chat": {"messages", "max_completion_tokens", "top_logprobs"}, "completion": {"prompt"}}
_MOST_TOP, _LONGEST_STOP, _SHOWN = 20, 1000, 80


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape.

    Examples
    --------
    >>> ApiError(404, "there is no model 'x'", param="model", code="model_not_found").body()["error"]["code"]
    'model_not_found'
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry

    def body(self) -> dict[str, Any]:
        """Return the JSON of the answer."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Sampling:
    """How an answer is written.

    Attributes
    ----------
    most
        Tokens at most; None for what is left of the context.
    top
        How many of the likeliest tokens are reported beside each; None: not even the token's own probability.
    """

    most: int | None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    top: int | None = None


@dataclass(frozen=True)
class Ask:
    """A request that was understood.

    Attributes
    ----------
    prompts
        Texts, tokens, or, of a chat, its messages (then just one).
    budget
        The share of the prompt that may stay, if it is not the server's: a field ``kv_budget`` beside OpenAI's.
    """

    chat: bool
    model: str
    prompts: tuple[str | list[int] | list[dict[str, Any]], ...]
    sampling: Sampling
    stream: bool
    usage: bool
    budget: float | None = None


def read_json(raw: bytes) -> dict[str, Any]:
    """Return the JSON object in a body.

    Examples
    --------
    >>> read_json(b'{"model": "m"}')
    {'model': 'm'}
    """
    try:
        found = json.loads(raw.decode(), parse_constant=_no_number)
        json.dumps(found, ensure_ascii=False).encode()  # an escape may stand for half a character
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(400, f"the body must be a JSON object, got a {type(found).__name__}", code="invalid_json")
    return found


def shown(value: Any) -> str:
    """Return a value as an error names it: its beginning, where it is long.

    Examples
    --------
    >>> shown("a"), len(shown("a" * 1000))
    ("'a'", 80)
    """
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


class _Fields:
    """The fields of a body that are not null."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.body = {key: value for key, value in body.items() if value is not None}

    def number(self, name: str, low: float, high: float, default: float) -> float:
        value = self.body.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ApiError(400, f"{name} must be a number from {low:g} to {high:g}, got {shown(value)}", param=name)
        return float(value)

    def count(self, name: str, low: int, high: int, default: int | None) -> int | None:
        value = self.body.get(name, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high):
            raise ApiError(400, f"{name} must be a whole number from {low} to {high}, got {shown(value)}", param=name)
        return value

    def flag(self, name: str) -> bool:
        value = self.body.get(name, False)
        if not isinstance(value, bool):
            raise ApiError(400, f"{name} must be true or false, got {shown(value)}", param=name)
        return value


def parse(body: Mapping[str, Any], *, chat: bool) -> Ask:
    """Return what a body asks for.

    Raises
    ------
    ApiError
        With status 400 and the field, if something is missing, wrong, or not served.

    Examples
    --------
    >>> parse({"model": "m", "prompt": "Once", "max_tokens": 5}, chat=False).sampling.most
    5
    """
    fields = _Fields(body)
    known = _SHARED | _OWN["chat" if chat else "completion"] | _NO_EFFECT
    for name, value in fields.body.items():
        if name in known:
            continue
        if name not in _NEUTRAL:
            raise ApiError(400, f"there is no setting {shown(name)}", param=name[:_SHOWN], code="unknown_parameter")
        if value not in _NEUTRAL[name]:
            message = f"{name} is not served, got {shown(value)}: leave it out"
            raise ApiError(400, message, param=name, code="unsupported_parameter")
    model = fields.body.get("model")
    if not isinstance(model, str):
        raise ApiError(400, "the field model is missing: name the model that /v1/models lists", param="model")
    stream = fields.flag("stream")
    usage = _wants_usage(fields.body.get("stream_options", {}), stream)
    prompts = (_messages(fields.body),) if chat else _prompts(fields.body.get("prompt"))
    budget = fields.number("kv_budget", 0, 1, 1) if "kv_budget" in fields.body else None
    if budget == 0:
        raise ApiError(400, "a kv_budget of 0 keeps nothing: 0.5 keeps half of the prompt", param="kv_budget")
    return Ask(chat, model, prompts, _sampling(fields, chat), stream, usage, budget)


def _wants_usage(options: Any, stream: bool) -> bool:
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise ApiError(400, f"stream_options may hold include_usage, got {shown(options)}", param="stream_options")
    if options and not stream:
        raise ApiError(400, "stream_options is for stream=true only", param="stream_options")
    inner = _Fields({f"stream_options.{name}": value for name, value in options.items()})
    if inner.flag("stream_options.include_obfuscation"):
        raise ApiError(400, "obfuscation is not served", param="stream_options", code="unsupported_parameter")
    return inner.flag("stream_options.include_usage")


def _sampling(fields: _Fields, chat: bool) -> Sampling:
    high = 1 << 31
    most = fields.count("max_tokens", 1, high, None if chat else 16)
    if chat:
        old, most = most, fields.count("max_completion_tokens", 1, high, most)
        if old not in (None, most):
            raise ApiError(400, "max_tokens is the old name of max_completion_tokens: send one", param="max_tokens")
        wanted = fields.flag("logprobs")
        top = fields.count("top_logprobs", 0, _MOST_TOP, 0)
        if top and not wanted:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        top = top if wanted else None
    else:
        top = fields.count("logprobs", 0, _MOST_TOP, None)
    stop = fields.body.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > 4 or not all(
        isinstance(text, str) and 0 < len(text) <= _LONGEST_STOP for text in stops
    ):  # fmt: skip
        limits = f"a text or up to four, each of 1 to {_LONGEST_STOP:,} characters"
        raise ApiError(400, f"stop must be {limits}, got {shown(stop)}", param="stop")
    return Sampling(
        most, fields.number("temperature", 0, 2, 1), fields.number("top_p", 0, 1, 1),
        fields.count("seed", -(1 << 63), (1 << 63) - 1, None), tuple(stops), fields.count("n", 1, 128, 1) or 1, top,
    )  # fmt: skip


def _prompts(prompt: Any) -> tuple[str | list[int], ...]:
    one = isinstance(prompt, str) or _tokens(prompt)
    found = [prompt] if one else prompt
    if not isinstance(found, list) or not found or not all(isinstance(p, str) or _tokens(p) for p in found):
        raise ApiError(400, "prompt must be a text, a list of tokens, or a list of such", param="prompt")
    return tuple(found)


def _tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list with one message at least", param="messages")
    out = []
    for k, message in enumerate(messages):
        where = f"messages[{k}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ApiError(400, f"{where} must be an object with a role", param=where)
        given = {key: value for key, value in message.items() if value not in (None, [])}
        if more := given.keys() - {"role", "content", "name"}:
            raise ApiError(400, f"{where} holds {shown(sorted(more))}, which is not served", param=where)
        name = given.get("name", "")
        if not isinstance(name, str):
            raise ApiError(400, f"{where}.name must be text, got {shown(name)}", param=where)
        named = {"name": name} if name else {}  # for templates that show it
        out.append({"role": message["role"], "content": _content(message.get("content"), where), **named})
    return out


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [
        part["text"] for part in parts
        if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    ]  # fmt: skip
    if not texts or len(texts) < len(parts):
        raise ApiError(400, f"{where}.content must be text: images, audio and files are not served", param=where)
    return "".join(texts)
