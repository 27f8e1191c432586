"""Which tokens are worth their slot: small frozen records over pure functions of votes and positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Literal

import torch
from torch.nn import functional

from vitalfew.core.errors import InputError
from vitalfew.generate.composed import Then, then
from vitalfew.generate.noise import hashed
from vitalfew.generate.policy import Policy, but_protected, check_count, exact

__all__ = [
    "H2O", "POLICIES", "TOVA", "Keyformer", "Policy", "Random", "Recent", "SnapKV", "Streaming", "Then", "policy_named",
    "then",
]  # fmt: skip


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

    recent: float | int | None = field(default=0.3, kw_only=True)
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
            raise InputError(
                f"a fixed choice needs a recent window, got recent={self.recent}", hint="the published code has 0.3"
            )

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
        return max(least, 2, ceil(1 / exact(self.recent))) if self.fixed and isinstance(self.recent, float) else least

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

    recent: float | int | None = field(default=0.5, kw_only=True)

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

    recent: float | int | None = field(default=None, kw_only=True)
    window: int = 64
    pool: int = 7
    kind: Literal["avg", "max"] = "avg"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window, least=1)
        check_count("pool", self.pool, least=1)
        if self.pool % 2 == 0:
            raise InputError(f"pool must be odd, got {self.pool}", hint=f"try {self.pool + 1}")
        if self.kind not in ("avg", "max"):
            raise InputError(f"there is no pooling {self.kind!r}", hint="choose avg or max")

    @property
    def voters(self) -> int | None:
        return self.window

    def recent_of(self, kept: int) -> int:
        return min(self.window, kept // 2) if self.recent is None else super().recent_of(kept)

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
        return score if votes is None else but_protected(score, votes.mean(1, keepdim=True))


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
        return but_protected(score, pos.to(score.dtype))


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
        return but_protected(score, self.prompt_scores(score, pos, seed))


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
