"""Which tokens are worth their slot: each policy is a small frozen record over pure functions of votes and positions.

A vote is the attention weight that a query gives to a key, averaged over the query heads of a KV head. A policy says
which queries vote and makes scores of the votes; what has the lowest score goes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, floor
from typing import Any, Literal

import torch
from torch.nn import functional

from vitalfew.core.errors import InputError
from vitalfew.generate.noise import hashed

__all__ = [
    "H2O", "POLICIES", "TOVA", "Keyformer", "Policy", "Random", "Recent", "SnapKV", "Streaming", "Then", "policy_named",
    "then",
]  # fmt: skip


@dataclass(frozen=True)
class Policy:
    """What all policies share; by itself it lets the lowest score go and never votes.

    Attributes
    ----------
    recent
        The latest tokens, which never go: a share of the kept slots (float) or a count (int).
    sinks
        How many of a row's first tokens never go.
    """

    recent: float | int = field(default=0, kw_only=True)
    sinks: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        _check_count("sinks", self.sinks)
        if isinstance(self.recent, float):
            if not 0 <= self.recent <= 1:
                raise InputError(
                    f"recent as a share must lie in [0, 1], got {self.recent}", hint="for a count pass an int"
                )
        else:
            _check_count("recent", self.recent)

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
        >>> Keyformer().recent_of(24)
        7
        """
        return min(kept, floor(kept * _exact(self.recent)) if isinstance(self.recent, float) else self.recent)

    def least(self) -> int:
        """Return the fewest slots per head that this policy can work with: sinks, a counted window, and one more."""
        return self.sinks + (0 if isinstance(self.recent, float) else self.recent) + 1

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


@dataclass(frozen=True)
class Keyformer(Policy):
    """Votes of all queries, softened by a rising temperature and summed per layer and head (Adnan et al., MLSys 2024).

    Parameters
    ----------
    tau_init, tau_end
        The temperature in the prompt and at the last planned token; in between it is linear.
    noise
        Gumbel noise on the logits, as in the paper.
    fixed
        Tokens chosen in the prompt never go: only the recent window moves.

    Examples
    --------
    >>> Keyformer().temperature(step=5, planned=10), Keyformer().temperature(step=20, planned=10)
    (1.5, 2.0)
    """

    recent: float | int = field(default=0.3, kw_only=True)
    tau_init: float = field(default=1.0, kw_only=True)
    tau_end: float = field(default=2.0, kw_only=True)
    noise: bool = field(default=False, kw_only=True)
    fixed: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, tau in (("tau_init", self.tau_init), ("tau_end", self.tau_end)):
            if not 0 < tau < float("inf"):
                raise InputError(f"{name} must be positive and finite, got {tau}", hint="the paper goes from 1 to 2")
        if self.fixed and not self.recent:
            raise InputError("a fixed choice needs a recent window, got recent=0", hint="the published code has 0.3")

    @classmethod
    def dynamic(cls, **changes: Any) -> Keyformer:
        """Return the paper's method: with noise."""
        return cls(**{"noise": True, **changes})

    @classmethod
    def frozen(cls, **changes: Any) -> Keyformer:
        """Return what the published code computes: one choice after the prompt, then a sliding window.

        The new token takes the slot of the oldest in the window, so position n - w is seen by the prompt alone.
        """
        return cls(**{"noise": True, "fixed": True, **changes})

    @property
    def voters(self) -> int | None:
        return None

    @property
    def votes_later(self) -> bool:
        return not self.fixed

    def recent_of(self, kept: int) -> int:
        window = super().recent_of(kept)
        return max(window, 1) if self.fixed else window

    def least(self) -> int:
        least = super().least()
        # A window of one token and one key.
        return max(least, 2, ceil(1 / _exact(self.recent))) if self.fixed and isinstance(self.recent, float) else least

    def temperature(self, step: int, planned: int) -> float:
        share = min(step / planned, 1.0) if planned > 0 else float(step > 0)
        return self.tau_init + share * (self.tau_end - self.tau_init)

    def kept_scores(self, score: torch.Tensor, pos: torch.Tensor, recent: Sequence[int]) -> torch.Tensor:
        if not self.fixed:
            return score
        window = torch.tensor(recent, device=pos.device)[:, None, None]
        return score.masked_fill((pos >= 0) & (pos <= pos.amax(-1, keepdim=True) - window), torch.inf)


@dataclass(frozen=True)
class H2O(Policy):
    """Attention weights of all queries, summed: the heavy hitters stay (Zhang et al., NeurIPS 2023).

    Examples
    --------
    >>> H2O().recent_of(10)
    5
    """

    recent: float | int = field(default=0.5, kw_only=True)

    @property
    def voters(self) -> int | None:
        return None

    @property
    def votes_later(self) -> bool:
        return True


@dataclass(frozen=True)
class SnapKV(Policy):
    """Attention weights of the prompt's last queries, smoothed over neighbouring keys (Li et al., NeurIPS 2024).

    Nothing votes after the prompt: a new token leaves when it leaves the recent window. To go on scoring, see `then`.

    Parameters
    ----------
    window
        How many queries vote. They stay, unless `recent` says otherwise or they would take more than half the slots.
    pool
        How many neighbouring keys are smoothed over; odd.
    kind
        ``"avg"`` or ``"max"``.

    Examples
    --------
    >>> SnapKV(32).recent_of(100), SnapKV(32).recent_of(40)
    (32, 20)
    """

    window: int = 64
    pool: int = 7
    kind: Literal["avg", "max"] = "avg"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("window", self.window, least=1)
        _check_count("pool", self.pool, least=1)
        if self.pool % 2 == 0:
            raise InputError(f"pool must be odd, got {self.pool}", hint=f"try {self.pool + 1}")
        if self.kind not in ("avg", "max"):
            raise InputError(f"there is no pooling {self.kind!r}", hint="choose avg or max")

    @property
    def voters(self) -> int | None:
        return self.window

    def recent_of(self, kept: int) -> int:
        return super().recent_of(kept) if self.recent else min(self.window, kept // 2)

    def prompt_scores(self, votes: torch.Tensor, pos: torch.Tensor, seed: int) -> torch.Tensor:
        # Neighbours are neighbours in the text; padding comes first and has no votes, so it smooths like the border.
        order = pos.argsort(dim=-1, stable=True)
        row = votes.masked_fill(pos < 0, 0.0).gather(-1, order)
        if self.kind == "avg":
            row = functional.avg_pool1d(row, self.pool, 1, self.pool // 2)
        else:
            row = functional.max_pool1d(row, self.pool, 1, self.pool // 2)
        return torch.empty_like(votes).scatter_(-1, order, row)


@dataclass(frozen=True)
class TOVA(Policy):
    """The weight from the latest query alone, one choice for all heads of a layer (Oren et al., EMNLP 2024).

    Examples
    --------
    >>> TOVA().voters
    1
    """

    @property
    def voters(self) -> int | None:
        return 1

    @property
    def votes_later(self) -> bool:
        return True

    def prompt_scores(self, votes: torch.Tensor, pos: torch.Tensor, seed: int) -> torch.Tensor:
        return votes.mean(1, keepdim=True).expand_as(votes)

    def later_scores(
        self, score: torch.Tensor, votes: torch.Tensor | None, pos: torch.Tensor, seed: int
    ) -> torch.Tensor:
        return score if votes is None else _but_protected(score, votes.mean(1, keepdim=True))


@dataclass(frozen=True)
class Recent(Policy):
    """The latest tokens.

    Examples
    --------
    >>> Recent().prompt_scores(torch.zeros(1, 1, 3), torch.arange(3).expand(1, 1, 3), seed=0)
    tensor([[[0., 1., 2.]]])
    """

    def prompt_scores(self, votes: torch.Tensor, pos: torch.Tensor, seed: int) -> torch.Tensor:
        return pos.to(votes.dtype)

    def later_scores(
        self, score: torch.Tensor, votes: torch.Tensor | None, pos: torch.Tensor, seed: int
    ) -> torch.Tensor:
        return _but_protected(score, pos.to(score.dtype))


@dataclass(frozen=True)
class Streaming(Recent):
    """A row's first tokens and the latest ones (StreamingLLM; Xiao et al., ICLR 2024).

    Examples
    --------
    >>> Streaming(4).least()
    5
    """

    sinks: int = 4


@dataclass(frozen=True)
class Random(Policy):
    """Tokens drawn at random from all so far, per head: the control that every other policy should beat.

    Examples
    --------
    >>> scores = Random().prompt_scores(torch.zeros(1, 2, 3), torch.arange(3).expand(1, 2, 3), seed=0)
    >>> len(set(scores.flatten().tolist()))
    6
    """

    def prompt_scores(self, votes: torch.Tensor, pos: torch.Tensor, seed: int) -> torch.Tensor:
        head = torch.arange(pos.shape[1], device=pos.device)[:, None]
        return hashed(seed, head, pos.to(torch.int64)).to(votes.dtype)

    def later_scores(
        self, score: torch.Tensor, votes: torch.Tensor | None, pos: torch.Tensor, seed: int
    ) -> torch.Tensor:
        return _but_protected(score, self.prompt_scores(score, pos, seed))


@dataclass(frozen=True)
class Then(Policy):
    """One policy for the prompt and another for the tokens after it; made by `then`."""

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
        return super().recent_of(kept) if self.recent else self.decode.recent_of(kept)

    def least(self) -> int:
        return max(super().least(), self.prompt.least(), self.decode.least())

    def temperature(self, step: int, planned: int) -> float:
        return (self.decode if step else self.prompt).temperature(step, planned)

    def prompt_scores(self, votes: torch.Tensor, pos: torch.Tensor, seed: int) -> torch.Tensor:
        return self.prompt.prompt_scores(votes, pos, seed)

    def kept_scores(self, score: torch.Tensor, pos: torch.Tensor, recent: Sequence[int]) -> torch.Tensor:
        return self.decode.kept_scores(score, pos, recent)

    def later_scores(
        self, score: torch.Tensor, votes: torch.Tensor | None, pos: torch.Tensor, seed: int
    ) -> torch.Tensor:
        return self.decode.later_scores(score, votes, pos, seed)


def then(prompt: Policy, decode: Policy) -> Then:
    """Return a policy that chooses from the prompt by one rule and goes on by another.

    Examples
    --------
    >>> both = then(SnapKV(window=32), H2O())
    >>> both.voters, both.votes_later, both.recent_of(100)
    (32, True, 50)
    """
    return Then(prompt, decode, sinks=max(prompt.sinks, decode.sinks))


POLICIES: dict[str, Callable[[], Policy]] = {
    "keyformer": Keyformer,
    "keyformer-dynamic": Keyformer.dynamic,
    "keyformer-frozen": Keyformer.frozen,
    "h2o": H2O,
    "snapkv": SnapKV,
    "tova": TOVA,
    "streaming": Streaming,
    "recent": Recent,
    "random": Random,
}
"""The policies by the names that people type."""


def policy_named(text: str) -> Policy:
    """Return the policy of a name, with its defaults.

    Raises
    ------
    InputError
        If there is none of that name; it lists those there are.

    Examples
    --------
    >>> policy_named("h2o")
    H2O(recent=0.5, sinks=0)
    """
    if text not in POLICIES:
        raise InputError(f"there is no policy {text!r}", hint=f"choose one of {', '.join(POLICIES)}")
    return POLICIES[text]()


def _exact(share: float) -> Fraction:
    """Return the decimal that was written, so that 0.29 of 100 is 29."""
    return Fraction(repr(share))


def _check_count(name: str, value: object, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number from {least} on, got {value!r}", hint="pass an int")


def _but_protected(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return the new scores, except where a slot is at infinity, which it never leaves."""
    return torch.where(old == torch.inf, old, new)
