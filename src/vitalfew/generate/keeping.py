"""How many tokens each layer keeps of a row: from a budget to a function of the row's length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from vitalfew.core.budget import Budget
from vitalfew.core.errors import InputError
from vitalfew.generate.budgets import pyramid, slots_for_bytes, uniform, weighted

__all__ = ["keeper"]


def keeper(
    budget: Budget,
    which: Sequence[int],
    slot_bytes: Sequence[int],
    *,
    least: int,
    fixed: int = 0,
    of: str = "prompt",
    layers: str | Sequence[float] = "uniform",
) -> Callable[[int, int, int, int], int] | None:
    """Return ``keep(layer, tokens, planned, rows)``, the slots of a row of so many tokens; None to keep all.

    Parameters
    ----------
    budget
        What may be kept.
    which
        Indices of the layers it is for.
    slot_bytes
        Of each of them: bytes of one slot in all heads of one row.
    least
        Slots below which a policy cannot work.
    fixed
        Bytes that a row takes besides its slots.
    of
        ``"prompt"`` or ``"total"``.
    layers
        How the slots are spread: ``"uniform"``, ``"pyramid"``, or a weight per layer.
    """
    if isinstance(layers, str) and layers not in ("uniform", "pyramid"):
        raise InputError(f"layers cannot be {layers!r}", hint="choose uniform, pyramid, or a weight per layer")
    if not isinstance(layers, str) and len(layers) != len(which):
        raise InputError(
            f"{len(layers)} weights for {len(which)} layers with full attention", hint="pass one weight for each"
        )
    if of != "prompt" and budget.kind != "share":
        raise InputError(f"of={of!r} is for shares, the budget is {budget}", hint="leave it out")
    if budget.kind == "coverage" and not (isinstance(layers, str) and layers == "uniform"):
        raise InputError("each layer finds its own number for a coverage", hint="leave out layers")
    if not budget.value:
        raise InputError("a budget of 0 keeps nothing", hint="0.5 keeps half of the prompt")
    if budget.kind in ("share", "coverage") and budget.value == 1.0:
        return None
    if budget.kind == "coverage":  # each layer finds its own number from its votes
        return lambda layer, tokens, planned, rows: tokens
    if budget.kind == "count" and budget.value < least:
        raise InputError(
            f"{int(budget.value)} slots do not hold the policy's sinks and latest tokens", hint=f"the least is {least}"
        )
    place = {layer: k for k, layer in enumerate(which)}

    @lru_cache(maxsize=1024)
    def spread(length: int, rows: int) -> tuple[int, ...]:
        total = budget
        if budget.kind == "bytes":
            total = Budget("count", slots_for_bytes(budget, slot_bytes, rows, least=least, fixed=fixed))
        if not isinstance(layers, str):
            slots = weighted(total, length, layers, least=least)
        else:
            slots = (pyramid if layers == "pyramid" else uniform)(total, length, len(which), least=least)
        return tuple(slots)

    def keep(layer: int, tokens: int, planned: int, rows: int) -> int:
        length = tokens + planned if of == "total" else tokens
        if budget.kind == "share" and uniform(budget, length, 1, least=0)[0] < least:
            return tokens + 1  # too short to be chosen from
        return spread(length, rows)[place[layer]]

    return keep
