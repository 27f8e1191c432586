"""A model that is served: its tokens, its limits, and the jobs that a request becomes."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vitalfew.core.budget import Budget, parse_size
from vitalfew.core.errors import InputError
from vitalfew.generate.keeping import keeper
from vitalfew.generate.key_tokens import KeyTokens
from vitalfew.generate.policies import Policy, policy_named
from vitalfew.generate.request import Plan
from vitalfew.generate.server.jobs import Emit, Job
from vitalfew.generate.server.requests import ApiError, Ask, shown
from vitalfew.generate.server.scheduler import Scheduler

__all__ = ["Serving", "Settings"]

_BEFORE = 4
"""Tokens of a prompt that the text of its answer goes on from."""


@dataclass(frozen=True)
class Settings:
    """How a model is served.

    Attributes
    ----------
    name
        What clients call the model.
    budget, policy, min_length, seed
        As of `KeyTokens`; the same for all requests.
    kv_memory
        Bytes, or a text such as ``"1 GiB"``, for keys and values of all requests together.
    queue
        Requests that may wait; one more is refused.
    timeout
        Seconds that a request may take, waiting included.
    max_tokens
        Tokens of an answer at most; None for what the context leaves.
    chunk
        Tokens of a prompt that are read between two steps of the others.
    body_bytes
        Size of a request at most.
    api_key
        What clients must send; None: nothing.

    Examples
    --------
    >>> Settings("small", "25%", kv_memory="512 MiB").queue
    256
    """

    name: str
    budget: Budget | float | int | str = 0.5
    policy: str | Policy = "keyformer"
    min_length: int = 256
    seed: int = 0
    kv_memory: int | str = "1 GiB"
    queue: int = 256
    timeout: float = 600.0
    max_tokens: int | None = None
    chunk: int = 256
    body_bytes: int = 4 << 20
    api_key: str | None = None

    def __post_init__(self) -> None:
        for field, least in (("queue", 1), ("chunk", 1), ("timeout", 0), ("body_bytes", 1)):
            if not getattr(self, field) >= least:
                raise InputError(f"{field} must be at least {least}, got {getattr(self, field)}", hint="leave it out")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, got {self.max_tokens}", hint="leave it out for no limit")
        key = self.api_key
        if key is not None and not (key.isascii() and key.isprintable() and key and key == key.strip()):
            # No header could bring it; a line's end from a file is what this mostly is.
            raise InputError("an API key must be printable ASCII without space around it", hint="leave it out for none")
        if isinstance(self.policy, str):
            policy_named(self.policy)


class Serving:
    """Enables a model and serves it until `close`.

    Parameters
    ----------
    model, tokenizer
        Of transformers; the model must have full attention in all layers.
    settings
        The limits.

    Raises
    ------
    InputError
        If the model cannot be served, or a setting cannot be used.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: Settings) -> None:
        from vitalfew.generate.server._transformers_engine import Engine

        self.settings = settings
        memory = parse_size(settings.kv_memory) if isinstance(settings.kv_memory, str) else settings.kv_memory
        config = model.config.get_text_config(decoder=True)
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self._tokenizer, self._lock, self._vocabulary = tokenizer, threading.Lock(), config.vocab_size
        reader = copy.deepcopy(tokenizer)  # decodes in the loop's thread while this one encodes in others

        def decode(ids: Sequence[int], *, special: bool = False) -> str:
            return str(reader.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False))

        self._plan = functools.lru_cache(maxsize=64)(self._plan_of)
        self.token_name: Callable[[int], str] = lambda token: decode([token], special=True)
        self._few = KeyTokens(
            model, settings.budget, policy=settings.policy, min_length=settings.min_length, seed=settings.seed
        )
        try:
            self.scheduler = Scheduler(
                Engine(self._few, chunk=settings.chunk), decode, _ends(model, tokenizer),
                memory=memory, queue=settings.queue, timeout=settings.timeout,
            )  # fmt: skip
        except BaseException:
            self._few.undo()
            raise

    def close(self) -> None:
        """Stop, and give the model back as it was."""
        self.scheduler.close()
        self._few.undo()

    def jobs(self, ask: Ask, emit: Emit) -> list[Job]:
        """Return what a request asks for as jobs; each piece's number counts over all of its answers.

        Raises
        ------
        ApiError
            If the model is another, the prompt is too long, or there is no chat template.
        """
        if ask.model != self.settings.name:
            raise ApiError(
                404, f"there is no model {shown(ask.model)}, this server has {self.settings.name!r}", param="model",
                code="model_not_found",
            )  # fmt: skip
        if len(ask.prompts) > self.settings.queue:
            raise ApiError(
                400, f"{len(ask.prompts):,} prompts in one request, at most {self.settings.queue:,} can wait",
                param="prompt",
            )  # fmt: skip
        return [self._job(ask, self._encode(prompt), k, emit) for k, prompt in enumerate(ask.prompts)]

    def _job(self, ask: Ask, ids: list[int], number: int, emit: Emit) -> Job:
        sampling, most = ask.sampling, self.settings.max_tokens
        field = "messages" if ask.chat else "prompt"
        if not ids:
            raise ApiError(400, "the prompt is empty", param=field)
        left = None if self.context is None else self.context - len(ids)
        if left is not None and left < (sampling.most or 1):
            raise ApiError(
                400, f"the prompt has {len(ids):,} tokens and {sampling.most or 1:,} more are asked for, the model has "
                f"room for {self.context:,}", param=field, code="context_length_exceeded",
            )  # fmt: skip
        if most is not None and (sampling.most or 1) > most:
            raise ApiError(400, f"an answer has at most {most:,} tokens, got {sampling.most:,}", param="max_tokens")
        new = sampling.most or min(limit for limit in (left, most, 1 << 20) if limit is not None)
        try:
            plan = self._plan(ask.budget)
            need = self.scheduler.engine.shape.need(plan, len(ids), new, sampling.n)
        except InputError as error:  # too short for the budget
            raise ApiError(400, str(error), param=field, code="cannot_evict") from None

        before = [] if ask.chat else ids[-_BEFORE:]
        return Job(ids, sampling, new, emit, plan, need, first=number * sampling.n, before=before)

    def _plan_of(self, budget: float | None) -> Plan:
        """Return what is kept with this share; equal shares get the same plan, so that their rows stand together."""
        engine = self.scheduler.engine
        if budget is None:
            return engine.plan
        slots = engine.shape.slot
        return replace(
            engine.plan,
            keep=keeper(Budget("share", budget), range(len(slots)), slots, least=engine.plan.policy.least()),
        )

    def _encode(self, prompt: str | list[int] | list[dict[str, Any]]) -> list[int]:
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            if strange := [token for token in prompt if not 0 <= token < self._vocabulary]:
                message = f"there is no token {strange[0]}: they go from 0 to {self._vocabulary - 1}"
                raise ApiError(400, message, param="prompt")
            return prompt
        chat = isinstance(prompt, list)
        with self._lock:
            text = self._rendered(prompt) if chat else prompt  # type: ignore[arg-type]
            # A template writes the special tokens itself. Long texts are the point: no warning about their length.
            return list(self._tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"])

    def _rendered(self, messages: list[dict[str, Any]]) -> str:
        if not getattr(self._tokenizer, "chat_template", None):
            raise ApiError(400, "this model has no chat template: use /v1/completions", code="no_chat_template")
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # noqa: BLE001 - a template is a program of the model's and raises what it likes
            message = f"the model's chat template refuses these messages: {error}"
            raise ApiError(400, message, param="messages") from None


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = named if isinstance(named, list) else [named]
    return frozenset(token for token in (*found, tokenizer.eos_token_id) if token is not None)
