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

import torch

from vitalfew.core import InputError, Line, Prediction
from vitalfew.data.batches import Batches
from vitalfew.embeddings.account import training_lines
from vitalfew.embeddings.ahead import Prefetch
from vitalfew.embeddings.checkpoint import about_weights, load_weights, save_checkpoint, save_model
from vitalfew.embeddings.fitting import evaluate, stream, train_step
from vitalfew.embeddings.foretell import foretell
from vitalfew.embeddings.models import DLRM
from vitalfew.embeddings.options import Progress, Say
from vitalfew.embeddings.preparing import Job
from vitalfew.embeddings.settings import Settings, build, dense_optimizer
from vitalfew.embeddings.tiered import TieredEmbeddings
from vitalfew.embeddings.tiering import Tiering
from vitalfew.meter import Scope, scope
from vitalfew.tiers._commits import COMMIT
from vitalfew.tiers.replay import Replayed

__all__ = ["open_model", "train_tiered"]

_FORETOLD_STEPS = 20_000
"""A longer run is foretold by its first steps."""


class _Keeper:
    """Saves a run and finds it again: one commit, and the dense checkpoint that it names."""

    def __init__(self, out: Path, store: Path, run: str, model: DLRM, optimizer: torch.optim.Optimizer) -> None:
        self._out, self._store, self._run = out, store, run
        self.model, self.optimizer, self.tables = model, optimizer, _tables_of(model)

    def restore(self) -> int | None:
        """Fill the model from the last commit, and return its step; whatever was written after it is removed."""
        note = self.tables.note
        if note:
            _check_owner(self.tables, self._store, self._run)
        named = note.get("dense")
        for found in self._out.glob("checkpoint-*"):
            if found.name != named:
                shutil.rmtree(found)
        if named is None:
            return None
        load_weights(self._out / named, self.model, self.optimizer)
        return int(note["step"])

    def save(self, step: int) -> None:
        """Write the dense part, then commit the rows."""
        name = f"checkpoint-{step:09d}"
        if self.tables.note.get("dense") == name:
            return
        save_checkpoint(self._out, self.model, self.optimizer, step, {"step": step})
        self.commit(name, step)
        for older in self._out.glob("checkpoint-*"):
            if older.name != name:
                shutil.rmtree(older)

    def commit(self, name: str | None, step: int) -> None:
        self.tables.commit(note := {"run": self._run, "step": step, "dense": name})
        self.tables.note = note


def _tables_of(model: DLRM) -> TieredEmbeddings:
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
    batches = Batches(job.train, settings.batch_size, seed=settings.seed)
    total = len(batches) * settings.epochs
    resume = (store / COMMIT).exists()
    model = build(job.num_rows, job.train.num_dense, settings, tiers=tiers, store=store, resume=resume)
    with _tables_of(model) as tables:
        keeper = _Keeper(job.out, store, job.run, model, dense_optimizer(model, settings))
        done = keeper.restore()
        if done is None:
            keeper.commit(None, 0)  # from here on the folder is this run's
        else:
            job.notes.append(f"resumed at step {done:,} of {total:,}; times and moves count the last sitting only")
        if tables.room.slots >= tables.num_rows:
            fits = f"all {tables.num_rows:,} rows fit in --memory {tiers.memory}: it was not needed"
            job.notes.append(fits)
            say(fits)
        training, account, predictions = _fit(job, keeper, batches, (done or 0, total), every, progress)
        metrics = evaluate(
            model, job.test, progress=lambda share: progress("test", share), batch_rows=settings.batch_size
        )
        lines = [*training_lines(training, metrics), *account]
        about = {
            "lines": [dataclasses.asdict(line) for line in lines],
            "predictions": [dataclasses.asdict(each) for each in predictions],
            "notes": job.notes,
            "step": total,
        }
        save_model(job.out / "model", model, about)


def _fit(
    job: Job, keeper: _Keeper, batches: Batches, span: tuple[int, int], every: float, progress: Progress
) -> tuple[Scope, tuple[Line, ...], tuple[Prediction, ...]]:
    """Train to the last step and commit; return the account, and what was foretold of it."""
    (first, total), tables, tiers = span, keeper.tables, job.tiers
    assert tiers is not None
    progress("foretell", 0.0)
    foretold = foretell(
        stream(batches, first, min(total, first + _FORETOLD_STEPS)), job.num_rows, job.settings, tiers, tables.room,
        tiers.folder(job.out), below=tables.store.residency.where < -1,
    )  # fmt: skip
    progress("foretell", 1.0)
    done, saving = first, 0.0
    start = last = time.monotonic()
    with scope("train") as training:
        with Prefetch(tables, stream(batches, first, total)) as ahead:
            for batch in ahead:
                train_step(keeper.model, [keeper.optimizer], batch)
                done += 1
                training.count("rows", len(batch), "rows")
                progress("train", done / total)
                if done < total and time.monotonic() - last >= every:
                    before = time.monotonic()
                    keeper.save(done)
                    last = time.monotonic()
                    saving += last - before
        seconds = time.monotonic() - start - saving
        keeper.save(done)
    steps, moves = done - first, tables.moves
    moved = Replayed(steps, moves.needed, moves.missed, moves.fresh, moves.left)
    return training, ahead.receipt().lines, foretold.against(moved, seconds / steps) if steps else ()


def open_model(
    out: Path, num_rows: Mapping[str, int], num_dense: int, settings: Settings, tiers: Tiering, run: str
) -> DLRM:
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
