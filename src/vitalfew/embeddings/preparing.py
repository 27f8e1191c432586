"""Turn a log into what training reads, in the folder of a run."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitalfew.core import Declined, InputError, Line, Receipt
from vitalfew.core.files import atomic_folder
from vitalfew.data import LogReader, Schema
from vitalfew.data.batches import Batches
from vitalfew.data.encode import Encoder
from vitalfew.data.histories import Histories
from vitalfew.data.log import EncodedLog, write_log
from vitalfew.data.split import time_cutoff
from vitalfew.embeddings.options import LogOptions, Progress, open_with
from vitalfew.embeddings.settings import Settings
from vitalfew.embeddings.tiering import Tiering, free_memory
from vitalfew.embeddings.way import Way

__all__ = [
    "Job",
    "alone",
    "check_memory",
    "fit_encoder",
    "fresh_folder",
    "log_files",
    "plain_bytes",
    "prepare",
    "reopen",
]

LogPath = str | list[str]


@dataclass(slots=True)
class Job:
    """A log made ready to train on, and the folder it is in.

    Attributes
    ----------
    tiers, run
        Where rows are that memory does not take, and the mark of this run in their folder.
    way, declined, lines
        The methods that act, those that were looked at and left, and what the first have saved in trials.
    receipts
        Of the methods that acted, once the run is over.
    """

    out: Path
    encoder: Encoder
    train: EncodedLog
    test: EncodedLog
    settings: Settings
    options: LogOptions
    path: LogPath
    notes: list[str] = field(default_factory=list)
    tiers: Tiering | None = None
    run: str = ""
    way: Way = field(default_factory=Way)
    declined: tuple[Declined, ...] = ()
    lines: tuple[Line, ...] = ()
    receipts: dict[str, Receipt] = field(default_factory=dict)

    @property
    def method_lines(self) -> list[Line]:
        """What the methods say of the run."""
        return [line for each in self.receipts.values() for line in each.lines]

    @property
    def about_methods(self) -> dict[str, Any]:
        """What is to be kept beside a model until there is a receipt."""
        declined = [dataclasses.asdict(left) for each in self.receipts.values() for left in each.declined]
        return {"notes": self.notes, "declined": declined}

    @property
    def num_rows(self) -> dict[str, int]:
        """The rows of each feature's table."""
        return self.encoder.num_rows


def prepare(
    path: LogPath,
    options: LogOptions,
    settings: Settings,
    out: Path,
    progress: Progress,
    *,
    compared: bool = False,
    tiers: Tiering | None = None,
    checked: bool = True,
) -> Job:
    """Learn the encoding of a log and write its rows as numbers below `out`.

    Parameters
    ----------
    compared
        Whether the plain way will be trained too: there must be memory for both.
    tiers
        Memory for the rows, where they may be more than it takes; there must be enough for those of a batch.
    checked
        False asks for no memory: the log is only looked at.
    """
    reader, schema = open_with(path, options)
    cutoff, notes = None, []
    if schema.time is not None:
        cutoff, exact = time_cutoff(reader, schema.time, options.test_share, progress=lambda s: progress("split", s))
        if not exact:
            notes.append("the time of the split was estimated from a sample of the rows")
    share = None if cutoff is not None else options.test_share
    encoder = fit_encoder(reader, schema, options, settings.seed, progress, until=cutoff, test_share=share)
    histories = histories_of(encoder, options, settings)
    if checked and tiers is not None:
        tiers.check(encoder.num_rows, settings)
    elif checked:
        check_memory(encoder.num_rows, settings, compared=compared)
    for name in ("data", "encoder"):
        shutil.rmtree(out / name, ignore_errors=True)
    train, test = write_log(
        out / "data",
        reader,
        encoder,
        cutoff=cutoff,
        test_share=options.test_share,
        seed=settings.seed,
        histories=histories,
        progress=lambda s: progress("encode", s),
    )
    if checked and tiers is not None:
        batches = Batches(train, settings.batch_size, seed=settings.seed)
        run = (batch for epoch in range(settings.epochs) for batch in batches.epoch(epoch))
        tiers.check_batches(encoder.num_rows, settings, run, jagged=train.is_jagged)
    with atomic_folder(out / "encoder") as part:
        encoder.save(part)
        if histories is not None:
            histories.save(part)
    if reader.num_bad_rows:
        notes.append(f"{reader.num_bad_rows:,} malformed rows were skipped")
    return Job(out, encoder, train, test, settings, options, path, notes)


def histories_of(encoder: Encoder, options: LogOptions, settings: Settings) -> Histories | None:
    """Return what gives rows their histories, where the model reads them."""
    if not settings.history:
        return None
    if options.by is None:
        raise InputError("tbsm reads histories of users, and no column names these", hint="name it with --by")
    return Histories(encoder, options.by, settings.history)


def fit_encoder(
    reader: LogReader, schema: Schema, options: LogOptions, seed: int, progress: Progress, **split: Any
) -> Encoder:
    """Learn the encoding that the options ask for; `split` is handed on to `Encoder.fit`."""
    return Encoder.fit(
        reader,
        schema,
        hash_rows=options.hash_rows,
        direct=options.direct,
        min_count=options.min_count,
        seed=seed,
        progress=lambda share: progress("count ids", share),
        **split,
    )


def reopen(path: LogPath, options: LogOptions, settings: Settings, out: Path, notes: list[str]) -> Job | None:
    """Return what `prepare` left below `out`; None where it is not whole."""
    if not ((out / "data").is_dir() and (out / "encoder").is_dir()):
        return None
    train, test = (EncodedLog.open(out / "data" / name) for name in ("train", "test"))
    return Job(out, Encoder.load(out / "encoder"), train, test, settings, options, path, list(notes))


def check_memory(num_rows: Mapping[str, int], settings: Settings, *, compared: bool) -> None:
    """Refuse tables that the memory cannot hold, alone or (`compared`) beside those of plain PyTorch."""
    dim, total = settings.dim, sum(num_rows.values())
    ours = (4 if settings.storage == "float32" else 2) * dim + settings.rule().state_bytes(dim)
    plain = plain_bytes(settings)
    free = free_memory()
    if total * ours > free:
        big = max(num_rows, key=lambda name: num_rows[name])
        raise InputError(
            f"the tables need {total * ours / 2**30:,.1f} GiB ({total:,} rows x {ours} B, the most for `{big}`), "
            f"{free / 2**30:,.1f} GiB are free",
            hint="keep most of them on a disk with --memory, or use --hash-rows, --min-count or a smaller --dim",
        )
    if compared and total * (ours + plain) > free:
        raise InputError(
            f"the tables need {total * ours / 2**30:,.1f} GiB, and {total * plain / 2**30:,.1f} GiB more to compare "
            f"with plain PyTorch, {free / 2**30:,.1f} GiB are free",
            hint="train without the comparison: --pairs 0",
        )


def plain_bytes(settings: Settings) -> int:
    """Return the bytes of one row with its state in plain PyTorch."""
    return 4 * settings.dim + settings.plain_rule().state_bytes(settings.dim)


def log_files(path: LogPath) -> list[list[str | int]]:
    """Return path, bytes and time of change of every file of a log, to see later whether it is the same."""
    paths = [Path(each) for each in ([path] if isinstance(path, str) else path)]
    files = [file for each in paths for file in (sorted(each.iterdir()) if each.is_dir() else [each])]
    stats = [(file, file.stat()) for file in files if file.is_file()]
    return [[os.fspath(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


@contextmanager
def fresh_folder(folder: Path) -> Iterator[None]:
    """Make a folder that is absent or empty, with its parents; an error or Ctrl-C takes away all that came of it."""
    made = next((each for each in (*reversed(folder.parents), folder) if not each.exists()), None)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(made or folder, ignore_errors=True)
        if made is None:
            folder.mkdir(exist_ok=True)
        raise


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuse to work in a folder where another process is at work; the lock goes with its process, also when killed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is at work in {folder}", hint="wait until it has ended") from None
        yield
    finally:
        os.close(handle)
