"""Answers in OpenAI's shapes: whole, or chunk by chunk."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from vitalfew.generate.server.jobs import Done, Piece, Token
from vitalfew.generate.server.requests import Ask

__all__ = ["Answer", "event"]


def event(body: dict[str, Any] | str) -> bytes:
    r"""Return one server-sent event.

    Examples
    --------
    >>> event("[DONE]")
    b'data: [DONE]\n\n'
    """
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


class Answer:
    """Puts pieces into the JSON that a client expects.

    Parameters
    ----------
    ask
        What was asked.
    name
        The name of a token, for log probabilities.
    """

    def __init__(self, ask: Ask, name: Callable[[int], str]) -> None:
        self._ask, self._name = ask, name
        kind = "chat.completion" if ask.chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if ask.chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time()),
            "model": ask.model, "object": f"{kind}.chunk" if ask.chat and ask.stream else kind,
        }  # fmt: skip
        answers = len(ask.prompts) * ask.sampling.n
        # What `whole` returns; a stream needs but the lengths of its tokens' names so far, and what each job took.
        self._texts = [""] * answers
        self._tokens: list[list[Token]] = [[] for _ in range(answers)]
        self._finish: list[str | None] = [None] * answers
        self._named = [0] * answers
        self._done: list[Done] = []

    def add(self, found: Piece | Done) -> None:
        """Take in what the scheduler sent; of a stream, what is no chunk."""
        if isinstance(found, Done):
            self._done.append(found)
        else:
            self._texts[found.index] += found.text
            self._tokens[found.index] += found.tokens
            self._finish[found.index] = found.finish

    def whole(self) -> dict[str, Any]:
        """Return the answer of a request that does not stream."""
        choices = []
        for index, (text, tokens, finish) in enumerate(zip(self._texts, self._tokens, self._finish, strict=True)):
            message = {"role": "assistant", "content": text, "refusal": None}
            said = {"message": message} if self._ask.chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": self._logprobs(index, tokens), "finish_reason": finish})
        return {**self._head, "choices": choices, "usage": self._usage()}

    def opening(self) -> list[dict[str, Any]]:
        """Return the first chunks of a stream, which say who speaks."""
        if not self._ask.chat:
            return []
        return [self._chunk(k, {"role": "assistant", "content": ""}, (), None) for k in range(len(self._texts))]

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """Return a piece as a chunk of a stream."""
        delta = {"content": piece.text} if piece.text else {}
        return self._chunk(piece.index, delta if self._ask.chat else piece.text, piece.tokens, piece.finish)

    def closing(self) -> list[dict[str, Any]]:
        """Return the last chunks of a stream."""
        return [{**self._head, "choices": [], "usage": self._usage()}] if self._ask.usage else []

    def _chunk(self, index: int, said: Any, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        probabilities = self._logprobs(index, tokens) if tokens else None
        choice = {"index": index, "delta" if self._ask.chat else "text": said, "logprobs": probabilities}
        more = {"usage": None} if self._ask.usage else {}
        return {**self._head, "choices": [{**choice, "finish_reason": finish}], **more}

    def _usage(self) -> dict[str, Any]:
        prompt, written = sum(done.prompt for done in self._done), sum(done.written for done in self._done)
        return {
            "prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written,
            "kv_cache": {
                "kept_bytes": sum(done.kept_bytes for done in self._done),
                "full_bytes": sum(done.full_bytes for done in self._done),
            },
        }  # fmt: skip

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self._ask.sampling.top is None:
            return None
        if self._ask.chat:
            return {
                "content": [
                    {**self._token(t.id, t.logprob), "top_logprobs": [self._token(*pair) for pair in t.top]}
                    for t in tokens
                ],
                "refusal": None,
            }
        names, offsets, top = [self._name(t.id) for t in tokens], [], []
        for token, name in zip(tokens, names, strict=True):
            offsets.append(self._named[index])
            self._named[index] += len(name)
            likely: dict[str, float] = {}
            for other, value in token.top:  # parts of characters share a name: the likeliest has it
                likely.setdefault(self._name(other), value)
            top.append(likely)
        return {
            "tokens": names, "token_logprobs": [t.logprob for t in tokens], "text_offset": offsets, "top_logprobs": top,
        }  # fmt: skip

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        name = self._name(token)
        # A token may be a part of a character; then its bytes are not those of its name.
        return {"token": name, "logprob": logprob, "bytes": None if "\ufffd" in name else list(name.encode())}
