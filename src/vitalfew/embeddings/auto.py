"""Which methods pay on a log: foretold from its counts, then put to a short paired trial."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitalfew.core import Comparison, Declined, InputError, Line, Outcome, Rule, compare
from vitalfew.core.compare import Arm
from vitalfew.data.batches import Batches
from vitalfew.data.encoded import Encoded
from vitalfew.data.log import EncodedLog
from vitalfew.embeddings.choosing import flags_of, hot_rows
from vitalfew.embeddings.fitting import train_step
from vitalfew.embeddings.foretell import Foretold, foretell
from vitalfew.embeddings.payoff import step_seconds
from vitalfew.embeddings.phases import Place
from vitalfew.embeddings.room import Room
from vitalfew.embeddings.settings import Settings, build_arm
from vitalfew.embeddings.splitting import split_pays
from vitalfew.embeddings.tables import EmbeddingBags
from vitalfew.embeddings.tiering import Tiering, ids_of, most_rows, record_bytes, schedule_for
from vitalfew.embeddings.way import METHODS, Way, way_named
from vitalfew.embeddings.ways import run_way
from vitalfew.tiers.replay import replay

__all__ = ["Choice", "Tried", "choose_way"]

_WARM_UP = 100
"""Updates before a row may be stale, the default of `SkipStale`."""
_SHARE = 0.8
"""Of a sample's rows that must be stale, as there."""
_TARGET = 0.5
"""Of the visits, at most, that go without training, as there."""
_TIMED = 12
_VALIDATED = 20_000
_NONE = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Tried:
    """What became of one way.

    Attributes
    ----------
    name
        Of the way.
    foretold
        How many times faster at most, and on what grounds.
    comparison
        Of the paired trial; None where it was not worth one.
    """

    name: str
    foretold: float
    basis: str
    comparison: Comparison | None = None

    @property
    def pays(self) -> bool:
        """Whether it was surely faster, and surely as good."""
        return self.comparison is not None and self.comparison.verdict == "saved"

    @property
    def reason(self) -> str:
        """Why it is left, or taken."""
        what = f"foretold: {self.foretold:.2f}x at most ({self.basis})" if self.foretold else self.basis
        if self.comparison is None:
            return what
        return f"{self.comparison.verdict}: {self.comparison.why}; {what}"

    def line(self, after: Tried | None = None) -> Line:
        """Return the speed it added in the trials, beyond that of another way that it contains."""
        assert self.comparison is not None
        samples = sum(p.base_work for p in self.comparison.pairs) / sum(p.base_cost for p in self.comparison.pairs)
        before = 1.0 if after is None or after.comparison is None else after.comparison.ratio.mean
        ratio = self.comparison.ratio
        return Line(
            f"training speed with {self.name}", "rows/s", samples * before, samples * ratio.mean, "measured",
            samples * ratio.low, samples * min(ratio.high, 1e6), "the short paired trial",
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Choice:
    """The way to train, and what became of all that were looked at."""

    way: Way
    tried: tuple[Tried, ...]

    @property
    def declined(self) -> tuple[Declined, ...]:
        """What was left, and why."""
        kept = {self.way.name, *self.way.methods}
        return tuple(Declined(each.name, each.reason) for each in self.tried if each.name not in kept)

    @property
    def lines(self) -> tuple[Line, ...]:
        """What each method that was taken has added in the trials."""
        by_name = {each.name: each for each in self.tried}
        if not self.way.acts:
            return ()
        whole = by_name[self.way.name]
        parts = [by_name[name] for name in self.way.methods]
        if len(parts) == 1:
            return (whole.line(),)
        first = max(parts, key=lambda each: each.comparison.ratio.mean if each.comparison else 0.0)
        return (first.line(), whole.line(first))


def choose_way(
    train: EncodedLog,
    num_rows: Mapping[str, int],
    settings: Settings,
    rule: Rule,
    *,
    tiers: Tiering | None = None,
    store: Path | None = None,
    pairs: int = 3,
    max_steps: int = 400,
    progress: Callable[[float], None] = lambda share: None,
    say: Callable[[str], None] = lambda text: None,
) -> Choice:
    """Try the methods that may pay, and keep those that do.

    Trials train on the first batches of the shuffled log and are judged on the ones after them: nothing held back for
    the final test is looked at.

    Parameters
    ----------
    train
        What will be trained on.
    rule
        What counts as a saving, and how much AUC may fall.
    tiers, store
        Rows over memory and a folder, beside which the trials have theirs.
    pairs, max_steps
        Of each trial; it takes a tenth of the run's steps, but no fewer than 40.
    """
    per_epoch = len(Batches(train, settings.batch_size))
    steps = min(max(40, per_epoch * settings.epochs // 10), max_steps, max(per_epoch * 4 // 5, 1))
    data, held = _draw(train, settings, steps)
    say(f"looking at {len(METHODS)} methods; a trial takes {steps} steps, {pairs} pairs")
    tried = list(_foretold(data, num_rows, settings, tiers, store, len(train) * settings.epochs / len(data)))
    if tiers is not None:
        most = most_rows(train, num_rows, settings.batch_size)
        tried = [_fitting(each, most, num_rows, settings, tiers) for each in tried]
    candidates = [each for each in tried if each.foretold >= rule.min_saving]
    done, total = 0, max(2 * pairs * len(candidates), 1)

    def ran() -> None:
        nonlocal done
        done += 1
        progress(min(done / total, 1.0))

    def attempt(tried: Tried) -> Tried:
        try:
            found = _trial(way_named(tried.name), data, held, num_rows, settings, rule, pairs, tiers, store, ran)
        except InputError as error:  # batches in another order may need more rows at a time
            return dataclasses.replace(tried, foretold=0.0, basis=error.message)
        return dataclasses.replace(tried, comparison=found)

    for at, each in enumerate(tried):
        if each in candidates:
            tried[at] = attempt(each)
        say(f"{each.name}: {'kept' if tried[at].pays else 'declined'}: {tried[at].reason}")
    best = max((each for each in tried if each.pays), key=_speed, default=None)
    if best is None:
        return Choice(Way(), tuple(tried))
    for other in sorted((each for each in tried if each.pays and each is not best), key=_speed, reverse=True):
        joined = _joined(best, other)
        if joined is None:
            continue
        both = attempt(Tried(joined.name, best.foretold * other.foretold, "both foretold ones"))
        tried.append(both)
        say(f"{both.name}: {'kept' if both.pays and _speed(both) > _speed(best) else 'declined'}: {both.reason}")
        if both.pays and _speed(both) > _speed(best):
            best = both
        break
    return Choice(way_named(best.name), tuple(tried))


def _fitting(tried: Tried, most: int, num_rows: Mapping[str, int], settings: Settings, tiers: Tiering) -> Tried:
    """Return what cannot be tried, as its batches of up to so many rows may not fit the memory, as not worth it."""
    if not way_named(tried.name).reorders or tiers.suffices(sum(num_rows.values()), most, settings):
        return tried
    return dataclasses.replace(
        tried, foretold=0.0, basis=f"its batches may look up {most:,} rows, which --memory {tiers.memory} may not hold"
    )


def _speed(tried: Tried) -> float:
    return 0.0 if tried.comparison is None else tried.comparison.ratio.mean


def _joined(one: Tried, other: Tried) -> Way | None:
    """Return the way with the methods of both, if they go together."""
    kinds = [METHODS[name][0] for name in (*one.name.split("+"), *other.name.split("+"))]
    if len(set(kinds)) < len(kinds):
        return None
    return way_named(f"{one.name}+{other.name}")


def _draw(train: EncodedLog, settings: Settings, steps: int) -> tuple[Encoded, Encoded]:
    """Return samples to train on, and others to judge by: as many as the rest of the log has, up to some thousands."""
    stream = Batches(train, settings.batch_size, seed=settings.seed).epoch(0)
    data = Encoded.concat(list(islice(stream, steps)))
    rest = list(islice(stream, max(1, -(-_VALIDATED // settings.batch_size))))
    if not rest or len(np.unique(_labels(rest))) < 2:  # a log of a few batches
        cut = max(1, len(data) * 4 // 5)
        return data.take(np.arange(cut)), data.take(np.arange(cut, len(data)))
    return data, Encoded.concat(rest)


def _labels(batches: Sequence[Encoded]) -> NDArray[np.float32]:
    return np.concatenate([batch.label for batch in batches if batch.label is not None])


def _cut(data: Encoded, size: int) -> Iterator[Encoded]:
    for start in range(0, len(data), size):
        yield data.take(np.arange(start, min(start + size, len(data))))


# -- what is foretold


def _foretold(
    data: Encoded,
    num_rows: Mapping[str, int],
    settings: Settings,
    tiers: Tiering | None,
    store: Path | None,
    times: float,
) -> Iterator[Tried]:
    """Foretell each method: how many times faster a step would be, at most.

    `times` is how many times as long as these samples the run is.
    """
    batches = list(_cut(data, settings.batch_size))
    rows = np.concatenate([ids for ids, _ in ids_of(batches, num_rows)])
    edges = None if data.offsets is None else data.offsets[:: len(num_rows)]
    counts = np.bincount(rows, minlength=sum(num_rows.values()))
    compute = step_seconds(num_rows, batches[:_TIMED], settings)
    base: Foretold | None = None
    if tiers is None:
        everything = "all rows are in memory: nothing has to be waited for"
        yield Tried("hot-rows", 1.0, everything)
        yield Tried("split-batches", 1.0, everything)
    else:
        assert store is not None
        room = tiers.room(len(counts), settings)
        base = foretell(batches, num_rows, settings, tiers, room, store)
        slots = max(min(room.slots, len(counts)), 1)
        hot = hot_rows(counts, list(num_rows.values()), slots, row_bytes=record_bytes(settings))
        is_hot = flags_of(rows, _NONE if edges is None else edges, len(num_rows), hot.mask())
        yield _hot_foretold(base, data, is_hot, num_rows, settings, tiers, room)
        yield _split_foretold(base, compute, tiers)
    yield from _skip_foretold(batches, num_rows, settings, rows, edges, counts, times, compute, base)


def _hot_foretold(
    base: Foretold,
    data: Encoded,
    is_hot: NDArray[np.bool_],
    num_rows: Mapping[str, int],
    settings: Settings,
    tiers: Tiering,
    room: Room,
) -> Tried:
    """Foretell the same samples in phases, by counting what would move."""
    schedule = schedule_for(room, sum(num_rows.values()), tiers.rule(), tiers.ahead)
    batches = _in_phases(data, is_hot, settings.batch_size)
    try:
        moved = replay(ids_of(batches, num_rows), schedule, queue_bytes=room.queue_bytes)
    except InputError as error:
        return Tried("hot-rows", 0.0, error.message)
    ordered = dataclasses.replace(base, moved=moved).seconds
    share = _share(moved.missed, base.moved.missed)
    return Tried(
        "hot-rows", base.seconds / ordered, f"{is_hot.mean():.0%} of the samples are all hot, rows moved {share}"
    )


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2f} times those of shuffled ones" if whole else "none either way"


def _in_phases(data: Encoded, is_hot: NDArray[np.bool_], size: int) -> Iterator[Encoded]:
    """Yield batches as `HotRows` would give them."""
    numbers = {"hot": np.flatnonzero(is_hot), "cold": np.flatnonzero(~is_hot)}
    total: Any = {kind: -(-len(each) // size) for kind, each in numbers.items()}
    place = Place(0)
    while (span := place.next(total, 50)) is not None:
        kind, start, stop = span
        for at in range(start, stop):
            yield data.take(numbers[kind][at * size : (at + 1) * size])


def _split_foretold(base: Foretold, compute: float, tiers: Tiering) -> Tried:
    """Foretell the best that splitting could do: half of each batch popular, and no cost of a second part."""
    gather = max(dataclasses.replace(base, overlap=False).seconds - compute, 0.0)
    best = split_pays(compute=compute, gather=gather, popular=0.5)
    whole, how = (best.prefetch, "read ahead") if tiers.ahead else (best.base, "on demand")
    basis = f"{1e3 * best.split:.2f} ms split at best, {1e3 * whole:.2f} ms whole and {how}"
    return Tried("split-batches", whole / best.split if best.split else 1.0, basis)


def _skip_foretold(
    batches: Sequence[Encoded],
    num_rows: Mapping[str, int],
    settings: Settings,
    rows: NDArray[np.int64],
    edges: NDArray[np.int64] | None,
    counts: NDArray[np.int64],
    times: float,
    compute: float,
    base: Foretold | None,
) -> Iterator[Tried]:
    """Foretell what skipping could save if every row stood still once it may be stale."""
    visits = counts * times
    late = float(np.maximum(visits - _WARM_UP, 0).sum() / max(visits.sum(), 1.0))
    frozen = _frozen_seconds(num_rows, batches[:_TIMED], settings)
    step = compute if base is None else base.seconds
    saved = max(compute - frozen, 0.0) * late * min(step / compute, 1.0) if compute else 0.0
    basis = (
        f"{late:.0%} of the lookups are of rows that were looked up {_WARM_UP} times before; without updates a step "
        f"takes {1e3 * frozen:.2f} of {1e3 * compute:.2f} ms"
    )
    yield Tried("skip-rows", step / max(step - saved, 1e-9), basis)
    warm = (visits > _WARM_UP).astype(np.uint8)
    share = _mostly_flagged(rows, edges, len(num_rows), warm) * (1 - _WARM_UP / max(visits.max(), _WARM_UP))
    basis = f"{share:.0%} of the samples look up {_SHARE:.0%} such rows or more"
    yield Tried("skip-inputs", 1 / (1 - min(share, _TARGET / _SHARE)), basis)


def _mostly_flagged(
    rows: NDArray[np.int64], edges: NDArray[np.int64] | None, width: int, flags: NDArray[np.uint8]
) -> float:
    from vitalfew.embeddings.staleness import skippable_inputs

    # One bag per sample: its lookups are what is asked for.
    some = skippable_inputs(rows, edges, width if edges is None else 1, flags.view(np.bool_), _SHARE)
    return float(some.mean()) if len(some) else 0.0


def _frozen_seconds(num_rows: Mapping[str, int], batches: Sequence[Encoded], settings: Settings) -> float:
    """Return the median seconds of a step in which no row is updated."""
    most = 200_000
    cut = {name: min(size, most) for name, size in num_rows.items()}
    model, optimizers = build_arm(cut, batches[0].dense.shape[1], settings, plain=False)
    assert isinstance(model.tables, EmbeddingBags)
    model.tables.rows.frozen = np.ones(model.tables.num_rows, np.uint8)
    limit, seconds = np.array(list(cut.values())), []
    for turn, batch in enumerate(batches):
        if batch.offsets is None:
            ids = batch.ids % limit
        else:
            feature = np.arange(len(batch.offsets) - 1) % len(limit)
            ids = batch.ids % np.repeat(limit[feature], np.diff(batch.offsets))
        start = time.perf_counter()
        train_step(model, optimizers, dataclasses.replace(batch, ids=ids))
        if turn >= min(2, len(batches) - 1):
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


# -- what is tried


def _trial(
    way: Way,
    data: Encoded,
    held: Encoded,
    num_rows: Mapping[str, int],
    settings: Settings,
    rule: Rule,
    pairs: int,
    tiers: Tiering | None,
    store: Path | None,
    ran: Callable[[], None],
) -> Comparison:
    """Train with and without, in pairs on the same samples."""

    def arm(mine: Way) -> Arm:
        def run(seed: int) -> Generator[None, None, Outcome]:
            with _beside(store) as folder:
                found = yield from run_way(
                    mine, data, held, num_rows, settings, seed=seed, tiers=tiers, store=folder / "rows"
                )
            ran()
            return Outcome(found.seconds, found.metrics.auc, float(found.samples))

        return run

    return compare(
        arm(Way()), arm(way), at=rule.at, tolerance=rule.tolerance, min_saving=rule.min_saving,
        confidence=rule.confidence, pairs=pairs, metric="AUC",
    )  # fmt: skip


@contextmanager
def _beside(store: Path | None) -> Iterator[Path]:
    """Give a folder on the disk of the store, and remove it."""
    if store is None:
        folder = Path(tempfile.mkdtemp(prefix=".vitalfew-trial.", suffix=".part"))
    else:
        where = next(each for each in store.absolute().parents if each.is_dir())
        folder = where / f".{store.name}.auto.part"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
