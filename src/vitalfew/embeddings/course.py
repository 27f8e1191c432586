"""One training run with the methods of a way: in order, and from where an earlier sitting stood."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vitalfew.core import InputError, Receipt
from vitalfew.data.batches import Batches
from vitalfew.data.encoded import Encoded
from vitalfew.data.log import EncodedLog
from vitalfew.embeddings.ahead import Prefetch
from vitalfew.embeddings.fitting import train_parts, train_step, validation_loss
from vitalfew.embeddings.hot import HotRows
from vitalfew.embeddings.models import ClickModel
from vitalfew.embeddings.phases import Phase
from vitalfew.embeddings.preparing import Job
from vitalfew.embeddings.split import SplitBatches
from vitalfew.embeddings.stale import SkipStale
from vitalfew.embeddings.tables import EmbeddingBags
from vitalfew.embeddings.tiered import TieredEmbeddings
from vitalfew.embeddings.tiering import Tiering
from vitalfew.embeddings.way import Way

__all__ = ["Course", "LogSource", "MemorySource", "Source", "check_way", "course_of"]

_WINDOWS = 20
"""Windows of a run in which staleness is looked for, as long as each has some steps."""
_VALIDATED = 1024
"""Samples of the loss that steers: few, as it is measured in every window."""


class Source(Protocol):
    """Samples that can be had in shuffled batches, or by their numbers."""

    batch_size: int
    seed: int

    def __len__(self) -> int: ...

    def epoch(self, number: int, start: int = 0) -> Iterator[Encoded]:
        """Yield the batches of an epoch from batch `start` on."""
        ...

    def take(self, numbers: NDArray[np.int64]) -> Encoded:
        """Return samples by number."""
        ...

    @property
    def ids(self) -> tuple[Any, Any]:
        """Ids and offsets of all samples, or a log and None, as `HotRows` takes them."""
        ...


class LogSource:
    """An encoded log on disk, or the first `most` batches of each epoch."""

    def __init__(self, log: EncodedLog, batch_size: int, seed: int, *, most: int | None = None) -> None:
        self._batches, self.batch_size, self.seed = Batches(log, batch_size, seed=seed), batch_size, seed
        self._most = len(self._batches) if most is None else most
        self.take = log.rows

    def __len__(self) -> int:
        return min(len(self._batches.log), self._most * self.batch_size)

    def epoch(self, number: int, start: int = 0) -> Iterator[Encoded]:
        return islice(self._batches.epoch(number, start), self._most - start)

    @property
    def ids(self) -> tuple[Any, Any]:
        return self._batches.log, None


class MemorySource:
    """Samples in memory."""

    def __init__(self, samples: Encoded, batch_size: int, seed: int) -> None:
        self._samples, self.batch_size, self.seed = samples, batch_size, seed
        self.take = samples.take

    def __len__(self) -> int:
        return len(self._samples)

    def epoch(self, number: int, start: int = 0) -> Iterator[Encoded]:
        order = np.random.default_rng([self.seed, number]).permutation(len(self))
        for at in range(start * self.batch_size, len(order), self.batch_size):
            yield self.take(order[at : at + self.batch_size])

    @property
    def ids(self) -> tuple[Any, Any]:
        return self._samples.ids, self._samples.offsets


class _Feed:
    """What a reader ahead iterates over, pass after pass."""

    stream: Iterable[Encoded] = ()

    def __iter__(self) -> Iterator[Encoded]:
        return iter(self.stream)


class Course:
    """Train a model on a source, step by step: iterating gives after each step the samples it trained.

    Parameters
    ----------
    way
        The methods that act.
    model, optimizers
        As of `build_arm`.
    source
        The samples, in batches of their size and by their seed.
    epochs
        Passes over the source.
    reads_ahead
        False brings rows in on demand, where they lie over tiers.
    state
        Of `state_dict`: go on from there.

    Notes
    -----
    Between two steps `state_dict` tells all that is needed, beside the weights, to go on to the same bits.
    """

    def __init__(
        self,
        way: Way,
        model: ClickModel,
        optimizers: Iterable[torch.optim.Optimizer],
        source: Source,
        *,
        epochs: int = 1,
        reads_ahead: bool = True,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._way, self._model, self._optimizers = way, model, list(optimizers)
        self._source, self._epochs = source, epochs
        self._reads_ahead = reads_ahead
        self._feed = _Feed()
        self.reader: Prefetch[Encoded] | SplitBatches[Encoded] | None = None
        """What reads ahead, once the run has begun."""
        self._over = False
        self._state = dict(state) if state else None
        self._epoch = self._done = (
            0  # batches of the run, or of this phase, that the source has given for what was trained
        )
        self._read_before = 0
        self.steps, self.samples = (self._state or {}).get("steps", 0), (self._state or {}).get("samples", 0)
        """Updates of the dense layers so far, and samples that came by, skipped ones included."""
        self._hot: HotRows | None = None
        self._stale: SkipStale | None = None
        self._split: SplitBatches[Encoded] | None = None
        self.receipts: dict[str, Receipt] = {}
        """Of the methods, once the run is over."""
        if not way.acts:
            return
        if not isinstance(model.tables, EmbeddingBags):
            raise InputError(f"{way.name} needs tables that train themselves", hint="use EmbeddingBags")

    @property
    def total(self) -> int:
        """Samples of the whole run."""
        return self._epochs * len(self._source)

    def __iter__(self) -> Iterator[int]:
        first, self._state = self._state or {}, None
        self._over = first.get("over", False)
        if self._over:
            self.receipts = {name: Receipt.from_dict(each) for name, each in first.get("receipts", {}).items()}
            return
        with ExitStack() as stack:
            self._set_up(stack, first)
            for stream in self._streams(first):
                # A resumed phase of hot rows begins with what was left of it.
                self._done = first.get("done", 0) if self._hot is None else 0
                self._read_before = self._stale.batches_read if first and self._stale and self._skips_inputs else 0
                first = {}
                yield from self._train(stream)
                self._report()
            self._tear_down()

    # -- the parts

    @property
    def _skips_inputs(self) -> bool:
        return self._way.skip == "inputs"

    def _set_up(self, stack: ExitStack, state: Mapping[str, Any]) -> None:
        way, tables = self._way, self._model.tables
        if way.split:
            assert isinstance(tables, TieredEmbeddings)
            self.reader = self._split = SplitBatches(tables, self._feed, model=self._model)
            stack.enter_context(self._split)
            if "split" in state:
                self._split.load_state_dict(state["split"])
        elif self._reads_ahead and isinstance(tables, TieredEmbeddings):
            self.reader = stack.enter_context(Prefetch(tables, self._feed))
        if way.hot:
            assert isinstance(tables, EmbeddingBags)
            budget = tables.room.slots if isinstance(tables, TieredEmbeddings) else "256 MiB"
            ids, offsets = self._source.ids
            self._hot = stack.enter_context(
                HotRows(tables, ids, offsets, batch_size=self._source.batch_size, budget=budget, seed=self._source.seed)
            )
            if "hot" in state:
                self._hot.load_state_dict(state["hot"])
        if way.skip:
            assert isinstance(tables, EmbeddingBags)
            steps = self._epochs * -(-len(self._source) // self._source.batch_size)
            self._stale = stack.enter_context(
                SkipStale(
                    tables, mode=way.skip, max_change="auto", every=min(max(steps // _WINDOWS, 10), 200),
                    validate=self._validation(), seed=self._source.seed,
                )
            )  # fmt: skip
            if "stale" in state:
                self._stale.load_state_dict(state["stale"])

    def _validation(self) -> Callable[[], float]:
        """Return the loss on some samples of the log: they are trained too, but hardly any run makes many passes."""
        count = min(_VALIDATED, len(self._source))
        numbers = np.random.default_rng([self._source.seed, 7]).choice(len(self._source), count, replace=False)
        few = self._source.take(np.sort(numbers))
        return lambda: validation_loss(self._model, few, self._source.batch_size)

    def _streams(self, first: Mapping[str, Any]) -> Iterator[Iterator[Encoded]]:
        """Yield what is trained one after the other: all epochs as one, or the phases of each."""
        if self._hot is None:
            per_epoch = -(-len(self._source) // self._source.batch_size)
            epoch, start = divmod(first.get("done", 0), per_epoch)
            yield self._epochs_from(epoch, start)
            return
        self._epoch = begin = first.get("epoch", 0)
        if "hot" in first and not first["hot"]["place"]["left"]:
            yield iter(())  # that phase was trained, but not what waits of it, and its loss was not told
        for epoch in range(begin, self._epochs):
            self._epoch = epoch
            for phase in self._hot.epoch(epoch):
                yield self._phase(phase)

    def _epochs_from(self, epoch: int, start: int) -> Iterator[Encoded]:
        for number in range(epoch, self._epochs):
            yield from self._source.epoch(number, start if number == epoch else 0)

    def _phase(self, phase: Phase) -> Iterator[Encoded]:
        return (self._source.take(numbers) for numbers in phase)

    def _train(self, stream: Iterable[Encoded]) -> Iterator[int]:
        if self._stale is not None and self._skips_inputs:
            stream = self._stale.inputs(stream)
        self._feed.stream = stream
        if self._split is not None:
            for parts in self._split:
                yield self._stepped(train_parts(self._model, self._optimizers, parts))
            return
        for batch in self.reader if isinstance(self.reader, Prefetch) else stream:
            train_step(self._model, self._optimizers, batch)
            yield self._stepped(len(batch))

    def _stepped(self, size: int) -> int:
        self.steps += 1
        if self._stale is not None and self._skips_inputs:
            self._done = self._stale.batches_read - (self._read_before if self._hot is not None else 0)
            self.samples = self._stale.samples_seen
        else:
            self._done += 1
            self.samples += size
        return size

    def _report(self) -> None:
        """Tell the hot rows' rate how a phase went."""
        if self._hot is not None:
            few = self._validation()
            self._hot.report(few())

    def _tear_down(self) -> None:
        for name, handle in (("hot-rows", self._hot), ("split-batches", self._split), ("skip", self._stale)):
            if handle is not None:
                self.receipts[f"skip-{self._way.skip}" if name == "skip" else name] = handle.receipt()
        if self._stale is not None and self._skips_inputs:
            self._stale.correct(_last_bias(self._model))
        self._over = True

    def state_dict(self) -> dict[str, Any]:
        """Return where the run stands, between two steps."""
        state: dict[str, Any] = {
            "epoch": self._epoch, "done": self._done, "steps": self.steps, "samples": self.samples, "over": self._over
        }  # fmt: skip
        if self._over:
            return state | {"receipts": {name: each.to_dict() for name, each in self.receipts.items()}}
        if self._hot is not None:
            state["hot"] = self._hot.state_dict(self._done)
        if self._split is not None:
            state["split"] = self._split.state_dict()
        if self._stale is not None:
            state["stale"] = self._stale.state_dict()
        return state


def check_way(way: Way, tiers: Tiering | None) -> None:
    """Refuse what the command does not train with, or what cannot act on rows that are all in memory."""
    if not way.fused:
        raise InputError("plain PyTorch is what runs are compared to", hint="leave --method out, and see --pairs")
    if way.split and tiers is None:
        raise InputError(
            "split-batches needs rows over memory and disk: in memory nothing has to be waited for",
            hint="add --memory, or leave it out",
        )


def course_of(job: Job, model: ClickModel, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any] | None) -> Course:
    """Return the course of a job, from where what was `saved` beside its weights stands; says so in the notes."""
    settings = job.settings
    source = LogSource(job.train, settings.batch_size, settings.seed)
    state = None
    if saved:
        step = int(saved["step"])
        per_epoch = -(-len(source) // settings.batch_size)
        epoch, done = divmod(step, per_epoch)
        samples = epoch * len(source) + done * settings.batch_size
        state = saved.get("course", {"done": step, "steps": step, "samples": samples})  # before there were ways
        of = "" if job.way.acts else f" of {per_epoch * settings.epochs:,}"
        job.notes.append(f"resumed at step {step:,}{of}; the times count the last sitting only")
    return Course(job.way, model, [optimizer], source, epochs=settings.epochs, state=state)


def _last_bias(model: nn.Module) -> Tensor:
    """Return the bias of the layer that makes the logit."""
    layers = [each for each in model.modules() if isinstance(each, nn.Linear) and each.out_features == 1]
    if not layers or layers[-1].bias is None:
        raise InputError("the model has no last layer with a bias to correct", hint="use mode 'rows'")
    return layers[-1].bias
