"""What workers say to each other about a batch: which rows they need, the values of those, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vitalfew.embeddings._owner import ALONE, LATER, NOW, Local, Owner
from vitalfew.embeddings._peers import Message, Peers, pack, unpack
from vitalfew.embeddings._turn import Gradients, Turn, given
from vitalfew.embeddings.optim import Optimizer
from vitalfew.embeddings.rows import _Waiting

__all__ = ["Answer", "Exchange", "Gone", "Wire"]

_LOOK, _VALUES, _TRAIN, _AFTER, _DELAYED = 1, 2, 3, 4, 5
_NOTHING = np.empty(0, np.uint8)


@dataclass(slots=True)
class Wire:
    """Bytes that this worker has sent to others, counted as they were sent."""

    ids: int = 0
    """Which rows it needs."""
    values_ahead: int = 0
    """Values of its rows, while other batches train."""
    values_now: int = 0
    """Values that another worker's next forward has waited for."""
    gradients_now: int = 0
    """Gradients of rows that the next batch needs."""
    gradients_later: int = 0
    """Gradients that travel while the next batch trains."""
    gradients_none: int = 0
    """The same, of rows that no other worker needs, and this one only once."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one worker says about its share of a batch."""

    status: int
    samples: int
    text: str
    request: Local
    """Rows it needs of this worker."""


@dataclass(slots=True)
class Gone:
    """What a batch leaves to be done while the next one trains."""

    gradients: Gradients | None
    step: int
    rule: Optimizer


class Exchange:
    """The messages of a loop, each in one thread: `look`; `prepare` and `deliver`; `train`.

    Parameters
    ----------
    owner
        The rows of this worker.
    look, carry, train
        Those who hear what each thread says.
    wire
        Where bytes are counted.
    ahead
        Whether values come while the batch before trains.
    exact
        Whether each lookup's gradient travels.
    """

    def __init__(
        self, owner: Owner, look: Peers, carry: Peers, train: Peers, wire: Wire, *, ahead: bool, exact: bool
    ) -> None:
        self._owner, self._look, self._carry, self._train = owner, look, carry, train
        self._ahead, self._exact = ahead, exact
        self._dim = owner.rows.weight.shape[1]
        self.rank, self.world = look.rank, look.world
        self.wire = wire

    def _to_others(self, parts: Sequence[Message]) -> int:
        return sum(len(part) for k, part in enumerate(parts) if k != self.rank)

    def look(self, status: int, turn: Turn | None, text: str = "") -> list[Answer]:
        """Tell every owner which of its rows a coming batch needs, or that there is none; returns what all say."""
        head = pack(
            np.array([status, turn.samples if turn else 0], np.int64), np.array(bytearray(text.encode()), np.uint8)
        )
        parts = [
            np.concatenate([head, pack(np.empty(0, np.int32) if turn is None else turn.request(k).astype(np.int32))])
            for k in range(self.world)
        ]
        self.wire.ids += self._to_others(parts)
        found = []
        for message in self._look.exchange(_LOOK, parts):
            (status_of, samples), said, request = unpack(message, np.int64, np.uint8, np.int32)
            found.append(Answer(int(status_of), int(samples), bytes(said).decode(), request.astype(np.int64)))
        return found

    def prepare(self, batch: int, turn: Turn) -> None:
        """Bring the values of a batch's rows to the workers that need them, but for those the batch before changes."""
        owner = self._owner
        requests = owner.requests[batch]
        waited, classes = owner.begin(batch, ahead=self._ahead)
        before = [np.isin(request, waited, assume_unique=True) for request in requests]
        values = owner.give([request[~some] for request, some in zip(requests, before, strict=True)])
        parts = [pack(*each) for each in zip(classes, before, values, strict=True)]
        self.wire.values_ahead += self._to_others(parts)
        for k, message in enumerate(self._carry.exchange(_VALUES, parts)):
            turn.begin(k, message)

    def train(self, batch: int, turn: Turn, waiting: _Waiting, step: int, rule: Optimizer) -> tuple[Gone, list[int]]:
        """Exchange and apply the gradients of rows that the next batch needs.

        Returns what is left to be done, and the ranks whose gradients are NaN or infinite: nothing changes then.
        """
        owner, finite = self._owner, waiting.is_finite()
        gradients = None
        if waiting.parts and finite:
            lookups, grad = waiting.merged()
            gradients = Gradients(turn, lookups, grad.numpy(), exact=self._exact)
        bodies = [_NOTHING if gradients is None else gradients.part(NOW, k) for k in range(self.world)]
        self.wire.gradients_now += self._to_others(bodies)
        head = np.array([bool(waiting.parts), finite], np.uint8)
        got = [
            unpack(message, np.uint8, np.uint8)
            for message in self._train.exchange(_TRAIN, [pack(head, body) for body in bodies])
        ]
        wrong = [k for k, ((_, fine), _) in enumerate(got) if not fine]
        if any(some for (some, _), _ in got) and not wrong:
            step += 1
        if not wrong:
            requests = owner.requests[batch]
            owner.apply(
                [given(body, requests[k], self._dim) for k, (_, body) in enumerate(got) if len(body)], step, rule
            )
        owner.settled(owner.now(batch))
        return Gone(None if wrong else gradients, step, rule), wrong

    def after(self, batch: int) -> list[Message]:
        """Exchange the values that the batch has just changed and the next one needs."""
        owner = self._owner
        if not self._ahead or batch + 1 not in owner.requests:
            return []
        now = owner.now(batch)
        values = owner.give(
            [request[np.isin(request, now, assume_unique=True)] for request in owner.requests[batch + 1]]
        )
        parts = [pack(each) for each in values]
        self.wire.values_now += self._to_others(parts)
        return self._train.exchange(_AFTER, parts)

    def deliver(self, batch: int, gone: Gone) -> None:
        """Exchange and apply the gradients that nobody has waited for."""
        owner, gradients = self._owner, gone.gradients
        parts = []
        for k in range(self.world):
            if gradients is None:
                parts.append(_NOTHING)
                continue
            later, alone = gradients.part(LATER, k), gradients.part(ALONE, k)
            if k != self.rank:
                self.wire.gradients_later += len(later)
                self.wire.gradients_none += len(alone)
            parts.append(pack(later, alone))
        lookups = []
        for k, message in enumerate(self._carry.exchange(_DELAYED, parts)):
            if len(message):
                both = unpack(message, np.uint8, np.uint8)
                lookups += [given(part, owner.requests[batch][k], self._dim) for part in both]
        owner.apply(lookups, gone.step, gone.rule)
        owner.settled(owner.delayed(batch))
