"""Train with rows over memory and disk, so that a kill at any moment costs little.

The rows and the other weights are saved in two places, and one document decides: the dense weights and their optimizer
are written first, as a folder that is whole or absent; then the store commits its rows with a note that names that
folder and the step. Until then the commit before it holds, with the folder that it names.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vitalfew.core import InputError, Line, Prediction
from vitalfew.data.batches import Batches
from vitalfew.embeddings.account import training_lines
from vitalfew.embeddings.ahead import Prefetch
from vitalfew.embeddings.checkpoint import about_weights, load_weights, save_checkpoint, save_model
from vitalfew.embeddings.course import Course, course_of
from vitalfew.embeddings.fitting import evaluate, stream
from vitalfew.embeddings.foretell import Foretold, foretell
from vitalfew.embeddings.models import ClickModel
from vitalfew.embeddings.options import Progress, Say
from vitalfew.embeddings.preparing import Job
from vitalfew.embeddings.settings import Settings, build, dense_optimizer
from vitalfew.embeddings.tiered import TieredEmbeddings
from vitalfew.embeddings.tiering import Tiering, most_rows
from vitalfew.embeddings.way import Way
from vitalfew.meter import Scope, scope
from vitalfew.tiers._commits import COMMIT
from vitalfew.tiers.replay import Replayed

__all__ = ["check_batches", "open_model", "train_tiered"]

_FORETOLD_STEPS = 20_000
"""A longer run is foretold by its first steps."""


class _Keeper:
    """Saves a run and finds it again: one commit, and the dense checkpoint that it names."""

    def __init__(self, out: Path, store: Path, run: str, model: ClickModel, optimizer: torch.optim.Optimizer) -> None:
        self._out, self._store, self._run = out, store, run
        self.model, self.optimizer, self.tables = model, optimizer, _tables_of(model)

    def restore(self) -> dict[str, Any] | None:
        """Fill the model from the last commit, and return where the run stood; what was written later is removed."""
        note = self.tables.note
        if note:
            _check_owner(self.tables, self._store, self._run)
        named = note.get("dense")
        for found in self._out.glob("checkpoint-*"):
            if found.name != named:
                shutil.rmtree(found)
        if named is None:
            return None
        return load_weights(self._out / named, self.model, self.optimizer)

    def save(self, course: Course) -> None:
        """Write the dense part, then commit the rows."""
        step = course.steps
        name = f"checkpoint-{step:09d}"
        if self.tables.note.get("dense") == name:
            return
        save_checkpoint(self._out, self.model, self.optimizer, step, {"step": step}, course.state_dict())
        self.commit(name, step)
        for older in self._out.glob("checkpoint-*"):
            if older.name != name:
                shutil.rmtree(older)

    def commit(self, name: str | None, step: int) -> None:
        self.tables.commit(note := {"run": self._run, "step": step, "dense": name})
        self.tables.note = note


def _tables_of(model: ClickModel) -> TieredEmbeddings:
    """Return the tables of a model that was built with tiers."""
    assert isinstance(model.tables, TieredEmbeddings)
    return model.tables


def _check_owner(tables: TieredEmbeddings, store: Path, run: str) -> None:
    if tables.note.get("run") != run:
        raise InputError(f"{store} holds the rows of another run", hint="put back the folder of this run")


def train_tiered(job: Job, every: float, progress: Progress, say: Say) -> None:
    """Train from the last commit, or from the start, to the end, and save the model with the account of it."""
    tiers, settings = job.tiers, job.settings
    assert tiers is not None
    store = tiers.folder(job.out)
    resume = (store / COMMIT).exists()
    model = build(
        job.num_rows, job.train.num_dense, settings, tiers=tiers, store=store, resume=resume, update=job.way.update
    )
    with _tables_of(model) as tables:
        keeper = _Keeper(job.out, store, job.run, model, dense_optimizer(model, settings))
        saved = keeper.restore()
        if saved is None:
            keeper.commit(None, 0)  # from here on the folder is this run's
        course = course_of(job, model, keeper.optimizer, saved)
        if tables.room.slots >= tables.num_rows:
            fits = f"all {tables.num_rows:,} rows fit in --memory {tiers.memory}: it was not needed"
            job.notes.append(fits)
            say(fits)
        training, account, predictions = _fit(job, keeper, course, every, progress)
        metrics = evaluate(
            model, job.test, progress=lambda share: progress("test", share), batch_rows=settings.batch_size
        )
        lines = [*training_lines(training, metrics), *account, *job.method_lines]
        about = {
            "lines": [dataclasses.asdict(line) for line in lines],
            "predictions": [dataclasses.asdict(each) for each in predictions],
            **job.about_methods,
            "step": course.steps,
        }
        save_model(job.out / "model", model, about)


def check_batches(job: Job, way: Way) -> None:
    """Refuse memory that may not hold the batches that methods make of other samples than those that were checked."""
    tiers = job.tiers
    if tiers is None or not way.reorders:
        return
    most = most_rows(job.train, job.num_rows, job.settings.batch_size)
    if not tiers.suffices(sum(job.num_rows.values()), most, job.settings):
        least = tiers.least(sum(job.num_rows.values()), most, job.settings)
        raise InputError(
            f"{way.name} makes batches of up to {most:,} rows, and --memory {tiers.memory} may not hold them",
            hint=f"--memory {least} is enough, or a smaller --batch-size",
        )


def _fit(
    job: Job, keeper: _Keeper, course: Course, every: float, progress: Progress
) -> tuple[Scope, tuple[Line, ...], tuple[Prediction, ...]]:
    """Train to the last step and commit; return the account, and what was foretold of it."""
    tables, first = keeper.tables, course.steps
    foretold = None if job.way.acts else _foretell(job, keeper, first, progress)
    saving = 0.0
    start = last = time.monotonic()
    with scope("train") as training:
        training.count("rows", 0, "rows")  # a sitting may have none left
        for rows in course:
            training.count("rows", rows, "rows")
            progress("train", course.samples / course.total)
            if course.samples < course.total and time.monotonic() - last >= every:
                before = time.monotonic()
                keeper.save(course)
                last = time.monotonic()
                saving += last - before
        seconds = time.monotonic() - start - saving
        keeper.save(course)
    job.receipts.update(course.receipts)
    steps, moves = course.steps - first, tables.moves
    moved = Replayed(steps, moves.needed, moves.missed, moves.fresh, moves.left)
    # That of split batches is among those of the methods.
    account = course.reader.receipt().lines if isinstance(course.reader, Prefetch) else ()
    return training, account, foretold.against(moved, seconds / steps) if foretold and steps else ()


def _foretell(job: Job, keeper: _Keeper, first: int, progress: Progress) -> Foretold:
    """Foretell the steps that are still to do, with the batches as they are."""
    tables, tiers, settings = keeper.tables, job.tiers, job.settings
    assert tiers is not None
    progress("foretell", 0.0)
    batches = Batches(job.train, settings.batch_size, seed=settings.seed)
    total = len(batches) * settings.epochs
    found = foretell(
        stream(batches, first, min(total, first + _FORETOLD_STEPS)), job.num_rows, settings, tiers, tables.room,
        tiers.folder(job.out), below=tables.store.residency.where < -1,
    )  # fmt: skip
    progress("foretell", 1.0)
    return found


def open_model(
    out: Path, num_rows: Mapping[str, int], num_dense: int, settings: Settings, tiers: Tiering, run: str
) -> ClickModel:
    """Open the rows of a finished run where they are, with its memory, and load the weights beside them."""
    store = tiers.folder(out)
    if not (store / COMMIT).exists():
        raise InputError(f"{store} holds no rows of this run", hint="put that folder back, or train again")
    model = build(num_rows, num_dense, settings, tiers=tiers, store=store, resume=True)
    tables = _tables_of(model)
    try:
        _check_owner(tables, store, run)
        step = about_weights(out / "model")["step"]
        if tables.note["step"] != step:
            raise InputError(
                f"{store} holds step {tables.note['step']:,} of the run, and the model is that of step {step:,}",
                hint="put back the folder that belongs to the model",
            )
        load_weights(out / "model", model)
    except BaseException:
        tables.close()
        raise
    return model
