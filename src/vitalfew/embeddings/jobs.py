"""The jobs of the command line: prepare a log, train on it so that a kill costs little, predict with the result."""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vitalfew.core import Curve, InputError, Line, Prediction, Receipt, Rule, profile
from vitalfew.core.files import atomic_folder, atomic_write, read_document, write_document
from vitalfew.data import Schema, infer_schema
from vitalfew.data.batches import Batches
from vitalfew.data.encode import Encoder
from vitalfew.data.log import EncodedLog, write_log
from vitalfew.data.readers import LogReader, open_log
from vitalfew.data.split import time_cutoff
from vitalfew.embeddings.checkpoint import load_weights, newest_checkpoint, save_checkpoint, save_model
from vitalfew.embeddings.fitting import predict, train_step
from vitalfew.embeddings.metrics import BinaryMetrics, binary_metrics
from vitalfew.embeddings.payoff import Payoff, predict_payoff
from vitalfew.embeddings.peak import peak_memory
from vitalfew.embeddings.settings import Settings, build, dense_optimizer
from vitalfew.embeddings.trial import Trial, paired_trial
from vitalfew.meter import Figure, Scope, machine, scope

__all__ = ["LogOptions", "Progress", "curves", "load_model", "open_with", "predict_log", "train_log"]

Progress = Callable[[str, float], None]
"""Called with the stage and its share done."""

_VERSION = 1


@dataclass(frozen=True, slots=True)
class LogOptions:
    """How to read a log, and what its columns are for.

    Attributes
    ----------
    label, time
        Columns; without `time` the test slice is drawn at random.
    numeric, categorical, lists, ignore
        Columns whose kind is not left to inference.
    crosses
        Tuples of categorical columns whose combinations are features too.
    hash_rows, direct, min_count
        As for `Encoder.fit`.
    test_share
        Of the rows, the later ones where there is a time.
    format, bad_rows
        As for `open_log`.
    """

    label: str
    time: str | None = None
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    crosses: tuple[tuple[str, ...], ...] = ()
    hash_rows: int | None = None
    direct: tuple[str, ...] = ()
    min_count: int = 1
    test_share: float = 0.2
    format: str | None = None
    bad_rows: str = "error"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LogOptions:
        """Build from plain lists and values."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        plain["crosses"] = tuple(tuple(cross) for cross in values.get("crosses", ()))
        return cls(**plain)


def open_with(path: str | Sequence[str], options: LogOptions) -> tuple[LogReader, Schema]:
    """Open a log and settle what its columns are for."""
    reader = open_log(path, format=options.format, bad_rows=options.bad_rows)  # type: ignore[arg-type]
    schema = infer_schema(
        reader,
        label=options.label,
        time=options.time,
        numeric=options.numeric or None,
        categorical=options.categorical or None,
        lists=options.lists or None,
        ignore=options.ignore or None,
        crosses=options.crosses,
    )
    return reader, schema


def curves(encoder: Encoder) -> tuple[Curve, ...]:
    """Return the coverage curve of each feature with a vocabulary, the most skewed first."""
    found = []
    for name, counts in encoder.counts.items():
        seen = counts[counts > 0].astype(float)
        if len(seen) > 1:
            known = dataclasses.replace(profile([]), name=name, counts=seen, total=float(seen.sum()))
            found.append((known.skew(), Curve(name, tuple(known.curve()), len(seen))))
    return tuple(curve for _, curve in sorted(found, key=lambda item: (-item[0], item[1].name)))


@dataclass(slots=True)
class _Run:
    """A training run and its folder."""

    out: Path
    encoder: Encoder
    train: EncodedLog
    test: EncodedLog
    settings: Settings
    options: LogOptions
    path: str | list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def num_rows(self) -> dict[str, int]:
        return self.encoder.num_rows


def _silent(stage: str, share: float) -> None:
    del stage, share


def _check_memory(num_rows: Mapping[str, int], settings: Settings) -> None:
    import psutil

    rule, dim = settings.rule(), settings.dim
    width = (4 if settings.storage == "float32" else 2) * dim + rule.state_bytes(dim)
    need = sum(num_rows.values()) * width
    free = psutil.virtual_memory().available
    if need > free:
        big = max(num_rows, key=lambda name: num_rows[name])
        raise InputError(
            f"the tables need {need / 2**30:.1f} GiB ({sum(num_rows.values()):,} rows x {width} B, the most for "
            f"`{big}`), {free / 2**30:.1f} GiB are free",
            hint="use --hash-rows, --min-count, a smaller --dim or --optimizer rowwise_adagrad",
        )


def prepare(path: str | list[str], options: LogOptions, settings: Settings, out: Path, progress: Progress) -> _Run:
    """Learn the encoding of a log and write its rows as numbers below `out`."""
    reader, schema = open_with(path, options)
    cutoff, notes = None, []
    if schema.time is not None:
        cutoff, exact = time_cutoff(reader, schema.time, options.test_share, progress=lambda s: progress("split", s))
        if not exact:
            notes.append("the time of the split was estimated from a sample of the rows")
    encoder = Encoder.fit(
        reader,
        schema,
        hash_rows=options.hash_rows,
        direct=options.direct,
        min_count=options.min_count,
        seed=settings.seed,
        until=cutoff,
        test_share=None if cutoff is not None else options.test_share,
        progress=lambda s: progress("count ids", s),
    )
    _check_memory(encoder.num_rows, settings)
    shutil.rmtree(out / "data", ignore_errors=True)
    train, test = write_log(
        out / "data",
        reader,
        encoder,
        cutoff=cutoff,
        test_share=options.test_share,
        seed=settings.seed,
        progress=lambda s: progress("encode", s),
    )
    shutil.rmtree(out / "encoder", ignore_errors=True)
    with atomic_folder(out / "encoder") as part:
        encoder.save(part)
    if reader.num_bad_rows:
        notes.append(f"{reader.num_bad_rows:,} malformed rows were skipped")
    return _Run(out, encoder, train, test, settings, options, path, notes)


def _fit(run: _Run, every: float, progress: Progress) -> tuple[Any, Scope]:
    """Train from the newest checkpoint, or from the start, to the end."""
    settings = run.settings
    model = build(run.num_rows, run.train.num_dense, settings)
    optimizer = dense_optimizer(model, settings)
    batches = Batches(run.train, settings.batch_size, seed=settings.seed)
    total = len(batches) * settings.epochs
    done = 0
    found = newest_checkpoint(run.out)
    if found:
        saved = load_weights(found, model, optimizer)
        done = int(saved["step"])
        run.notes.append(f"resumed at step {done:,} of {total:,}; the times count the last sitting only")
    last = time.monotonic()
    with scope("train") as train:
        while done < total:
            epoch, first = divmod(done, len(batches))
            for batch in batches.epoch(epoch, first):
                train_step(model, [optimizer], batch)
                train.count("rows", len(batch), "rows")
                done += 1
                progress("train", done / total)
                if done < total and time.monotonic() - last >= every:
                    save_checkpoint(run.out, model, optimizer, done, {"step": done})
                    last = time.monotonic()
    return model, train


def load_model(folder: str | os.PathLike[str]) -> tuple[Any, Encoder, dict[str, Any]]:
    """Return model, encoder and description of a finished run."""
    out = Path(folder)
    if not (out / "model").is_dir():
        hint = (
            "finish it with --resume" if (out / "run.json").exists() else "name the folder that `vitalfew train` wrote"
        )
        raise InputError(f"{folder} holds no trained model", hint=hint)
    body = read_document(out / "run.json", "run", _VERSION)
    encoder = Encoder.load(out / "encoder")
    settings = Settings.from_dict(body["settings"])
    model = build(encoder.num_rows, len(encoder.schema.numeric), settings)
    load_weights(out / "model", model)
    return model, encoder, body


def train_log(
    path: str | list[str],
    options: LogOptions,
    settings: Settings,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    pairs: int = 3,
    trial_steps: int = 40,
    tolerance: float = 0.001,
    checkpoint_seconds: float = 60.0,
    command: str = "",
    progress: Progress = _silent,
) -> Receipt:
    """Train a DLRM on a log, evaluate it on the held-back rows, and save model and receipt.

    Parameters
    ----------
    path
        The log: a file, a folder or several files.
    out
        A new folder; with `resume`, the folder of a run that was cut off: it goes on where its newest checkpoint
        stands, to the same bits as a run that was not.
    pairs, trial_steps
        Afterwards, both ways train this many times for this many steps, in turns: that is the receipt's comparison.
        With ``pairs=0`` there is none and the verdict is `undecided`.
    tolerance
        How much AUC may fall.
    checkpoint_seconds
        Between checkpoints.
    """
    folder = Path(out)
    if resume:
        body = read_document(folder / "run.json", "run", _VERSION)
        if (folder / "model").exists():
            raise InputError(f"the run in {out} is finished", hint=f"see: vitalfew receipt show {out}/receipt.json")
        path, options = body["path"], LogOptions.from_dict(body["options"])
        settings = Settings.from_dict(body["settings"])
        torch.set_num_threads(body["threads"])
        run = _reopen(folder, path, options, settings, progress)
    else:
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{out} exists and is not empty", hint="choose another --out, or pass --resume")
        existed = folder.exists()
        try:
            run = prepare(path, options, settings, folder, progress)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            if existed:
                folder.mkdir()
            raise
        about = {
            "path": path,
            "options": dataclasses.asdict(options),
            "settings": settings.to_dict(),
            "threads": torch.get_num_threads(),
        }
        write_document(folder / "run.json", "run", _VERSION, about)
    model, training = _fit(run, checkpoint_seconds, progress)
    label = run.test.block(0, len(run.test)).label
    batches = Batches(run.test, 8192, shuffle=False)
    logits = predict(model, batches.epoch(0))
    metrics = binary_metrics(label if label is not None else [], logits)
    predictions, trial, peaks = None, None, None
    if pairs:
        predictions = predict_payoff(run.num_rows, run.encoder.counts, run.train.num_dense, settings)
        rule = Rule("equal work", tolerance)
        steps = min(trial_steps, len(Batches(run.train, settings.batch_size))) * 2 * pairs
        done = 0

        def stepped(count: int) -> None:
            nonlocal done
            done += count
            progress("compare", done / steps)

        trial = paired_trial(
            run.train, run.test, run.num_rows, settings, rule, pairs=pairs, max_steps=trial_steps, progress=stepped
        )
        peaks = tuple(peak_memory(run.train.folder, run.num_rows, settings, plain=p) for p in (True, False))
    receipt = make_receipt(
        run, training, metrics, trial, predictions, peaks, command, title=f"Training on {_name(run.path)}"
    )
    save_model(folder / "model", model)
    receipt.save(folder / "receipt.json")
    for old in (folder / "data", *folder.glob("checkpoint-*")):
        shutil.rmtree(old, ignore_errors=True)
    return receipt


def _name(path: str | list[str]) -> str:
    return Path(path if isinstance(path, str) else path[0]).name


def _reopen(folder: Path, path: str | list[str], options: LogOptions, settings: Settings, progress: Progress) -> _Run:
    if not ((folder / "data").is_dir() and (folder / "encoder").is_dir()):
        return prepare(path, options, settings, folder, progress)
    train, test = EncodedLog.open(folder / "data" / "train"), EncodedLog.open(folder / "data" / "test")
    return _Run(folder, Encoder.load(folder / "encoder"), train, test, settings, options, path)


def _line(figure: Figure, what: str) -> Line:
    return Line(what, figure.unit, None, figure.value, figure.how, figure.low, figure.high, figure.source)


def make_receipt(
    run: _Run,
    training: Scope | None,
    metrics: BinaryMetrics | None,
    trial: Trial | None,
    predicted: Payoff | None,
    peaks: tuple[int, ...] | None,
    command: str,
    *,
    title: str,
) -> Receipt:
    """Put together what was measured, counted and foretold."""
    lines: list[Line] = []
    if trial is not None:
        lines += trial.lines()
    if peaks is not None:
        note = "a process of its own, the first steps"
        lines.append(Line("peak memory", "B", float(peaks[0]), float(peaks[1]), "measured", note=note))
    if training is not None:
        lines += [_line(training["wall"], "whole run, time"), _line(training["rows"], "whole run, rows trained")]
        lines.append(_line(training["peak_rss"], "whole run, peak memory"))
        lines += [
            _line(figure, f"whole run, {figure.name.replace('_', ' ')}")
            for figure in training.figures()
            if figure.name.startswith("energy")
        ]
    if metrics is not None:
        note = f"{metrics.num_rows:,} held-back rows"
        lines += [
            Line("whole run, AUC", "", None, metrics.auc, "measured", note=note),
            Line("whole run, log loss", "nat", None, metrics.log_loss, "measured", note=note),
            Line("whole run, calibration", "", None, metrics.calibration, "measured", note="predicted / actual clicks"),
        ]
    foretold: tuple[Prediction, ...] = ()
    if trial is not None and predicted is not None:
        basis = "a few timed steps on ids drawn from the log's counts"
        foretold = (Prediction("training speed, factor", "x", predicted.ratio, trial.comparison.ratio.mean, basis),)
    slices = f"{len(run.train):,} rows to train, {len(run.test):,} to test"
    when = "the later ones" if run.encoder.schema.time else "drawn at random"
    return Receipt(
        title=title,
        method=f"fused row updates, {run.settings.optimizer}",
        lines=tuple(lines),
        verdict=trial.comparison.verdict if trial else "undecided",
        why=trial.comparison.why if trial else "no paired runs were made (--pairs 0)",
        rule=str(trial.comparison.rule) if trial else "",
        quality=trial.qualities() if trial else (),
        pairs=trial.comparison.pairs if trial else (),
        pairs_needed=trial.comparison.pairs_needed if trial else None,
        predictions=foretold,
        curves=curves(run.encoder),
        notes=(f"{slices} ({when})", *run.notes),
        environment={**machine(), "threads": torch.get_num_threads(), "settings": run.settings.to_dict()},
        command=command,
        made=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    )


def predict_log(
    folder: str | os.PathLike[str],
    path: str | list[str],
    out: str | os.PathLike[str],
    *,
    log_format: str | None = None,
    bad_rows: str = "error",
    progress: Progress = _silent,
) -> int:
    """Score the rows of a log with a finished run; write one column `score`, a probability per row, in order.

    Parameters
    ----------
    folder
        A finished run.
    path
        Needs the feature columns of the run, not the label.
    out
        A ``.parquet`` or ``.csv`` file; appears whole or not at all.

    Returns
    -------
    int
        Rows scored.
    """
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    target = Path(out)
    if target.suffix not in (".parquet", ".csv"):
        raise InputError(f"cannot write {target.suffix or 'a file without suffix'}", hint="name it .parquet or .csv")
    model, encoder, _ = load_model(folder)
    reader = open_log(path, format=log_format, bad_rows=bad_rows)  # type: ignore[arg-type]
    shape = pa.schema([("score", pa.float32())])
    rows = 0
    with atomic_write(target) as file:
        kind = pyarrow.parquet.ParquetWriter if target.suffix == ".parquet" else pyarrow.csv.CSVWriter
        with kind(file, shape) as writer:
            for batch in encoder.batches(reader, labels=False, progress=lambda share: progress("predict", share)):
                encoded = encoder.encode(batch, labels=False, first_row=rows)
                scores = torch.sigmoid(torch.from_numpy(predict(model, [encoded]))).numpy()
                writer.write_batch(pa.record_batch([pa.array(scores)], schema=shape))
                rows += len(encoded)
    return rows
