"""One answer as it is written: its tokens become text, and something ends it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vitalfew.generate.server.jobs import Job, Piece, Token
from vitalfew.generate.server.sampling import best
from vitalfew.generate.server.text import TextStream

__all__ = ["Row", "rows_of"]


@dataclass(eq=False)
class Row:
    """One answer.

    Attributes
    ----------
    index
        Its number among those of the request.
    random
        What its draws come from.
    token, written
        The latest token, and how many there are.
    finish
        Why it has ended, if it has.
    """

    job: Job
    index: int
    text: TextStream
    random: random.Random
    token: int = -1
    written: int = 0
    finish: str | None = None

    def take(self, token: int, logits: torch.Tensor, ends: frozenset[int]) -> Piece | None:
        """Take the next token, drawn from these logits; returns what there is to send."""
        job, top = self.job, self.job.sampling.top
        self.token, self.written = token, self.written + 1
        job.written += 1
        text, shown = "", tuple[Token, ...]()
        if token in ends:
            self.finish = "stop"
        else:
            text = self.text.push(token)
            if top is not None:
                shown = (Token(token, *best(logits, token, top)),)
            if self.text.stopped:
                self.finish = "stop"
            elif self.written == job.new:
                self.finish = "length"
        if self.finish is not None:
            text += self.text.flush()
        return Piece(self.index, text, shown, self.finish) if text or shown or self.finish else None


def rows_of(job: Job, decode: Callable[[Sequence[int]], str]) -> list[Row]:
    """Return the answers to a prompt, still without a token."""
    sampling = job.sampling
    seed = random.SystemRandom().getrandbits(64) if sampling.seed is None else sampling.seed
    return [
        Row(
            job, job.first + k, TextStream(decode, sampling.stop, job.before),
            random.Random(f"{seed}:{k}"),  # noqa: S311 - draws, no secret
        )
        for k in range(sampling.n)
    ]  # fmt: skip
