"""Attention of one layer over slots: a prompt is attended to in full, then only what was chosen stays."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vitalfew.core.errors import InputError
from vitalfew.generate.noise import Noise
from vitalfew.generate.packed import attend_held
from vitalfew.generate.request import NewTokens, Request
from vitalfew.generate.scores import Logits, Votes, attend_prompt, later_votes, vote_and_mark
from vitalfew.generate.select import next_slot, prompt_tokens
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
        if (key.shape[0], key.shape[1]) != tuple(slots.keys.shape[:2]) or key.dtype != slots.dtype:
            raise InputError(
                f"this cache holds {slots.keys.shape[0]} rows of {slots.dtype}, got {key.shape[0]} of {key.dtype}",
                hint="use a fresh cache for another batch, or another dtype",
            )
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
            slots.score[:, :, : slots.used] += cast
        self.length += count
        slots.counts = list(tokens.counts)
        if ends or plan.each_chunk:
            self._choose(range(len(slots.counts)), whole=tokens.whole and first, voted=cast is not None)
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
        if voters is not None and self.request.prompt is not None:
            voters = max(0, min(count, self.length + count - (self.request.prompt - voters)))
            if not voters:
                return None
        tau = plan.policy.temperature(0, self.request.planned)
        return Votes(voters, tau, Noise(plan.seed, self.layer) if plan.policy.noise else None)

    def _choose(self, rows: Sequence[int], *, whole: bool = False, voted: bool = False) -> None:
        """Keep what these rows may hold, drop the rest, and mark what goes next."""
        slots, request = self.slots, self.request
        assert slots is not None
        plan, policy = request.plan, request.plan.policy
        caps = list(slots.caps)
        for row in rows:
            caps[row] = self._cap(row)
        used = slots.used
        keep = [count if cap is None else min(cap, count) for cap, count in zip(caps, slots.counts, strict=True)]
        # A row that keeps all has as many slots as tokens; one that was cut before keeps what it has.
        live = (slots.pos[:, 0, :used] >= 0).sum(1).tolist()
        keep = [min(k, n) for k, n in zip(keep, live, strict=True)]
        room = max(
            request.room.get(self.layer, 0),
            *(k + request.planned if cap is None else cap for k, cap in zip(keep, caps, strict=True)),
        )
        slots.caps = caps
        if whole and keep[0] == used and slots.keys.is_contiguous():
            slots.reserve(room)  # nothing to drop and nothing between
        else:
            votes = slots.score[:, :, :used]
            pos = slots.pos[:, :, :used]
            chosen = torch.zeros((len(keep), 1, 1), dtype=torch.bool, device=pos.device)
            # What other rows have must not change, nor what is left whole: it will be chosen from when it has grown.
            chosen[[row for row in rows if caps[row] is not None]] = True
            scores = votes if plan.keep is None else policy.prompt_scores(votes, pos, plan.seed)
            scores = torch.where(chosen, self._protected(scores, pos), votes)
            recent = [policy.recent_of(k) for k in keep]
            index = prompt_tokens(scores, pos, keep, recent)
            if voted:
                at = index.clamp(min=0)
                kept = votes.gather(2, at).masked_fill(index < 0, 0.0).sum(2)
                self.mass = kept / votes.masked_fill(pos < 0, 0.0).sum(2).clamp(min=1e-30)
            slots.score[:, :, :used] = scores
            slots.keep(index, keep, room)
            most = slots.used
            kept_scores = policy.kept_scores(slots.score[:, :, :most], slots.pos[:, :, :most], recent)
            slots.score[:, :, :most] = torch.where(chosen, kept_scores, slots.score[:, :, :most])
        self._mark()

    def _cap(self, row: int) -> int | None:
        """Return the slots that a row of its length may use; None for as many as it needs."""
        plan, slots = self.request.plan, self.slots
        assert slots is not None
        count = slots.counts[row]
        if plan.keep is None or count < plan.min_length:
            return None
        if plan.mass is not None:
            return self._cap_of_mass(row, plan.mass)
        cap = plan.keep(self.layer, count, self.request.planned, len(slots.counts))
        return cap if cap <= count else None

    def _cap_of_mass(self, row: int, mass: float) -> int:
        """Return the fewest slots with which the mean of a row's heads keeps a share of the votes."""
        slots, policy = self.slots, self.request.plan.policy
        assert slots is not None
        pos = slots.pos[row : row + 1, :, : slots.used]
        votes = slots.score[row : row + 1, :, : slots.used].masked_fill(pos < 0, 0.0)
        order = policy.prompt_scores(votes, pos, self.request.plan.seed)
        safe = self._guard(row, pos)
        cap, window = 0, -1
        while window != policy.recent_of(cap):  # the window is a share of the slots, whose number depends on it
            window = policy.recent_of(cap)
            stays = safe | (pos > pos.amax(2, keepdim=True) - window)
            best = votes.gather(2, order.masked_fill(stays, math.inf).argsort(dim=2, descending=True, stable=True))
            curve = (best.cumsum(2) / best.sum(2, keepdim=True)).mean((0, 1))
            found = int((curve < mass - 1e-6).sum()) + 1
            cap = max(cap, found, int(stays.sum(2).max()), policy.least())
        return min(cap, slots.counts[row])

    def _guard(self, row: int, pos: torch.Tensor) -> torch.Tensor:
        """Return which tokens of a row never go."""
        plan = self.request.plan
        assert self.slots is not None
        guard = (pos >= 0) & (pos < plan.policy.sinks)
        for span in plan.protect:
            start, stop, _ = span.indices(self.slots.counts[row])
            guard |= (pos >= start) & (pos < stop)
        return guard

    def _protected(self, scores: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        guard = torch.stack([self._guard(row, pos[row]) for row in range(pos.shape[0])])
        return scores.masked_fill(guard, float("inf"))

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
        finite = out.sum(dtype=torch.float32).isfinite()
        if finite.device.type != "cpu":
            request.note(finite)
        elif not finite:
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
            if cap is None and self._cap(row) is not None
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
            slots.marked = next_slot(slots.score[:, :, :used], slots.pos[:, :, :used], self._window())

    # Taking back

    def undo(self, count: int) -> None:
        """Take the latest tokens back."""
        if not count:
            return
        if self.slots is None or count > self.slots.undoable:
            have = self.slots.undoable if self.slots is not None else 0
            raise InputError(
                f"cannot take {count} tokens back: the slots of only {have} are known",
                hint="call activate_past_recording() before the tokens that may be dropped",
            )
        for _ in range(count):
            self.slots.undo()
        self.length -= count

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
        if self.mass is not None:
            self.mass = self.mass.index_select(0, index.to(self.mass.device))

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on from here."""
        if self.slots is None:
            raise InputError("the cache is empty: there is nothing to save", hint="run a prompt through it first")
        return {"length": self.length, "prompt_end": self.prompt_end, "mass": self.mass, **self.slots.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.slots = Slots.of_state(state, self.request.plan.codec)
        self.length, self.prompt_end, self.mass = state["length"], state["prompt_end"], state["mass"]
