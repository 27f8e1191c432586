"""Compute the samples whose rows are in memory while the rows of the others come."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitalfew.core import Declined, InputError, Line, Receipt
from vitalfew.embeddings.ahead import Prefetch, _Run
from vitalfew.embeddings.splitting import SplitChoice, SplitPlan, When, split_batch, take_samples
from vitalfew.embeddings.tiered import TieredEmbeddings

__all__ = ["Part", "SplitBatches"]

B = TypeVar("B")
_NONE = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Part(Generic[B]):
    """Some samples of a batch.

    Attributes
    ----------
    batch
        These samples.
    samples
        Their numbers in the whole batch, rising.
    share
        Of the whole batch's samples: the weight of a mean loss.
    kind
        ``"popular"``: all rows were in memory. ``"rest"``: the others. ``"whole"``: the batch was not split.
    """

    batch: B
    samples: NDArray[np.int64]
    share: float
    kind: Literal["popular", "rest", "whole"]


class SplitBatches(Generic[B]):
    """The batches of a loader, in its order, each in parts: first the samples whose rows are in memory.

    A batch's popular part is what is in memory when its turn to load comes; that follows from ids alone. The loop gets
    it at once (compute each part before you ask for the next), and the rest when the thread has gathered its rows.
    Every row gets one update per batch, from gradients summed in the order of the whole batch's samples: bit for
    bit what it would get unsplit from the same gradients.

    Parameters
    ----------
    tables
        With ``update="step"``: one `step` after all parts of a batch. With ``ahead=0`` nothing is gathered before the
        batch before is done; with more, rows come earlier, and there is little left to hide.
    loader, ids, scratch, on_rehearsal
        As of `Prefetch`.
    take
        Called as ``take(batch, numbers)``, returns those samples. By default the batch's own `take`, or the lines of
        the tensors and arrays in it.
    when
        ``"auto"``: measures both ways on a few batches, every few hundred again, and splits where that is faster.
        Or ``"always"``, ``"never"``.
    model
        Refused if it has batch norm: then the parts would not add up to the whole.

    Examples
    --------
    >>> import tempfile, torch
    >>> from vitalfew.embeddings import SGD, Table, TieredEmbeddings
    >>> from vitalfew.embeddings.split import SplitBatches
    >>> from vitalfew.tiers import Dram, File
    >>> tiers = [Dram(4), File(tempfile.mkdtemp())]
    >>> tables = TieredEmbeddings([Table("user", 9, 2)], SGD(0.5), tiers=tiers, ahead=0, update="step")
    >>> loader = [{"ids": torch.tensor([[1], [2]])}, {"ids": torch.tensor([[3], [1]])}]
    >>> with SplitBatches(tables, loader, when="always") as split:
    ...     for parts in split:
    ...         for part in parts:
    ...             print(part.kind, part.samples, part.share)
    ...             (tables(part.batch["ids"]).mean() * part.share).backward()
    ...         tables.step()
    rest [0 1] 1.0
    popular [1] 0.5
    rest [0] 0.5
    >>> tables.counts.rows_updated
    4
    >>> tables.close()

    Notes
    -----
    Dense gradients become the sum of two products, so dense weights agree with those of whole batches within rounding.
    ``"auto"`` goes by the clock, so from run to run only that rounding, and what moves when, may differ.

    References
    ----------
    Adnan et al., Hotline: Heterogeneous Acceleration Pipeline for Recommendation System Training, arXiv 2204.05436.
    """

    def __init__(
        self,
        tables: TieredEmbeddings,
        loader: Iterable[B],
        *,
        ids: Callable[[B], Tensor | tuple[Tensor, Tensor | None]] | None = None,
        take: Callable[[B, NDArray[np.int64]], B] | None = None,
        when: When = "auto",
        model: nn.Module | None = None,
        scratch: str | os.PathLike[str] | None = None,
        on_rehearsal: Callable[[int], None] | None = None,
    ) -> None:
        self._reader = _Reader(tables, loader, ids=ids, scratch=scratch, on_rehearsal=on_rehearsal)
        if tables.rows.update != "step":
            raise InputError(
                f"with update={tables.rows.update!r} each part of a batch would update rows on its own",
                hint='make the tables with update="step", and call step() after all parts',
            )
        norms = [name for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)] if model else []
        if norms:
            raise InputError(
                f"`{norms[0]}` is a batch norm, whose output depends on the batch a sample comes in",
                hint="use layer norm, or Prefetch",
            )
        self.tables = tables
        self._take = take
        self._choice = self._reader.choice = SplitChoice(when, ahead=tables.store.schedule.ahead > 0)
        self.split = 0
        """Batches given in two parts so far."""
        self.samples = 0
        """Samples of the batches that were looked at, split or not."""
        self.popular = 0
        """Those of them whose rows were all in memory."""
        self.gathered = 0.0
        """Seconds that it took the missing rows of split batches to come."""
        self.waited = 0.0
        """Seconds of them that the loop waited between the parts."""

    @property
    def given(self) -> int:
        """Batches given so far, over all loops."""
        return self._reader.given

    def __iter__(self) -> Iterator[Iterator[Part[B]]]:
        for batch in self._reader:
            run = self._reader.run
            yield run.parts(batch, self._cut)
            self._account(run.done())

    def _account(self, plan: SplitPlan) -> None:
        self.samples += plan.samples
        self.popular += len(plan.popular)
        if plan.comes_in_parts:
            self.split += 1
            self.gathered += plan.gather
            self.waited += plan.waited

    def _cut(self, batch: B, numbers: NDArray[np.int64], num_samples: int) -> B:
        if self._take is not None:
            return self._take(batch, numbers)
        found: B = take_samples(batch, numbers, num_samples)
        return found

    def close(self) -> int:
        """Stop reading ahead; the rows stay where they are. Returns how many gradients were given up."""
        return self._reader.close()

    def __enter__(self) -> SplitBatches[B]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._reader)

    def receipt(self) -> Receipt:
        """Return what moved, how many samples need not have waited, and what the trials have measured."""
        moved, choice = self._reader.receipt(), self._choice
        lines = [
            Line("batches split", "batches", self.given, self.split, "counted", note="before: given"),
            Line("samples with all rows in memory", "samples", self.samples, self.popular, "counted",
                 note="before: of the batches looked at"),
            Line("waiting for the rest's rows", "s", self.gathered, self.waited, "measured",
                 note="before: the gathering, in split batches"),
        ]  # fmt: skip
        declined = []
        if (payoff := choice.payoff) is not None:
            note = ", ".join(
                f"{name} {value:.2f}" if name == "popular" else f"{name} {1e3 * value:.2f} ms"
                for name, value in choice.measured.items()
            )
            other = payoff.prefetch if choice.ahead else payoff.base
            lines.append(Line("step as modelled", "s", other, payoff.split, "modelled", note=note))
            if not choice.pays:
                way = "whole and read ahead" if choice.ahead else "whole"
                declined.append(
                    Declined(
                        "split batches",
                        f"a step would take {1e3 * payoff.split:.2f} ms split, {1e3 * other:.2f} ms {way} ({note})",
                    )
                )
        return Receipt(
            "split batches", f"{moved.method}, {choice.when}", (*moved.lines, *lines), moved.verdict, moved.why,
            declined=tuple(declined),
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return what the trials have measured, as plain values."""
        return self._choice.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what trials have measured before."""
        self._choice.load_state_dict(state)


class _Reader(Prefetch[B]):
    """A `Prefetch` that gives a batch as soon as its popular part may be computed."""

    choice: SplitChoice
    run: _SplitRun[B]

    def _begin(self) -> _Run[B]:
        self.run = _SplitRun(self)
        return self.run


class _SplitRun(_Run[B]):
    """One loop, whose batches may be given before all of their rows have come."""

    def __init__(self, owner: _Reader[B]) -> None:
        self._choice = owner.choice
        self._plans: deque[SplitPlan] = deque()  # of the batches that are held and not done
        self._arrived = 0
        self._owed = False  # whether parts of the batch are still to be given
        self._held_at = self._given_at = 0.0
        super().__init__(owner)

    # -- the loop's side

    def next(self) -> tuple[B] | None:
        found = super().next()
        self._owed, self._given_at = found is not None, time.perf_counter()
        return found

    def parts(self, batch: B, cut: Callable[[B, NDArray[np.int64], int], B]) -> Iterator[Part[B]]:
        """Give the parts of a batch, each when its rows are there."""
        rows, turn, plan = self._rows, self._given, self._plans[0]
        if not plan.comes_in_parts:
            num_samples = self._num_samples(batch)
            rows.begin_part(_NONE)
            self._owed = False
            kind: Literal["popular", "rest", "whole"] = "popular" if len(plan.popular) else "rest"
            yield Part(batch, np.arange(num_samples), 1.0, kind if plan.split else "whole")
            return
        steps = rows.counts.steps
        serial = rows.begin_part(plan.popular)
        try:
            yield self._part(batch, plan.popular, plan, "popular", cut)
            if rows.counts.steps != steps:
                raise InputError(
                    "rows were updated between the parts of a batch, and would be again after the rest",
                    hint="call step() after all parts",
                )
            start = time.perf_counter()
            self._come(lambda: self._arrived >= turn)
            plan.waited = time.perf_counter() - start
            rows.begin_part(plan.rest, serial)
            self._owed = False
            yield self._part(batch, plan.rest, plan, "rest", cut)
        finally:
            if not self._stop:
                rows.begin_part(_NONE)

    def _part(
        self,
        batch: B,
        numbers: NDArray[np.int64],
        plan: SplitPlan,
        kind: Literal["popular", "rest"],
        cut: Callable[[B, NDArray[np.int64], int], B],
    ) -> Part[B]:
        return Part(cut(batch, numbers, plan.samples), numbers, len(numbers) / plan.samples, kind)

    def _num_samples(self, batch: B) -> int:
        found = self._owner._ids(batch)
        ids, offsets = found if isinstance(found, tuple) else (found, None)
        return len(ids) if offsets is None else (len(offsets) - 1) // len(self._owner.tables.features)

    def close(self) -> int:
        if not self._stop:
            self._rows.begin_part(_NONE)
        return super().close()

    def done(self) -> SplitPlan:
        """Take note that the loop is done with the batch that it was given; returns what that took."""
        if self._owed:
            raise InputError(
                "the next batch was asked for before all parts of this one: samples would be left out",
                hint="go through all parts, or break out of the loop over batches as well",
            )
        with self._change:
            plan = self._plans.popleft()
            plan.compute = time.perf_counter() - self._given_at - plan.waited
            self._choice.saw(plan)
        return plan

    # -- the thread's side

    def _held(self) -> None:
        n = self._schedule.loaded
        self._held_at = time.perf_counter()
        with self._change:
            split, on_trial = self._choice.next()
            batch = self._queue[n - self._given]
        plan = SplitPlan(split, on_trial, _NONE, _NONE)
        if split or on_trial:
            rows, edges = self._lookups_of(batch)
            width = len(self._owner.tables.features)
            # One flag per lookup, not per row of the tables, which may be many times more.
            here = (self._store.residency.where[rows] >= 0).view(np.uint8)
            bags = edges[::width] if len(edges) else None
            plan.popular, plan.rest = split_batch(np.arange(len(rows)), bags, width, here)
        with self._change:
            self._plans.append(plan)
            if plan.comes_in_parts:
                self._ready = n + 1
                self._change.notify_all()

    def _announce(self) -> None:
        with self._change:
            if self._schedule.loaded > self._arrived:
                self._arrived = self._schedule.loaded
                self._plans[-1].gather = time.perf_counter() - self._held_at
        super()._announce()
