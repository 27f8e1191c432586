"""Two policies in one: one chooses from the prompt, the other goes on from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vitalfew.core.errors import InputError
from vitalfew.generate.policy import Policy

__all__ = ["Then", "then"]


@dataclass(frozen=True)
class Then(Policy):
    """One policy for the prompt and another for the tokens after it; made by `then`."""

    recent: float | int | None = field(default=None, kw_only=True)
    prompt: Policy
    decode: Policy

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt.noise != self.decode.noise and self.prompt.voters != 0 and self.decode.votes_later:
            raise InputError("of the two policies one has noise and one has not", hint="give both, or neither, noise")

    @property
    def voters(self) -> int | None:
        return self.prompt.voters

    @property
    def votes_later(self) -> bool:
        return self.decode.votes_later

    @property
    def noise(self) -> bool:
        return self.prompt.noise if self.voters != 0 else self.decode.noise

    @property
    def sums_votes(self) -> bool:
        return self.decode.sums_votes

    def recent_of(self, kept: int) -> int:
        return self.decode.recent_of(kept) if self.recent is None else super().recent_of(kept)

    def least(self) -> int:
        return max(super().least(), self.prompt.least(), self.decode.least())

    def temperature(self, step: int, planned: int) -> float:
        return (self.decode if step else self.prompt).temperature(step, planned)

    def prompt_scores(self, votes: torch.Tensor, pos: torch.Tensor, seed: int) -> torch.Tensor:
        return self.prompt.prompt_scores(votes, pos, seed)

    def kept_scores(self, score: torch.Tensor, pos: torch.Tensor, recent: Sequence[int]) -> torch.Tensor:
        if self.prompt.voters == 0:  # its scores are no votes, to which later ones could be added
            score = torch.where(score == torch.inf, score, 0.0)
        return self.decode.kept_scores(score, pos, recent)

    def later_scores(
        self, score: torch.Tensor, votes: torch.Tensor | None, pos: torch.Tensor, seed: int
    ) -> torch.Tensor:
        return self.decode.later_scores(score, votes, pos, seed)


def then(prompt: Policy, decode: Policy) -> Then:
    """Return a policy that chooses from the prompt by one rule and goes on by another.

    Examples
    --------
    >>> from vitalfew.generate.policies import H2O, SnapKV
    >>> both = then(SnapKV(window=32), H2O())
    >>> both.voters, both.votes_later, both.recent_of(100)
    (32, True, 50)
    """
    return Then(prompt, decode, sinks=max(prompt.sinks, decode.sinks))
