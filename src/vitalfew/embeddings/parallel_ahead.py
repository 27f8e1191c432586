"""Read ahead of a training loop that runs in several workers, and let updates travel while the next batch trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from types import TracebackType
from typing import Generic, TypeVar

from torch import Tensor

from vitalfew.core import InputError, Line, Receipt
from vitalfew.embeddings._exchange import Wire
from vitalfew.embeddings._parallel_loop import Loop, Times
from vitalfew.embeddings.ahead import _ids_of
from vitalfew.embeddings.parallel import ShardedEmbeddings
from vitalfew.embeddings.rows import _Waiting

__all__ = ["ShardedPrefetch"]

B = TypeVar("B")


class ShardedPrefetch(Generic[B]):
    """The batches of a worker's loader, in its order, each given when the values of the rows it needs are here.

    All workers loop together, each over a loader of its own share of every batch; a share may be empty. Each calls
    backward for each batch, or `skip` where it has nothing to go back through.

    A thread reads the loader and tells the owners of rows what is coming. Another moves rows in the tiers, and lets
    values come and gradients go. Only what a batch and the next both need is exchanged between the two; all else
    travels while the model computes, and is applied at most one batch later, before the row is read again.

    Parameters
    ----------
    tables
        Their policy decides which rows an owner keeps in memory, and how far it looks ahead.
    loader
        Read once per loop over this object.
    ids
        Takes a batch and returns its ids as `EmbeddingBags` wants them, or ids and offsets. By default the
        attributes or keys ``ids`` and ``offsets``.
    overlap
        False: nothing travels while the model computes; to compare.

    Examples
    --------
    See `ShardedEmbeddings`.

    Notes
    -----
    Leave the loop in all workers at the same batch, with this as a ``with`` block around it. An error in one worker
    ends the others too, with its reason; go on from the last commit.

    References
    ----------
    Agarwal et al., Bagpipe: Accelerating Deep Recommendation Model Training, SOSP 2023, section 3.
    """

    def __init__(
        self,
        tables: ShardedEmbeddings,
        loader: Iterable[B],
        *,
        ids: Callable[[B], Tensor | tuple[Tensor, Tensor | None]] | None = None,
        overlap: bool = True,
    ) -> None:
        if not isinstance(tables, ShardedEmbeddings):
            raise InputError(
                f"a {type(tables).__name__} is not spread over workers", hint="use Prefetch, or ShardedEmbeddings"
            )
        self.tables, self.loader, self.overlap = tables, loader, overlap
        self._ids = ids or _ids_of
        self._running: Loop[B] | None = None
        self.wire, self.times = Wire(), Times()
        self.samples = 0
        """Samples of the batch given last, of all workers together."""
        self.given = 0
        """Batches given so far, over all loops."""

    def __iter__(self) -> Iterator[B]:
        if self._running is not None:
            raise InputError("a loop over this ShardedPrefetch is running", hint="finish it first")
        if self.tables.rows.driven:
            raise InputError("another loop over these tables is running", hint="finish it first")
        source = iter(self.loader)
        self._running = Loop(self.tables, source, self._ids, self.wire, self.times, overlap=self.overlap)
        return self

    def __next__(self) -> B:
        if self._running is None:
            raise StopIteration
        run = self._running
        try:
            found = run.next()
        except BaseException as error:
            self.close(error)
            raise
        if not found:
            self.close()
            raise run.at_end or StopIteration
        self.given += 1
        self.samples = run.samples
        return found[0]

    def skip(self) -> None:
        """Say that this worker has no gradient for the batch, where others call backward."""
        if self._running is not None and self.tables.rows.take is not None:
            self.tables.rows.take(_Waiting())

    def close(self, error: BaseException | None = None) -> None:
        """Apply what is on its way and stop reading ahead; with an error, tell the other workers instead."""
        run, self._running = self._running, None
        if run is not None:
            run.close(error)

    def __enter__(self) -> ShardedPrefetch[B]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def receipt(self) -> Receipt:
        """Return what this worker has sent, and how much of the time of moving the loop did not wait for."""
        steps = max(self.given, 1)
        sent = tuple(
            Line(
                f"{field.name.replace('_', ' ')} sent per step",
                "B",
                None,
                getattr(self.wire, field.name) / steps,
                "counted",
            )
            for field in fields(self.wire)
        )
        return Receipt(
            "rows of several workers",
            f"rank {self.tables.rank} of {self.tables.world}, {self.given} batches",
            (
                *sent,
                Line(
                    "waiting for values",
                    "s",
                    self.times.moving,
                    self.times.waited,
                    "measured",
                    note="before: all the moving",
                ),
                Line(
                    "waiting for shared updates",
                    "s",
                    None,
                    self.times.synced,
                    "measured",
                    note="rows the next batch needs",
                ),
            ),
            "undecided",
            "no paired run was made: counts alone do not show the time or the quality",
        )
