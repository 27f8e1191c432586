"""Full batches of the inputs that are worth training, whoever reads them ahead, and however fast."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitalfew.core import InputError
from vitalfew.embeddings.ahead import _nbytes
from vitalfew.embeddings.rows import Layout, as_integers, as_offsets
from vitalfew.embeddings.samples import join_batches, take_samples
from vitalfew.embeddings.staleness import skippable_inputs
from vitalfew.embeddings.tiered_rows import row_ids

__all__ = ["Passed", "Sieve"]

Ints = NDArray[np.int64]


@dataclass(slots=True)
class Passed:
    """What had come out of the loader when a batch was given."""

    batches: int = 0
    """Batches of the loader in this pass over it."""
    samples: int = 0
    """Samples in all passes, with those that were skipped."""
    skipped: int = 0
    seen: int = 0
    """Samples with labels while some rows were stale, and below those of them that were kept."""
    seen_clicks: float = 0.0
    kept: int = 0
    kept_clicks: float = 0.0
    dry: int = 0
    """Batches of the loader since one was given, and below those to come that are trained whole."""
    owed: int = 0
    size: int = 0
    """Samples of a full batch."""
    waiting: list[Any] = field(default_factory=list)
    """Samples that are kept and not given yet, as batches."""

    def copy(self) -> Passed:
        """Return one that stays as it is."""
        return replace(self, waiting=list(self.waiting))


class Sieve:
    """Leaves out samples of stale rows, and fills batches up with those that follow.

    What is found stale after g batches were trained holds from batch ``g + lead`` on. So results do not depend on how
    far ahead a thread happens to read, as long as that is less than `lead` batches.

    Parameters
    ----------
    layout, num_rows
        Of the tables.
    share
        Of a sample's lookups that must be of stale rows.
    lead
        Batches. With more than 0 the training's place in a pass is told by its updates: one per batch.
    """

    def __init__(self, layout: Layout, num_rows: int, share: float, lead: int, every: int) -> None:
        self._layout, self._share, self.lead, self._every = layout, share, lead, every
        self._flags = np.zeros(num_rows, np.bool_)
        self._flagged = np.empty(0, np.int64)
        # From which batch on which rows are stale; replaced as a whole, since a reader ahead looks at it.
        self._schedule: list[tuple[int, Ints]] = [(0, self._flagged)]
        self._passed = Passed()
        self._marks: dict[int, Passed] = {0: self._passed.copy()}
        self._resumed = self._over = False

    def handle(
        self,
        ids: Callable[[Any], tuple[Tensor, Tensor | None]],
        labels: Callable[[Any], Any] | None,
        take: Callable[[Any, Ints], Any] | None,
        join: Callable[[list[Any]], Any] | None,
    ) -> None:
        """Say how to handle the batches of the passes to come."""
        self._ids, self._labels, self._take, self._join = ids, labels or _labels_of, take, join or join_batches

    # -- the training's side

    @property
    def given(self) -> int:
        """Batches of this pass that were put together, trained or not."""
        return max(self._marks)

    def begin(self, given: int) -> None:
        """Start a pass: nothing is in flight, so what is known holds at once, and batches count from 0 again."""
        if not self._resumed:
            self._schedule = [(0, self._schedule[-1][1])]
            # What was read ahead in vain does not count.
            self._passed = replace(self.passed(given), batches=0, size=0, waiting=[])
        self._resumed = self._over = False
        self._marks = {0: self._passed.copy()}

    def publish(self, given: int, rows: Ints) -> None:
        """Say which rows are stale now that so many batches of this pass were trained."""
        now, coming = self._known(given)
        self._schedule = [now, *coming, (given + self.lead, rows)]

    def ended(self, given: int) -> int:
        """Return the mark of the pass's end if that many batches are all there were, else as given."""
        return self.given if self._over and given + 1 >= self.given else given

    def passed(self, given: int) -> Passed:
        """Return what had been read when that many batches of this pass had been put together."""
        return self._marks[max(min(given, self.given), min(self._marks))]

    @property
    def nbytes(self) -> int:
        """Bytes of the flags, and of the samples that wait, those included that are kept to go back to."""
        passed = [self._passed, *self._marks.copy().values()]  # a copy: a reader ahead adds to them
        waiting = {id(batch): batch for each in passed for batch in each.waiting.copy()}
        return self._flags.nbytes + sum(map(_nbytes, waiting.values()))

    def _known(self, given: int) -> tuple[tuple[int, Ints], list[tuple[int, Ints]]]:
        """Return what holds for a batch, and what will hold later."""
        schedule = self._schedule
        count = sum(at <= given for at, _ in schedule)
        return schedule[count - 1], schedule[count:]

    def state_dict(self, given: int) -> dict[str, Any]:
        """Return where the pass stands after so many batches were trained, whatever was read ahead since."""
        (_, now), coming = self._known(given)
        passed = {field.name: getattr(self.passed(given), field.name) for field in fields(Passed)}
        return {
            "passed": passed,
            "schedule": [(0, torch.from_numpy(now)), *((at - given, torch.from_numpy(rows)) for at, rows in coming)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there with the next pass, over a loader that begins at its batch number `Passed.batches`."""
        self._schedule = [(int(at), rows.numpy()) for at, rows in state["schedule"]]
        self._passed = Passed(**state["passed"]).copy()
        self._marks, self._resumed = {0: self._passed.copy()}, True

    # -- the reader's side

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Yield full batches of what is kept; a batch of which all is kept comes as it is."""
        passed, number = self._passed, 0
        for batch in loader:
            self._follow(number)
            kept, count = self._kept(batch)
            passed.batches, passed.dry = passed.batches + 1, passed.dry + 1
            if passed.dry >= self._every:  # no update comes to look at any row again
                passed.owed = self._every
            passed.size = passed.size or count
            if len(kept) == count and not passed.waiting:
                number = self._give(number)
                yield batch
                continue
            if len(kept):
                passed.waiting.append(batch if len(kept) == count else self._some(batch, kept, count))
            while sum(map(self._count, passed.waiting)) >= passed.size:
                joined = self._join(passed.waiting)
                total = self._count(joined)
                rest = np.arange(passed.size, total)
                out = joined if total == passed.size else self._some(joined, np.arange(passed.size), total)
                passed.waiting = [self._some(joined, rest, total)] if len(rest) else []
                number = self._give(number)
                yield out
        if passed.waiting:
            out, passed.waiting = self._join(passed.waiting), []
            number = self._give(number)
            yield out
        self._marks[number + 1], self._over = passed.copy(), True

    def _follow(self, number: int) -> None:
        """Take up the flags that hold for a batch."""
        (_, rows), _ = self._known(number)
        if rows is not self._flagged:
            self._flags[self._flagged] = False
            self._flags[rows] = True
            self._flagged = rows

    def _give(self, number: int) -> int:
        """Note what had been read for a batch; returns the number of the next."""
        self._passed.dry = 0
        self._marks[number + 1] = self._passed.copy()
        self._marks.pop(number - self.lead - 2, None)
        return number + 1

    def _kept(self, batch: Any) -> tuple[Ints, int]:
        """Return the samples to keep, and how many there are; count them all."""
        flat, edges = self._lookups(batch)
        passed, features = self._passed, len(self._layout.features)
        count = (len(edges) - 1 if len(edges) else len(flat)) // features
        passed.samples += count
        if not len(self._flagged) or passed.owed:
            passed.owed = max(passed.owed - 1, 0)
            return np.arange(count), count
        rows = row_ids(self._layout, flat, edges)
        skip = skippable_inputs(rows, edges if len(edges) else None, features, self._flags, self._share)
        passed.skipped += int(skip.sum())
        label = self._labels(batch)
        if label is not None:
            clicks = np.asarray(label.detach().cpu() if isinstance(label, Tensor) else label, np.float64).reshape(-1)
            if len(clicks) != count:
                raise InputError(f"{count} samples came with {len(clicks)} labels", hint="pass labels= to inputs()")
            passed.seen, passed.seen_clicks = passed.seen + count, passed.seen_clicks + float(clicks.sum())
            passed.kept += count - int(skip.sum())
            passed.kept_clicks += float(clicks[~skip].sum())
        return np.flatnonzero(~skip), count

    def _lookups(self, batch: Any) -> tuple[Ints, Ints]:
        ids, offsets = self._ids(batch)
        flat = as_integers(torch.as_tensor(ids), "ids").reshape(-1)
        if offsets is None:
            return flat, np.empty(0, np.int64)
        return flat, as_offsets(torch.as_tensor(offsets), len(flat))

    def _count(self, batch: Any) -> int:
        flat, edges = self._lookups(batch)
        return (len(edges) - 1 if len(edges) else len(flat)) // len(self._layout.features)

    def _some(self, batch: Any, samples: Ints, count: int) -> Any:
        return self._take(batch, samples) if self._take is not None else take_samples(batch, samples, count)


def _labels_of(batch: Any) -> Any:
    return batch.get("label") if isinstance(batch, Mapping) else getattr(batch, "label", None)
