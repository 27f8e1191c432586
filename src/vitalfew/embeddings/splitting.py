"""Which samples of a batch need not wait for rows, and whether it pays to compute them first."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitalfew.core import InputError

__all__ = ["SplitChoice", "SplitPayoff", "SplitPlan", "split_batch", "split_pays", "take_samples"]

When = Literal["auto", "always", "never"]

_PAIRS = 12
"""Batches of each kind that a trial compares."""
_WARM = 4
"""Batches before the first trial: they compile, and fill the memory."""
_EVERY = 300
"""Batches from one trial to the next."""


def split_batch(
    rows: NDArray[np.int64], offsets: NDArray[np.int64] | None, width: int, resident: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the numbers of the samples whose rows are all resident, and those of the rest, each in order.

    Parameters
    ----------
    rows
        Row of each lookup, sample by sample.
    offsets
        Where the lookups of each sample begin, and the end; None where all have `width`.
    width
        Lookups per sample.
    resident
        1 for a row that is in fast memory, one entry per row.

    Examples
    --------
    >>> popular, rest = split_batch(np.array([0, 1, 0, 2, 1, 1]), None, 2, np.array([1, 1, 0], np.uint8))
    >>> popular, rest
    (array([0, 2]), array([1]))

    Notes
    -----
    Cost: one pass over the rows. A sample without rows is popular.
    """
    from vitalfew.embeddings._kernels_choose import all_flagged
    from vitalfew.embeddings.choosing import check_samples

    check_samples(rows, offsets, width)
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(resident):
        raise InputError(
            f"the rows {rows.min()} to {rows.max()} are not all within 0 to {len(resident) - 1}",
            hint="pass one flag per row of all tables",
        )
    edges = np.empty(0, np.int64) if offsets is None else offsets
    popular = all_flagged(rows, edges, width, resident)
    return np.flatnonzero(popular), np.flatnonzero(~popular)


@dataclass(frozen=True, slots=True)
class SplitPayoff:
    """Modelled seconds per batch, at best.

    Attributes
    ----------
    base
        All rows are gathered, then the batch is computed.
    split
        The popular part is computed while the rows of the rest are gathered, then the rest is computed.
    prefetch
        The batch is computed while the rows of the next one are gathered.
    """

    base: float
    split: float
    prefetch: float

    @property
    def pays(self) -> bool:
        """Whether splitting beats gathering first; reading ahead may still beat both."""
        return self.split < self.base


def split_pays(*, compute: float, gather: float, popular: float, fixed: float = 0.0) -> SplitPayoff:
    """Return what a batch would take at best: whole, split, and with the next one's rows gathered meanwhile.

    Parameters
    ----------
    compute
        Seconds to compute the whole batch.
    gather
        Seconds to gather the rows that are not in fast memory.
    popular
        Share of the samples that need none of those.
    fixed
        Seconds that a part takes whatever its size: splitting pays them twice.

    Examples
    --------
    >>> split_pays(compute=8.0, gather=4.0, popular=0.5, fixed=1.0)
    SplitPayoff(base=12.0, split=9.0, prefetch=8.0)

    Notes
    -----
    Gathering and computing are taken not to slow each other down. Where they share cores, memory or Python's lock they
    do, and a gain may become a loss: `SplitBatches` measures steps of both kinds instead.

    References
    ----------
    Adnan et al., Hotline, arXiv 2204.05436.
    """
    if not 0 <= popular <= 1:
        raise InputError(f"the popular share must lie in [0, 1], got {popular}", hint="samples over samples")
    if not min(compute, gather, fixed) >= 0:
        raise InputError(
            f"seconds must not be negative: compute={compute}, gather={gather}, fixed={fixed}", hint="measure them"
        )
    base, prefetch = gather + compute, max(compute, gather)
    if popular in (0, 1):  # one part
        return SplitPayoff(base, base, prefetch)
    fixed = min(fixed, compute)
    growing = compute - fixed
    first, second = fixed + popular * growing, fixed + (1 - popular) * growing
    return SplitPayoff(base, max(first, gather) + second, prefetch)


@dataclass(slots=True)
class SplitPlan:
    """How one batch is given, and what that took.

    Attributes
    ----------
    split, on_trial
        Whether it comes in parts, and whether the choice wants to know.
    popular, rest
        Numbers of its samples; both empty where nobody asked.
    samples
        How many it has, if anybody asked.
    gather, waited, step
        Seconds: for its missing rows to come, that the loop waited for them between the parts, and from when the batch
        before was done until this one was.
    """

    split: bool
    on_trial: bool
    popular: NDArray[np.int64]
    rest: NDArray[np.int64]
    gather: float = 0.0
    waited: float = 0.0
    step: float = 0.0

    @property
    def samples(self) -> int:
        return len(self.popular) + len(self.rest)

    @property
    def comes_in_parts(self) -> bool:
        return self.split and len(self.popular) > 0 and len(self.rest) > 0


class SplitChoice:
    """Whether to split: always, never, or by what steps of both ways have taken, in turns.

    Parameters
    ----------
    when
        ``"auto"``: by trials.
    """

    def __init__(self, when: When) -> None:
        if when not in ("auto", "always", "never"):
            raise InputError(f"when must be 'auto', 'always' or 'never', got {when!r}", hint="'auto' measures")
        self.when = when
        self.measured: dict[str, float] = {}
        """By the last trial: seconds of a step `whole` and `split`, those of the `gather`, and the share `popular`."""
        self._on_trial = when == "auto"
        self._begun = self._since = 0
        self._warm = _WARM
        self._seen: tuple[list[SplitPlan], list[SplitPlan]] = ([], [])

    @property
    def pays(self) -> bool:
        """Whether the last trial says so."""
        return bool(self.measured) and self.measured["split"] < self.measured["whole"]

    def next(self) -> tuple[bool, bool]:
        """Say whether to split the next batch, and whether it is on trial."""
        self._begun += 1
        if self.when != "auto":
            return self.when == "always", False
        return (self._begun % 2 == 0 if self._on_trial else self.pays), self._on_trial

    def saw(self, plan: SplitPlan) -> None:
        """Learn from a batch that is done."""
        if self.when != "auto":
            return
        if not self._on_trial:
            self._since += 1
            self._on_trial = self._since >= _EVERY
        elif plan.on_trial:
            if self._warm:
                self._warm -= 1
                return
            self._seen[plan.split].append(plan)
            if min(map(len, self._seen)) >= _PAIRS:
                self._decide()

    def _decide(self) -> None:
        whole, split = self._seen
        every = whole + split
        step = statistics.median(plan.step for plan in whole)
        # Of neighbours, for a machine may be slower now than a moment ago. Batches in one part do not differ.
        longer = [two.step - one.step for one, two in zip(whole, split, strict=False) if two.comes_in_parts]
        self.measured = {
            "whole": step,
            "split": step + (statistics.median(longer) if longer else 0.0),
            "gather": statistics.median(plan.gather for plan in every),
            "popular": sum(len(plan.popular) for plan in every) / max(sum(plan.samples for plan in every), 1),
        }
        self._on_trial, self._since, self._seen = False, 0, ([], [])

    def state_dict(self) -> dict[str, Any]:
        return {"measured": dict(self.measured), "since": self._since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.measured, self._since = dict(state["measured"]), int(state["since"])
        self._on_trial = self.when == "auto" and not self.measured
        self._seen = ([], [])


def take_samples(batch: Any, numbers: NDArray[np.int64], num_samples: int, name: str = "the batch") -> Any:
    """Return some samples of a batch: an object that has `take`, or tensors and arrays with one line per sample.

    Examples
    --------
    >>> take_samples({"ids": np.array([[3], [4], [5]]), "day": 7}, np.array([0, 2]), 3)
    {'ids': array([[3],
           [5]]), 'day': 7}
    """
    if isinstance(batch, Tensor | np.ndarray):
        if batch.ndim == 0:
            return batch
        if len(batch) != num_samples:
            raise InputError(
                f"{name} has {len(batch)} lines and the batch {num_samples} samples",
                hint="pass take=lambda batch, numbers: ... to SplitBatches",
            )
        if isinstance(batch, np.ndarray):
            return batch[numbers]
        return batch.index_select(0, torch.from_numpy(numbers).to(batch.device))
    if callable(getattr(batch, "take", None)):
        return batch.take(numbers)
    if isinstance(batch, Mapping):
        return {key: take_samples(value, numbers, num_samples, f"`{key}`") for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        if len(batch) == num_samples and all(isinstance(each, bool | int | float | str) for each in batch):
            raise InputError(
                f"{name} is a {type(batch).__name__} of plain values, one per sample",
                hint="make it an array, or pass take=lambda batch, numbers: ... to SplitBatches",
            )
        parts = [take_samples(value, numbers, num_samples, f"item {k}") for k, value in enumerate(batch)]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = [field.name for field in dataclasses.fields(batch)]
        return dataclasses.replace(
            batch, **{f: take_samples(getattr(batch, f), numbers, num_samples, f"`{f}`") for f in fields}
        )
    if batch is None or isinstance(batch, bool | int | float | str):
        return batch
    raise InputError(
        f"{name} is a {type(batch).__name__}, of which no samples can be taken",
        hint="pass take=lambda batch, numbers: ... to SplitBatches",
    )
