"""What all policies share: which queries vote, and what becomes of their votes.

A vote is the attention weight that a query gives to a key, averaged over the query heads of a KV head. What has the
lowest score goes first, and what is at infinity never goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor

import torch

from vitalfew.core.errors import InputError

__all__ = ["Policy", "but_protected", "check_count", "exact"]


@dataclass(frozen=True)
class Policy:
    """What all policies share; by itself it lets the lowest score go and never votes.

    Attributes
    ----------
    recent
        The latest tokens, which never go: a share of the kept slots (float) or a count (int); None for the policy's own
        rule, where it has one.
    sinks
        How many of a row's first tokens never go.
    """

    recent: float | int | None = field(default=0, kw_only=True)
    sinks: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        check_count("sinks", self.sinks)
        if isinstance(self.recent, float):
            if not 0 <= self.recent <= 1:
                raise InputError(
                    f"recent as a share must lie in [0, 1], got {self.recent}", hint="for a count pass an int"
                )
        elif self.recent is not None:
            check_count("recent", self.recent)

    @property
    def voters(self) -> int | None:
        """How many of the prompt's last queries vote: None for all."""
        return 0

    @property
    def votes_later(self) -> bool:
        """Whether each query after the prompt votes too."""
        return False

    @property
    def noise(self) -> bool:
        """Whether Gumbel noise is added to the logits that become votes."""
        return False

    @property
    def sums_votes(self) -> bool:
        """Whether later votes are simply added, so that `scores.vote_and_mark` does the whole step at once."""
        return self.votes_later and type(self).later_scores is Policy.later_scores

    def recent_of(self, kept: int) -> int:
        """Return the recent window among so many kept slots.

        Examples
        --------
        >>> Policy(recent=0.3).recent_of(24)
        7
        """
        return min(kept, floor(kept * exact(self.recent)) if isinstance(self.recent, float) else self.recent or 0)

    def least(self) -> int:
        """Return the fewest slots per head that this policy can work with: sinks, a counted window, and one more."""
        return self.sinks + (0 if isinstance(self.recent, float) else self.recent or 0) + 1

    def temperature(self, step: int, planned: int) -> float:
        """Return what divides the logits that become votes; step 0 is the prompt."""
        return 1.0

    def prompt_scores(self, votes: torch.Tensor, pos: torch.Tensor, seed: int) -> torch.Tensor:
        """Turn the votes of a prompt ``(B, H, n)``, summed over its voters, into scores."""
        return votes

    def kept_scores(self, score: torch.Tensor, pos: torch.Tensor, recent: Sequence[int]) -> torch.Tensor:
        """Return the scores that the chosen slots ``(B, H, C)`` start with, `recent` being each row's window."""
        return score

    def later_scores(
        self, score: torch.Tensor, votes: torch.Tensor | None, pos: torch.Tensor, seed: int
    ) -> torch.Tensor:
        """Return the scores of slots ``(B, H, C)`` after one more token and, with `votes_later`, its votes."""
        return score if votes is None else score + votes


def exact(share: float) -> Fraction:
    """Return the decimal that was written, so that 0.29 of 100 is 29."""
    return Fraction(repr(float(share)))


def check_count(name: str, value: object, least: int = 0) -> None:
    """Refuse what is no whole number from `least` on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number from {least} on, got {value!r}", hint="pass an int")


def but_protected(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return the new scores, except where a slot is at infinity, which it never leaves."""
    return torch.where(old == torch.inf, old, new)
