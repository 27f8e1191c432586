"""What is asked of the scheduler, and what it sends back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vitalfew.generate.request import Plan
from vitalfew.generate.server.pool import Need
from vitalfew.generate.server.requests import ApiError, Sampling

__all__ = ["Done", "Emit", "Job", "Piece", "Token"]


@dataclass(frozen=True)
class Token:
    """A token with its log probability, and the likeliest in its place."""

    id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """More of an answer: its number, text that is sure, tokens where asked for, and why it ended, if it did."""

    index: int
    text: str
    tokens: tuple[Token, ...]
    finish: str | None


@dataclass(frozen=True)
class Done:
    """All answers of a job have ended."""

    prompt: int
    written: int
    kept_bytes: int
    full_bytes: int


Emit = Callable[[Piece | Done | ApiError], None]


@dataclass(eq=False)
class Job:
    """One prompt and its answers.

    Attributes
    ----------
    ids, sampling, new
        The prompt's tokens, how to go on, and tokens at most in each answer.
    plan, need
        What is kept, and the bytes that this takes.
    first
        The number of its first answer among those of the request.
    before
        Tokens that the text of an answer goes on from.
    emit
        Gets each `Piece`, then `Done`, or an `ApiError`; called from the loop's thread.
    cancelled
        Set by anyone: the job ends without another word before the next step.
    """

    ids: list[int]
    sampling: Sampling
    new: int
    emit: Emit
    plan: Plan
    need: Need
    first: int = 0
    before: list[int] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)
    deadline: float = float("inf")
    cancelled: bool = False
    held: int = 0
    overtaken: int = 0
    open: int = 0
    written: int = 0
