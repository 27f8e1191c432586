"""What stays of a layer: how many slots each row may have, and which tokens are in them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from vitalfew.core.errors import InputError
from vitalfew.generate.request import Plan, Request
from vitalfew.generate.select import prompt_tokens
from vitalfew.generate.slots import Slots

__all__ = ["cap_of", "check_spans", "choose"]


def choose(
    slots: Slots, request: Request, layer: int, rows: Sequence[int], cast: torch.Tensor | None = None, *,
    whole: bool = False,
) -> torch.Tensor | None:  # fmt: skip
    """Keep what these rows may hold, and drop the rest.

    Parameters
    ----------
    slots, request, layer
        Of which layer.
    rows
        Those that are chosen from; the others stay as they are.
    cast
        Votes of a prompt's queries ``(B, H, n)``, n being the slots in use; None where there were none.
    whole
        A promise that all slots hold tokens, in order.

    Returns
    -------
    torch.Tensor or None
        Shape ``(B, H)``: the share of these votes that the kept tokens had.
    """
    plan, policy, used = request.plan, request.plan.policy, slots.used
    caps = list(slots.caps)
    for row in rows:
        caps[row] = cap_of(slots, request, layer, row, cast)
    keep = [count if cap is None else min(cap, count) for cap, count in zip(caps, slots.counts, strict=True)]
    # A row that keeps all has as many slots as tokens; one that was cut before keeps what it has.
    live = (slots.pos[:, 0, :used] >= 0).sum(1).tolist()
    keep = [min(k, n) for k, n in zip(keep, live, strict=True)]
    room = max(request.room.get(layer, 0), *(_room(request, k, cap) for k, cap in zip(keep, caps, strict=True)))
    slots.caps = caps
    if whole and not any(caps) and slots.keys.is_contiguous():
        if cast is not None:
            slots.score[:, :, :used] += cast
        slots.reserve(room)  # nothing to drop and nothing between
        return None
    pos = slots.pos[:, :, :used]
    votes, pinned = _votes(slots.score[:, :, :used], cast)
    # What other rows have must not change, nor what is left whole: it will be chosen from when it has grown.
    chosen = torch.zeros((len(keep), 1, 1), dtype=torch.bool, device=pos.device)
    chosen[[row for row in rows if caps[row] is not None]] = True
    scores = votes if plan.keep is None else torch.where(chosen, policy.prompt_scores(votes, pos, plan.seed), votes)
    guard = torch.stack([guarded(plan, pos[row], count) for row, count in enumerate(slots.counts)])
    scores = scores.masked_fill(pinned | (guard & chosen), math.inf)
    recent = [policy.recent_of(k) for k in keep]
    index = prompt_tokens(scores, pos, keep, recent)
    slots.score[:, :, :used] = scores
    slots.keep(index, keep, room)
    most = slots.used
    score = slots.score[:, :, :most]
    score.copy_(torch.where(chosen, policy.kept_scores(score, slots.pos[:, :, :most], recent), score))
    if cast is None:
        return None
    kept = cast.gather(2, index.clamp(min=0)).masked_fill(index < 0, 0.0).sum(2)
    return kept / cast.masked_fill(pos < 0, 0.0).sum(2).clamp(min=1e-30)


def _votes(score: torch.Tensor, cast: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all votes so far, and which tokens never go: theirs of earlier are not known, nor a neighbour's matter."""
    pinned = score == math.inf
    votes = score.masked_fill(pinned, 0.0)
    return (votes if cast is None else votes + cast), pinned


def _room(request: Request, kept: int, cap: int | None) -> int:
    """Return the slots to have memory for, of a row that keeps so many now; more are made as it grows."""
    if cap is not None:
        return cap
    most = kept + request.planned
    return most if request.plan.keep is None else min(most, max(kept, request.plan.min_length))


def cap_of(slots: Slots, request: Request, layer: int, row: int, cast: torch.Tensor | None = None) -> int | None:
    """Return the slots that a row of its length may use; None for as many as it needs."""
    plan, count = request.plan, slots.counts[row]
    if plan.keep is None or count < plan.min_length:
        return None
    if plan.mass is not None:
        return _cap_of_mass(slots, plan, plan.mass, row, cast)
    cap = plan.keep(layer, count, request.planned, len(slots.counts))
    return cap if cap <= count else None


def _cap_of_mass(slots: Slots, plan: Plan, mass: float, row: int, cast: torch.Tensor | None) -> int:
    """Return the fewest slots with which the mean of a row's heads keeps a share of the votes."""
    policy, one = plan.policy, slice(row, row + 1)
    pos = slots.pos[one, :, : slots.used]
    votes, pinned = _votes(slots.score[one, :, : slots.used], None if cast is None else cast[one])
    votes = votes.masked_fill(pos < 0, 0.0)
    order = policy.prompt_scores(votes, pos, plan.seed)
    counted = votes if cast is None else cast[one].masked_fill(pos < 0, 0.0)  # of this prompt, not of those before it
    safe = pinned | guarded(plan, pos[0], slots.counts[row])
    cap, window = 0, -1
    while window != policy.recent_of(cap):  # the window is a share of the slots, whose number depends on it
        window = policy.recent_of(cap)
        stays = (safe & (pos >= 0)) | (pos > pos.amax(2, keepdim=True) - window)
        best = counted.gather(2, order.masked_fill(stays, math.inf).argsort(dim=2, descending=True, stable=True))
        curve = (best.cumsum(2) / best.sum(2, keepdim=True)).mean((0, 1))
        found = int((curve < mass - 1e-6).sum()) + 1
        cap = max(cap, found, int(stays.sum(2).max()), policy.least())
    return min(cap, slots.counts[row])


def check_spans(slots: Slots, plan: Plan) -> None:
    """Refuse spans to protect that lie behind the prompt of a row that was chosen from."""
    for row, (count, cap) in enumerate(zip(slots.counts, slots.caps, strict=True)):
        for span in plan.protect:
            start, stop = span.start or 0, math.inf if span.stop is None else span.stop
            if cap is not None and count <= start < stop:
                raise InputError(
                    f"row {row} has {count} tokens, none of which lies in the protected {span}",
                    hint="pass slices of the prompt, in tokens of a row without its padding",
                )


def guarded(plan: Plan, pos: torch.Tensor, count: int) -> torch.Tensor:
    """Return which tokens ``(..., C)`` of a row of so many never go: sinks, and protected spans."""
    guard = (pos >= 0) & (pos < plan.policy.sinks)
    for span in plan.protect:
        start, stop, _ = span.indices(count)
        guard |= (pos >= start) & (pos < stop)
    return guard
