"""The jobs of the command line: train on a log so that a kill costs little, predict with the result."""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitalfew.core import Declined, InputError, Line, Prediction, Receipt, Rule
from vitalfew.core.files import atomic_write, read_document, write_document
from vitalfew.data.encode import Encoder
from vitalfew.data.encoded import Encoded
from vitalfew.data.histories import Histories
from vitalfew.data.readers import open_log
from vitalfew.embeddings.account import gather, make_receipt, no_comparison, training_lines
from vitalfew.embeddings.checkpoint import about_weights, load_newest, load_weights, save_checkpoint, save_model
from vitalfew.embeddings.course import check_way, course_of
from vitalfew.embeddings.fitting import evaluate, predict
from vitalfew.embeddings.models import TBSM, ClickModel
from vitalfew.embeddings.options import LogOptions, Progress, Say, hush, silent
from vitalfew.embeddings.preparing import Job, alone, fresh_folder, log_files, prepare, reopen
from vitalfew.embeddings.settings import Settings, build, dense_optimizer
from vitalfew.embeddings.tiered import TieredEmbeddings
from vitalfew.embeddings.tiered_job import check_batches, open_model, train_tiered
from vitalfew.embeddings.tiering import Tiering
from vitalfew.embeddings.way import way_named
from vitalfew.meter import Scope, scope

__all__ = ["load_model", "predict_log", "resume_log", "train_log"]

_VERSION = 3
_BEGUN = ".run.json.*.part"
"""All that a run leaves which is killed as it begins."""
_UPGRADES = {
    1: lambda about: {**about, "tiers": None, "run": ""},
    2: lambda about: {**about, "method": "fused"},
}


def train_log(
    path: str | list[str],
    options: LogOptions,
    settings: Settings,
    out: str | os.PathLike[str],
    *,
    pairs: int = 3,
    trial_steps: int = 40,
    tolerance: float = 0.001,
    checkpoint_seconds: float = 60.0,
    tiers: Tiering | None = None,
    method: str = "fused",
    command: str = "",
    progress: Progress = silent,
    say: Say = hush,
) -> Receipt:
    """Train a model on a log, evaluate it on the held-back rows, and save model and receipt.

    A run that is cut off goes on by `resume_log`, to the same bits as one that was not.

    Parameters
    ----------
    path
        The log: a file, a folder or several files.
    out
        A new folder. An error in the log leaves none.
    pairs, trial_steps
        Afterwards, both ways train this many times for this many steps, in turns: that is the receipt's comparison.
        With ``pairs=0`` there is none and the verdict is `undecided`.
    tolerance
        How much AUC may fall.
    checkpoint_seconds
        Between checkpoints.
    tiers
        Memory for the rows, and a folder for those that it does not take: the tables may be many times larger.
    method
        ``fused``, or what acts on the batches, such as ``skip-rows`` or ``hot-rows+skip-rows``; see `way_named`.
        ``auto`` tries what may pay in short paired trials, and keeps what does.
    say
        Is told what is worth a line.
    """
    folder = Path(out)
    _check(pairs, trial_steps, tolerance, checkpoint_seconds)
    if (folder / "run.json").exists():
        raise InputError(f"{out} holds a run already", hint="go on with it by --resume, or choose another --out")
    if folder.exists() and not (folder.is_dir() and all(each.match(_BEGUN) for each in folder.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder", hint="choose another --out")
    if settings.history and (tiers is not None or method != "fused"):
        what = "--memory" if tiers is not None else f"--method {method}"
        raise InputError(f"{settings.model} trains with fused rows in memory, got {what}", hint=f"leave {what} out")
    if method != "auto":
        check_way(way_named(method), tiers)
    if tiers is not None:
        tiers = tiers.claim(folder)
    about = {
        "path": path,
        "folder": os.getcwd(),
        "options": dataclasses.asdict(options),
        "settings": settings.to_dict(),
        "tiers": None if tiers is None else tiers.to_dict(),
        "run": secrets.token_hex(8),
        "method": method,
        "comparison": {"pairs": pairs, "steps": trial_steps, "tolerance": tolerance},
        "threads": torch.get_num_threads(),
        "command": command,
    }
    with fresh_folder(folder), alone(folder):
        for part in folder.glob(_BEGUN):
            part.unlink()
        job = _prepare(folder, about, progress)
    with alone(folder):
        return _complete(job, about, checkpoint_seconds, progress, say)


def resume_log(
    out: str | os.PathLike[str], *, checkpoint_seconds: float = 60.0, progress: Progress = silent, say: Say = hush
) -> Receipt:
    """Go on with a run that was cut off, with its own log and settings, and return its receipt.

    It goes on where its newest checkpoint stands; without one it trains from the first step, and without its encoded
    log it encodes that again. Of a finished run only the receipt is read.

    Raises
    ------
    InputError
        If the folder holds no run, or the log has changed and is still needed.
    """
    folder = Path(out)
    _check(0, 1, 1.0, checkpoint_seconds)
    if not (folder / "run.json").exists():
        raise InputError(f"{out} holds no run to go on with", hint="leave --resume out to start one")
    with alone(folder):
        about = _read_run(folder)
        for part in folder.glob(".*.part"):
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        if (folder / "receipt.json").exists():
            _tidy(folder)
            return Receipt.load(folder / "receipt.json")
        job = _reopen(folder, about) or _prepare(folder, about, progress)
        return _complete(job, about, checkpoint_seconds, progress, say)


def _check(pairs: int, steps: int, tolerance: float, checkpoint_seconds: float) -> None:
    """Refuse now what would fail after hours."""
    if pairs < 0:
        raise InputError(f"pairs must not be negative, got {pairs}", hint="0 makes no comparison")
    if steps < 1:
        raise InputError(f"trial_steps must be at least 1, got {steps}", hint="40 is the default")
    if not checkpoint_seconds >= 0:
        raise InputError(f"checkpoint_seconds must not be negative, got {checkpoint_seconds}", hint="60 is the default")
    Rule("equal work", tolerance)


def _read_run(folder: Path) -> dict[str, Any]:
    return read_document(folder / "run.json", "run", _VERSION, _UPGRADES)


def _tiers_of(about: Mapping[str, Any]) -> Tiering | None:
    return None if about["tiers"] is None else Tiering(**about["tiers"])


def _asked(about: Mapping[str, Any]) -> tuple[Any, LogOptions, Settings]:
    return _path(about), LogOptions.from_dict(about["options"]), Settings.from_dict(about["settings"])


def _path(about: Mapping[str, Any]) -> Any:
    """Return the path of the log as it was given, or where that is seen from another folder."""
    path, folder = about["path"], about["folder"]
    if folder == os.getcwd():
        return path
    return os.path.join(folder, path) if isinstance(path, str) else [os.path.join(folder, each) for each in path]


def _prepare(folder: Path, about: dict[str, Any], progress: Progress) -> Job:
    """Encode the log, which must be as it was when the run began, and note in run.json what came of it."""
    files = log_files(_path(about))
    for was, now in zip(about.setdefault("files", files), files, strict=False):
        if was != now:
            raise InputError(f"`{now[0]}` has changed since the run began", hint="start another run with a new --out")
    if len(about["files"]) != len(files):
        raise InputError("the log has lost or gained files since the run began", hint="start another with a new --out")
    write_document(folder / "run.json", "run", _VERSION, about)
    compared, tiers = about["comparison"]["pairs"] > 0, _tiers_of(about)
    job = prepare(*_asked(about), folder, progress, compared=compared, tiers=tiers)
    job.tiers, job.run = tiers, about["run"]
    if about["method"] != "auto":  # which tries nothing that may not fit
        check_batches(job, way_named(about["method"]))
    about["notes"] = list(job.notes)
    write_document(folder / "run.json", "run", _VERSION, about)
    return job


def _reopen(folder: Path, about: Mapping[str, Any]) -> Job | None:
    job = reopen(*_asked(about), folder, about["notes"]) if "notes" in about else None
    if job is not None:
        job.tiers, job.run = _tiers_of(about), about["run"]
    return job


def _complete(job: Job, about: dict[str, Any], every: float, progress: Progress, say: Say) -> Receipt:
    """Train, compare, save the receipt: each part is skipped that an earlier sitting has done."""
    asked = about["comparison"]
    with _threads(about["threads"]):
        _choose(job, about, progress, say)
        lines, predictions = _trained(job, every, progress, say)
        evidence, why = None, no_comparison(job)
        if asked["pairs"] and why is None:
            rule = Rule("equal work", asked["tolerance"])
            try:
                evidence = gather(job, rule, pairs=asked["pairs"], max_steps=asked["steps"], progress=progress)
            except InputError as error:  # other orders of the rows may need more memory at a time
                why = f"no paired run could be made: {error.message}"
        receipt = make_receipt(
            job, evidence, lines, predictions=predictions, why=why if asked["pairs"] else None, command=about["command"]
        )
    receipt.save(job.out / "receipt.json")
    _tidy(job.out)
    return receipt


def _choose(job: Job, about: dict[str, Any], progress: Progress, say: Say) -> None:
    """Settle which methods act, once for all sittings."""
    if about["method"] != "auto":
        job.way = way_named(about["method"])
        return
    if "choice" not in about:
        from vitalfew.embeddings.auto import choose_way

        store = None if job.tiers is None else job.tiers.folder(job.out)
        rule = Rule("equal work", about["comparison"]["tolerance"])
        choice = choose_way(
            job.train, job.num_rows, job.settings, rule, tiers=job.tiers, store=store,
            progress=lambda share: progress("try methods", share), say=say,
        )  # fmt: skip
        about["choice"] = {
            "way": choice.way.name,
            "declined": [dataclasses.asdict(each) for each in choice.declined],
            "lines": [dataclasses.asdict(each) for each in choice.lines],
        }
        write_document(job.out / "run.json", "run", _VERSION, about)
        say(f"training with: {choice.way.name}")
    found = about["choice"]
    job.way = way_named(found["way"])
    job.declined = tuple(Declined(**each) for each in found["declined"])
    job.lines = tuple(Line(**each) for each in found["lines"])


def _tidy(folder: Path) -> None:
    """Remove what only an unfinished run needs."""
    for old in (folder / "data", *folder.glob("checkpoint-*")):
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Use so many threads: sums of floats depend on them, and a resumed run must take as many as it had."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _trained(job: Job, every: float, progress: Progress, say: Say) -> tuple[list[Line], list[Prediction]]:
    """Train to the end and save the model, if that is still to do; return the account of it."""
    target = job.out / "model"
    if not target.exists():
        if job.tiers is not None:
            train_tiered(job, every, progress, say)
        else:
            model, training = _fit(job, every, progress)
            metrics = evaluate(model, job.test, progress=lambda share: progress("test", share))
            lines = [*training_lines(training, metrics), *job.method_lines]
            save_model(target, model, {"lines": [dataclasses.asdict(line) for line in lines], **job.about_methods})
    about = about_weights(target)
    job.notes[:] = about["notes"]
    job.declined += tuple(Declined(**each) for each in about.get("declined", ()))
    return [Line(**line) for line in about["lines"]], [Prediction(**each) for each in about.get("predictions", ())]


def _fit(job: Job, every: float, progress: Progress) -> tuple[ClickModel, Scope]:
    """Train from the newest checkpoint, or from the start, to the end."""
    settings = job.settings
    model = build(job.num_rows, job.train.num_dense, settings)
    optimizer = dense_optimizer(model, settings)
    saved, damaged = load_newest(job.out, model, optimizer)
    job.notes += [f"{name} was damaged: the one before it was taken" for name in damaged]
    course = course_of(job, model, optimizer, saved)
    last = time.monotonic()
    with scope("train") as training:
        training.count("rows", 0, "rows")  # a sitting may have none left
        for rows in course:
            training.count("rows", rows, "rows")
            progress("train", course.samples / course.total)
            if course.samples < course.total and time.monotonic() - last >= every:
                save_checkpoint(
                    job.out, model, optimizer, course.steps, {"step": course.steps}, course.state_dict()
                )  # fmt: skip
                last = time.monotonic()
    job.receipts.update(course.receipts)
    return model, training


def load_model(folder: str | os.PathLike[str]) -> tuple[ClickModel, Encoder, dict[str, Any]]:
    """Return model, encoder and description of a trained run, for predictions.

    The rows of a run with `tiers` are read where they are: nothing is copied, and ``model.tables.close()`` lets go of
    their folder. Otherwise the model comes without optimizer state.
    """
    out = Path(folder)
    if not (out / "model").is_dir():
        unfinished = (out / "run.json").exists()
        hint = "finish it with --resume" if unfinished else "name the folder that `vitalfew train` wrote"
        raise InputError(f"{folder} holds no trained model", hint=hint)
    about = _read_run(out)
    encoder = Encoder.load(out / "encoder")
    settings, tiers, num_dense = Settings.from_dict(about["settings"]), _tiers_of(about), len(encoder.schema.numeric)
    if tiers is not None:
        return open_model(out, encoder.num_rows, num_dense, settings, tiers, about["run"]), encoder, about
    model = build(encoder.num_rows, num_dense, dataclasses.replace(settings, optimizer="sgd"))
    load_weights(out / "model", model)
    return model, encoder, about


def predict_log(
    folder: str | os.PathLike[str],
    path: str | list[str],
    out: str | os.PathLike[str],
    *,
    log_format: str | None = None,
    bad_rows: str = "error",
    progress: Progress = silent,
) -> int:
    """Score the rows of a log with a finished run; write one column `score`, a probability per row, in order.

    Parameters
    ----------
    folder
        A finished run.
    path
        Needs the feature columns of the run, not the label. A model of histories takes those that stood at the end of
        the log it was trained on.
    out
        A ``.parquet`` or ``.csv`` file; appears whole or not at all.

    Returns
    -------
    int
        Rows scored.
    """
    target = Path(out)
    if target.suffix not in (".parquet", ".csv"):
        raise InputError(f"cannot write {target.suffix or 'a file without suffix'}", hint="name it .parquet or .csv")
    model, encoder, about = load_model(folder)
    with model.tables if isinstance(model.tables, TieredEmbeddings) else nullcontext():
        # As many rows at a time as training had room for.
        most = about["settings"]["batch_size"] if about["tiers"] else None
        histories = None
        if isinstance(model, TBSM):
            histories = Histories.load(Path(folder) / "encoder", encoder, about["options"]["by"], model.history)
            most = about["settings"]["batch_size"]
        return _predict(model, encoder, histories, path, target, log_format, bad_rows, most, progress)


def _predict(
    model: ClickModel,
    encoder: Encoder,
    histories: Histories | None,
    path: str | list[str],
    target: Path,
    log_format: str | None,
    bad_rows: str,
    most: int | None,
    progress: Progress,
) -> int:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    reader = open_log(path, format=log_format, bad_rows=bad_rows)  # type: ignore[arg-type]
    if target.resolve() in [Path(str(file)) for file, *_ in log_files(path)]:
        raise InputError(f"the scores would take the place of the log {target}", hint="choose another --out")
    shape = pa.schema([("score", pa.float32())])
    rows = 0
    with nullcontext() if target.parent.exists() else fresh_folder(target.parent), atomic_write(target) as file:
        kind = pyarrow.parquet.ParquetWriter if target.suffix == ".parquet" else pyarrow.csv.CSVWriter
        with kind(file, shape) as writer:
            for batch in encoder.batches(reader, labels=False, progress=lambda share: progress("predict", share)):
                encoded = encoder.encode(batch, labels=False, first_row=rows)
                parts = [encoded] if most is None else _cut(encoded, most)
                if histories is not None:
                    parts = map(histories.widen, parts)
                scores = torch.sigmoid(torch.from_numpy(predict(model, parts))).numpy()
                writer.write_batch(pa.record_batch([pa.array(scores)], schema=shape))
                rows += len(encoded)
    return rows


def _cut(rows: Encoded, most: int) -> Iterator[Encoded]:
    for start in range(0, len(rows), most):
        yield rows.take(np.arange(start, min(start + most, len(rows))))
