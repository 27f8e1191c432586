"""How many bytes of keys and values a request will hold, before it starts, and whether there is room for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vitalfew.core.errors import InputError
from vitalfew.generate.request import Plan

__all__ = ["Need", "Pool", "Shape", "most_slots", "width"]

_LEAST = 64


def width(slots: int) -> int:
    """Return the slots that memory is taken for: a few sizes only, so that rows of like size stand side by side.

    Examples
    --------
    >>> [width(slots) for slots in (1, 65, 512, 513, 1100)]
    [64, 128, 512, 640, 1280]

    Notes
    -----
    Four sizes between a power of two and the next: at most a quarter more than asked for, from 256 slots on.
    """
    step = max(_LEAST, 1 << max(0, (slots - 1).bit_length() - 3))
    return max(step, -(-slots // step) * step)


def most_slots(plan: Plan, layer: int, prompt: int, new: int) -> int:
    """Return the most slots that a row of so many tokens ever takes in a layer, once its prompt was chosen from.

    Examples
    --------
    >>> from vitalfew.generate.policies import H2O
    >>> half = Plan(H2O(), lambda layer, tokens, planned, rows: tokens // 2, min_length=100)
    >>> most_slots(half, 0, 200, 50), most_slots(half, 0, 80, 50), most_slots(half, 0, 80, 5)
    (100, 100, 85)
    """
    end = prompt + new
    if plan.keep is None:
        return end
    count = max(prompt, plan.min_length)
    while count < end:
        cap = plan.keep(layer, count, 0, 1)
        if cap <= count:
            # One that is cut while it grows has held all of its tokens just before.
            return cap if count == prompt else count
        count = cap  # a longer row never keeps fewer, so none is cut before it has as many tokens
    return end


@dataclass(frozen=True)
class Need:
    """What a request takes.

    Attributes
    ----------
    prefill
        Bytes while its prompt is read: nothing is evicted before the last chunk.
    row
        Bytes of one answer afterwards, to its end.
    copies
        Answers.
    widths
        Slots per layer of an answer.
    """

    prefill: int
    row: int
    copies: int
    widths: tuple[int, ...]

    @property
    def most(self) -> int:
        """The most bytes at any time."""
        return max(self.prefill, self.row * self.copies)


@dataclass(frozen=True)
class Shape:
    """The bytes of a model's cache in each layer.

    Attributes
    ----------
    content
        Of a token's key and value in all heads.
    slot
        Of a slot: a token's key and value, position and score.
    row
        Of a row, whatever its slots.
    """

    content: Sequence[int]
    slot: Sequence[int]
    row: Sequence[int]

    def need(self, plan: Plan, prompt: int, new: int, copies: int) -> Need:
        """Return what a prompt of so many tokens takes, with so many more in each of its answers."""
        widths = tuple(width(most_slots(plan, layer, prompt, new)) for layer in range(len(self.slot)))
        each = [slots * slot + fixed for slots, slot, fixed in zip(widths, self.slot, self.row, strict=True)]
        # Layers are chosen from one after another: some may be at their prompt's size, others at their answer's.
        whole = [prompt * slot + fixed for slot, fixed in zip(self.slot, self.row, strict=True)]
        return Need(sum(map(max, whole, each)), sum(each), copies, widths)


class Pool:
    """Bytes that are spoken for, of those that there are.

    Examples
    --------
    >>> pool = Pool(100)
    >>> pool.take(60), pool.take(60), pool.held
    (True, False, 60)
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise InputError(f"the memory for keys and values must be positive, got {limit} bytes", hint='try "1 GiB"')
        self.limit = limit
        self.held = 0

    def take(self, count: int) -> bool:
        """Take so many bytes, if they are free."""
        if self.held + count > self.limit:
            return False
        self.held += count
        return True

    def give(self, count: int) -> None:
        """Give bytes back."""
        self.held -= count
        assert self.held >= 0, "more was given back than was taken"
