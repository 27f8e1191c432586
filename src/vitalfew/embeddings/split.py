"""Compute the samples whose rows are in memory while the rows of the others come."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitalfew.core import Declined, InputError, Line, Receipt
from vitalfew.embeddings.split_run import Part, SplitReader
from vitalfew.embeddings.splitting import SplitChoice, SplitPlan, When, take_samples
from vitalfew.embeddings.tiered import TieredEmbeddings

__all__ = ["Part", "SplitBatches"]

B = TypeVar("B")


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
        ``"auto"``: times steps of both ways in turns, every few hundred batches again, and splits where that is faster.
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
        self._reader = SplitReader(tables, loader, ids=ids, scratch=scratch, on_rehearsal=on_rehearsal)
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
        self._choice = self._reader.choice = SplitChoice(when)
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
        if found := choice.measured:
            whole, split = found["whole"], found["split"]
            note = f"{found['popular']:.0%} of the samples popular, {1e3 * found['gather']:.2f} ms of gathering"
            lines.append(Line("step in the last trial", "s", whole, split, "measured", note=note))
            if not choice.pays:
                took = f"in a trial a step took {1e3 * split:.2f} ms split, {1e3 * whole:.2f} ms whole ({note})"
                declined.append(Declined("split batches", took))
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
