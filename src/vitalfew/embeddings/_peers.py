"""Messages between worker processes: each gives every other one some bytes, and all of them notice when one fails."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vitalfew.core import InputError, StorageError

__all__ = ["Message", "Peers", "pack", "unpack"]

Message = NDArray[np.uint8]
_WORD = 8
_FAILED = -1
_HINT = "look at its log, and start all workers again from the last commit"
_PATIENCE = 2.0
"""Seconds that one who fails waits for the others to hear of it."""


def pack(*arrays: NDArray[Any]) -> Message:
    """Put arrays behind one another, each with its size, so that every one begins at a multiple of 8 bytes."""
    parts: list[NDArray[np.uint8]] = []
    for array in arrays:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        parts += [np.array([len(data)], np.int64).view(np.uint8), data, np.zeros(-len(data) % _WORD, np.uint8)]
    return np.concatenate(parts) if parts else np.empty(0, np.uint8)


def unpack(message: Message, *types: Any) -> list[NDArray[Any]]:
    """Return the arrays that `pack` was given, as views of the message.

    Examples
    --------
    >>> unpack(pack(np.array([1, 2], np.int32), np.array([0.5])), np.int32, np.float64)
    [array([1, 2], dtype=int32), array([0.5])]
    """
    found, at = [], 0
    for kind in types:
        size = int(message[at : at + _WORD].view(np.int64)[0])
        found.append(message[at + _WORD : at + _WORD + size].view(kind))
        at += _WORD + size + -size % _WORD
    return found


class Peers:
    """What one thread of this process says to the same thread of the others; a thread that speaks has a group for it.

    Parameters
    ----------
    group
        Who takes part: a process group of any kind, or None for all. The bytes travel through gloo, whatever it uses.
    timeout
        Seconds to wait for the others before one of them counts as lost.
    """

    def __init__(self, group: Any, timeout: float) -> None:
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise InputError(
                "there is no process group", hint="call torch.distributed.init_process_group(), and start with torchrun"
            )
        self._ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        self.rank, self.world = dist.get_rank(group), len(self._ranks)
        if self.rank < 0:
            raise InputError("this process does not belong to the group", hint="make the tables in its members only")
        self.timeout = timeout
        self._group = dist.new_group(
            self._ranks,
            timeout=timedelta(seconds=timeout),
            backend="gloo",
            use_local_synchronization=group is not None,
        )
        self._broken: StorageError | None = None
        self._last_words: list[Any] = []

    def exchange(self, kind: int, parts: Sequence[Message]) -> list[Message]:
        """Give part k to rank k, and return what each rank gave; all must call this, with the same positive kind.

        Raises
        ------
        StorageError
            If one is gone or says that it has failed. This one cannot go on either, and tells the others so.
        """
        if self._broken is not None:
            raise self._broken
        try:
            heads = [np.empty(2, np.int64) for _ in parts]
            self._swap([np.array([kind, len(part)]) for part in parts], heads, kind)
            found = [np.empty(head[1], np.uint8) for head in heads]
            self._swap(parts, found)
        except StorageError as error:
            self.fail(error.message)
            raise
        return found

    def share(self, kind: int, part: Message) -> list[Message]:
        """Give the same part to all."""
        return self.exchange(kind, [part] * self.world)

    def fail(self, why: str) -> None:
        """Tell the others, in place of the next message, that this one cannot go on; give them a moment to hear it."""
        import torch.distributed as dist

        if self._broken is not None:
            return
        self._broken = StorageError(why, hint=_HINT)
        text = torch.frombuffer(bytearray(why.encode()), dtype=torch.uint8)
        head = torch.tensor([_FAILED, len(text)])
        for k in self._others():
            with contextlib.suppress(RuntimeError):  # it is gone itself
                for tensor in (head, text):
                    self._last_words.append((k, tensor, dist.isend(tensor, self._ranks[k], group=self._group)))
        deadline = time.monotonic() + _PATIENCE
        for *_, work in self._last_words:
            with contextlib.suppress(RuntimeError):
                work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))

    def _others(self) -> list[int]:
        return [k for k in range(self.world) if k != self.rank]

    def _swap(self, give: Sequence[NDArray[Any]], take: list[NDArray[Any]], kind: int = 0) -> None:
        """Send each array to its rank while those of the others come in; my own is passed on as it is.

        Where one is lost the rest is exchanged all the same, so that the others can read what comes next.
        """
        import torch.distributed as dist

        lost: dict[int, StorageError] = {}
        running: dict[Any, list[tuple[int, Any, Any]]] = {dist.irecv: [], dist.isend: []}
        for k in self._others():
            for array, start in ((take[k], dist.irecv), (give[k], dist.isend)):
                try:
                    if len(array):
                        work = start(torch.from_numpy(array), self._ranks[k], group=self._group)
                        running[start].append((k, array, work))
                except RuntimeError as error:
                    lost[k] = self._lost(k, error)
        try:
            for start, some in running.items():
                for k, _, work in some:
                    try:
                        work.wait()
                    except RuntimeError as error:
                        lost.setdefault(k, self._lost(k, error))
                if kind and start is dist.irecv:  # one that has failed does not take what is sent to it
                    self._check(kind, {k: take[k] for k in self._others() if k not in lost})
                if lost:
                    raise lost[min(lost)]
        except StorageError:
            for some in running.values():
                self._last_words += some  # what is on its way keeps its memory
            raise
        take[self.rank] = give[self.rank]

    def _check(self, kind: int, heads: dict[int, NDArray[Any]]) -> None:
        import torch.distributed as dist

        for k, head in heads.items():
            if head[0] == _FAILED:
                text = np.empty(head[1], np.uint8)
                try:
                    work = dist.irecv(torch.from_numpy(text), self._ranks[k], group=self._group)
                    assert work is not None
                    work.wait()
                except RuntimeError as error:
                    raise self._lost(k, error) from None
                raise StorageError(bytes(text).decode(errors="replace"), hint=_HINT)
        for k, head in heads.items():
            if head[0] != kind:
                raise StorageError(
                    f"rank {k} makes another call than rank {self.rank} (kinds {head[0]} and {kind})",
                    hint="let all workers make the same calls in the same order",
                )

    def _lost(self, k: int, error: RuntimeError) -> StorageError:
        late = "imed out" in str(error)
        what = f"has not answered for {self.timeout:g} s" if late else "is gone"
        return StorageError(f"rank {k} of {self.world} {what}", hint=_HINT)
