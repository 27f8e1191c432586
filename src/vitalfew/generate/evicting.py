"""Attention of one layer over slots: a prompt is attended to in full, then only what was chosen stays."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from vitalfew.core.errors import InputError
from vitalfew.generate.choosing import cap_of, check_spans, choose
from vitalfew.generate.noise import Noise
from vitalfew.generate.packed import attend_held
from vitalfew.generate.request import NewTokens, Request
from vitalfew.generate.scores import Logits, Votes, attend_prompt, later_votes, mark, vote_and_mark
from vitalfew.generate.slots import Slots

if TYPE_CHECKING:
    from vitalfew.generate.steady import Clock

__all__ = ["EvictingLayer"]

_RECORDED = 1 << 20


class EvictingLayer:
    """The slots of one layer, what is known of their tokens, and attention over them.

    Attributes
    ----------
    length
        Tokens seen, padding included.
    slots
        None before the first token.
    mass
        Shape ``(B, H)``: the share of the voters' attention that the kept tokens of the last prompt had; None where
        nothing voted.
    """

    def __init__(self, layer: int, request: Request) -> None:
        self.layer, self.request = layer, request
        self.slots: Slots | None = None
        self.length = 0
        self.prompt_end = 0
        self.mass: torch.Tensor | None = None
        self._cast: torch.Tensor | None = None  # votes of a prompt that goes on, (B, H, slots in use)
        self._windows: tuple[tuple[int | None, ...], torch.Tensor | int] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.slots.nbytes if self.slots is not None else 0

    @property
    def physical(self) -> int:
        """Slots in use."""
        return self.slots.used if self.slots is not None else 0

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, form: Logits
    ) -> torch.Tensor:
        """Take n new tokens in, and return their attention, ``(B, n, Hq, d)``.

        Parameters
        ----------
        query, key, value
            Of the new tokens alone, ``(B, Hq, n, d)`` and ``(B, H, n, d)``.
        mask
            1 for tokens and 0 for padding over all tokens so far, ``(B, length + n)``; None where there is no padding.
        form
            How logits are made.
        """
        if self.request.clock is not None:
            return self._steady(query, key, value, form, self.request.clock)
        if self.slots is None:
            self.slots = Slots(key, value, self.request.plan.codec)
        slots, count = self.slots, key.shape[2]
        if slots.keys.device != key.device:
            self.to(key.device)
        slots.check_kind(key, value)
        tokens = self.request.new_tokens(mask, self.length, count, slots.counts, key.device)
        # A chunk of a prompt may be padding alone, as long as its row has tokens in a later one.
        if not min(tokens.counts) and self.length + count >= (self.request.prompt or 0):
            raise InputError(f"row {tokens.counts.index(0)} is all padding", hint="leave rows without tokens out")
        prompt = self.request.of_prompt(self.length, count)
        parts = []
        if prompt:
            part = tokens
            if prompt < count:
                part = self.request.new_tokens(
                    None if mask is None else mask[:, : self.length + prompt],
                    self.length,
                    prompt,
                    slots.counts,
                    key.device,
                )
            parts.append(self._prompt(query[:, :, :prompt], key[:, :, :prompt], value[:, :, :prompt], part, form))
        if any(after - before != count - prompt for before, after in zip(slots.counts, tokens.counts, strict=True)):
            raise InputError(
                "a row has padding after its prompt, where each token takes the place of another",
                hint="pass a real token for every row, or the tokens of a later turn together",
            )
        for k in range(prompt, count):
            one = slice(k, k + 1)
            parts.append(self._step(query[:, :, one], key[:, :, k], value[:, :, k], tokens.pos[:, k], form))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    # The prompt, or a later turn

    def _prompt(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: NewTokens, form: Logits
    ) -> torch.Tensor:
        slots, request = self.slots, self.request
        assert slots is not None
        plan, count, first = request.plan, key.shape[2], not self.length
        pos = tokens.pos.to(torch.int32)[:, None].expand(-1, key.shape[1], -1)
        ends = request.prompt is None or self.length + count == request.prompt
        score = torch.zeros(pos.shape, dtype=torch.float32, device=key.device)
        if first:
            slots.replace(key, value, pos, score)
        else:
            slots.extend(key, value, pos, score)
        keys, values, key_pos = slots.exact_view()
        votes = self._votes(count)
        out, cast = attend_prompt(query, keys, values, form, key_pos, tokens.pos, votes, causal=first and tokens.whole)
        if cast is not None:
            if not bool(torch.isfinite(cast).all()):
                raise InputError(
                    f"layer {self.layer} has attention weights that are not finite",
                    hint="check the inputs, or use float32",
                )
            if self._cast is not None:
                cast += functional.pad(self._cast, (0, cast.shape[2] - self._cast.shape[2]))
            self._cast = cast
        self.length += count
        slots.counts = list(tokens.counts)
        if ends or plan.each_chunk:
            cast, self._cast = self._cast, None
            self._choose(range(len(slots.counts)), cast, whole=tokens.whole and first)
            if ends:
                check_spans(slots, plan)
            slots.settle()
            self.prompt_end = self.length
            request.prompt_done = time.perf_counter()
        return out

    def _votes(self, count: int) -> Votes | None:
        """Return which of the next `count` queries vote."""
        plan = self.request.plan
        voters = plan.policy.voters if plan.voters is None or plan.policy.voters == 0 else plan.voters
        if plan.keep is None or voters == 0:
            return None
        # What is chosen from at once is chosen from by its own queries.
        if voters is not None and self.request.prompt is not None and not plan.each_chunk:
            voters = max(0, min(count, self.length + count - (self.request.prompt - voters)))
            if not voters:
                return None
        tau = plan.policy.temperature(0, self.request.planned)
        return Votes(voters, tau, Noise(plan.seed, self.layer) if plan.policy.noise else None)

    def _choose(self, rows: Sequence[int], cast: torch.Tensor | None = None, *, whole: bool = False) -> None:
        """Keep what these rows may hold, drop the rest, and mark what goes next."""
        assert self.slots is not None
        mass = choose(self.slots, self.request, self.layer, rows, cast, whole=whole)
        self.mass = self.mass if mass is None else mass
        self._mark()

    # Tokens after the prompt

    def _step(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pos: torch.Tensor, form: Logits
    ) -> torch.Tensor:
        slots, request = self.slots, self.request
        assert slots is not None
        plan = request.plan
        slots.write(key, value, pos, log=_RECORDED if request.recording else 1)
        self.length += 1
        slots.counts = [count + 1 for count in slots.counts]
        keys, values, held = slots.view()
        out, logits = attend_held(query, keys, values, form, held, pos)
        total = out.sum(dtype=torch.float32)
        if total.device.type != "cpu":
            request.note(total.isfinite())
        elif not math.isfinite(total):
            raise InputError(f"layer {self.layer} gave an output that is not finite", hint="check the model's inputs")
        if plan.keep is not None:
            self._score(logits, held, pos)
            if None in slots.caps:
                self._choose_grown()
        return out

    def _steady(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: Logits, clock: Clock
    ) -> torch.Tensor:
        """Do what `_step` does without the host: all that changes is in tensors, each of which stays where it is."""
        slots = self.slots
        assert slots is not None
        if key.shape[2] != 1 or key.shape[0] != len(slots.counts):
            raise InputError(
                f"steady steps take one token of {len(slots.counts)} rows, got {key.shape[2]} of {key.shape[0]}",
                hint="leave the `with cache.steady()` block first",
            )
        slots.overwrite(key[:, :, 0], value[:, :, 0], clock.pos)
        keys, values, held = slots.view()
        out, logits = attend_held(query, keys, values, form, held, clock.pos)
        self.request.note(out.sum(dtype=torch.float32).isfinite())
        marked = slots.marked
        self._score(logits, held, clock.pos)
        slots.marked = marked.copy_(slots.marked)
        clock.tick(self)
        return out

    def _choose_grown(self) -> None:
        """Choose from rows that have become long enough to be chosen from."""
        slots = self.slots
        assert slots is not None
        rows = [
            row for row, cap in enumerate(slots.caps)
            if cap is None and cap_of(slots, self.request, self.layer, row) is not None
        ]  # fmt: skip
        if rows:
            self._choose(rows)

    def _score(self, logits: torch.Tensor, held: torch.Tensor, pos: torch.Tensor) -> None:
        """Let the new token vote, and mark the slot that the next one takes."""
        slots, request = self.slots, self.request
        assert slots is not None
        plan, policy = request.plan, request.plan.policy
        score = slots.score[:, :, : slots.used]
        votes = None
        if policy.votes_later:
            clock = request.clock
            tau = clock.tau if clock else request.temperature(self.length - self.prompt_end, slots.counts)
            noise = Noise(plan.seed, self.layer) if policy.noise else None
            if policy.sums_votes:
                slots.marked = vote_and_mark(score, logits, tau, noise, held, pos, self._window())
                return
            votes = later_votes(logits, tau, noise, held, pos)
        new = policy.later_scores(score, votes, held, plan.seed)
        if new is not score:
            score.copy_(new)
        self._mark()

    def _window(self) -> torch.Tensor | int:
        """Return how many of the latest tokens are safe in each row; it changes only with the rows' slots."""
        slots, policy = self.slots, self.request.plan.policy
        assert slots is not None
        caps = tuple(slots.caps)
        if self._windows is None or self._windows[0] != caps:
            windows = [0 if cap is None else policy.recent_of(cap) for cap in caps]
            same = len(set(windows)) == 1
            self._windows = caps, windows[0] if same else torch.tensor(windows, device=slots.pos.device)
        return self._windows[1]

    def _mark(self) -> None:
        """Mark the slot that the next token takes."""
        slots = self.slots
        assert slots is not None
        if any(cap is not None for cap in slots.caps):
            used = slots.used
            slots.marked = mark(slots.score[:, :, :used], slots.pos[:, :, :used], self._window())

    def to(self, device: torch.device) -> None:
        """Follow the model to a device."""
        assert self.slots is not None
        self.slots.to(device)
        self.mass, self._cast = (None if held is None else held.to(device) for held in (self.mass, self._cast))
        self._windows = None

    # Taking back

    def undo(self, count: int) -> None:
        """Take the latest tokens back."""
        self.check_undo(count)
        for _ in range(count):
            assert self.slots is not None
            self.slots.undo()
        self.length -= count

    def check_undo(self, count: int) -> None:
        """Refuse to take back more than is known."""
        have = self.slots.undoable if self.slots is not None else 0
        if count > have:
            raise InputError(
                f"cannot take {count} tokens back: the slots of only {have} are known",
                hint="call activate_past_recording() before the tokens that may be dropped",
            )

    def join(self, other: EvictingLayer) -> None:
        """Take the rows of the same layer of another cache in after these."""
        assert self.slots is not None
        assert other.slots is not None
        self.slots.join(other.slots)
        self.mass = None

    def select_rows(self, index: torch.Tensor) -> None:
        """Take these rows, in this order."""
        assert self.slots is not None
        self.slots.select_rows(index)
        self.mass, self._cast = (
            None if held is None else held.index_select(0, index.to(held.device)) for held in (self.mass, self._cast)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on from here."""
        if self.slots is None:
            raise InputError("the cache is empty: there is nothing to save", hint="run a prompt through it first")
        cast = {} if self._cast is None else {"cast": self._cast.clone()}
        return {
            "length": self.length, "prompt_end": self.prompt_end, "mass": self.mass, **cast, **self.slots.state_dict()
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.slots = Slots.of_state(state, self.request.plan.codec)
        self.length, self.prompt_end, self.mass = state["length"], state["prompt_end"], state["mass"]
        self._cast = None if state.get("cast") is None else state["cast"].clone()
