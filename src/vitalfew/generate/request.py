"""What all layers of one cache share: where the prompt ends, what is kept, and the tokens of the current call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from vitalfew.core.errors import InputError
from vitalfew.generate.policies import Policy
from vitalfew.generate.quant import Codec

if TYPE_CHECKING:
    from vitalfew.generate.steady import Clock

__all__ = ["NewTokens", "Plan", "Request"]


@dataclass(frozen=True)
class Plan:
    """How each layer chooses.

    Attributes
    ----------
    policy
        Which tokens stay.
    keep
        ``keep(layer, tokens, planned, rows)``: slots for a row of so many tokens; None to never evict.
    voters
        How many of the prompt's last tokens are the question; None for what the policy says.
    protect
        Ranges of the prompt that never go, as own positions of a row.
    min_length
        Rows shorter than this are left whole.
    seed
        Of the noise and of random choices.
    each_chunk
        Choose after each chunk of the prompt, not only after the last.
    mass
        Instead of what `keep` says: the fewest slots per layer that keep this share of the prompt's votes.
    codec
        Of kept keys and values; None for the model's own type.
    """

    policy: Policy
    keep: Callable[[int, int, int, int], int] | None
    voters: int | None = None
    protect: tuple[slice, ...] = ()
    min_length: int = 0
    seed: int = 0
    each_chunk: bool = False
    mass: float | None = None
    codec: Codec | None = None


@dataclass(frozen=True)
class NewTokens:
    """The tokens of one call: own positions ``(B, n)``, -1 for padding, and each row's count afterwards."""

    pos: torch.Tensor
    counts: list[int]
    whole: bool
    """There is no padding among them and all rows have seen the same number."""


@dataclass
class Request:
    """One cache's way through a prompt and what follows.

    Attributes
    ----------
    prompt
        Tokens, padding included, after which the prompt has ended; None: every call of several tokens is a prompt.
    planned
        Tokens that are to follow.
    recording
        Whether steps are kept so that they can be taken back.
    prompt_done
        The clock (``time.perf_counter``) when the last layer had attended to the prompt.
    room
        Per layer: slots to have memory for, once the prompt has been chosen from.
    clock
        Where tokens stand while all rows are full and steps may be captured.
    sound
        Whether all outputs were finite that have not been looked at, so that no step waits for a GPU.
    """

    plan: Plan
    prompt: int | None = None
    planned: int = 0
    recording: bool = False
    prompt_done: float = 0.0
    room: Mapping[int, int] = field(default_factory=dict)
    clock: Clock | None = None
    sound: torch.Tensor | None = None
    _memo: tuple[object, int, int, tuple[int, ...], torch.device, NewTokens] | None = field(default=None, repr=False)

    def of_prompt(self, length: int, count: int) -> int:
        """Return how many of the next `count` tokens belong to a prompt."""
        if self.prompt is not None:
            return min(max(self.prompt - length, 0), count)
        return count if not length or (count > 1 and not self.recording) else 0

    def temperature(self, step: int, counts: Sequence[int]) -> torch.Tensor | float:
        """Return what divides the logits of votes so many steps after the prompt, per row ``(B,)`` or one for all."""
        return self.plan.policy.temperature(step, self.planned)

    def check_movable(self) -> None:
        """Raise during steady steps: a captured one reads and writes where tensors were."""
        if self.clock is not None:
            raise InputError(
                "rows and slots stay where they are during steady steps",
                hint="leave the `with cache.steady()` block first",
            )

    def note(self, finite: torch.Tensor) -> None:
        """Remember whether an output was finite, for `check_sound`."""
        if self.sound is None:
            self.sound = torch.ones_like(finite)
        self.sound.logical_and_(finite.to(self.sound.device))

    def check_sound(self) -> None:
        """Raise if an output was not finite; waits for the device."""
        sound, self.sound = self.sound, None
        if sound is not None and not bool(sound):
            raise InputError("a layer gave an output that is not finite", hint="check the model's inputs")

    def new_tokens(
        self, mask: torch.Tensor | None, length: int, count: int, counts: Sequence[int], device: torch.device
    ) -> NewTokens:
        """Return where the next `count` tokens stand in their rows; all layers ask, one computes."""
        memo, key = self._memo, tuple(counts)
        if memo is not None and memo[0] is mask and memo[1:5] == (length, count, key, device):
            return memo[5]
        start = torch.tensor(key, device=device)[:, None]
        if mask is None:
            tokens = NewTokens(
                start + torch.arange(count, device=device), [seen + count for seen in key], len(set(key)) == 1
            )
        else:
            if mask.shape != (len(key), length + count):
                raise InputError(
                    f"the attention mask has shape {tuple(mask.shape)}, but {length + count} tokens of {len(key)} rows "
                    "have been seen", hint="pass a mask of 0 and 1 over all tokens so far, padding included"
                )  # fmt: skip
            real = mask.to(device, torch.int64)
            after = start + real[:, length:].cumsum(1)
            pos = torch.where(real[:, length:] > 0, after - 1, -1)
            ends: list[int]
            ends, marked = torch.stack((after[:, -1], real.sum(1))).tolist()
            if ends != marked:
                row = next(row for row, (end, all_of) in enumerate(zip(ends, marked, strict=True)) if end != all_of)
                raise InputError(
                    f"the attention mask counts {marked[row] - ends[row] + key[row]} of the tokens that row {row} of "
                    f"this cache took in, which are {key[row]}",
                    hint="pass an attention_mask with 1 for all of them, generated pad tokens too",
                )
            # Rows that have seen padding differ in their counts, so equal counts of length + count mean there was none.
            tokens = NewTokens(pos, ends, min(ends) == length + count)
        self._memo = (mask, length, count, key, device, tokens)
        return tokens

    def forget(self) -> None:
        """Forget the tokens of the last call: the next may have written into its mask."""
        self._memo = None
