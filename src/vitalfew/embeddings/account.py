"""What a run leaves behind for people: evidence against the plain way, and the receipt."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vitalfew.core import Curve, Line, Prediction, Receipt, Rule, profile
from vitalfew.data.batches import Batches
from vitalfew.data.encode import Encoder
from vitalfew.embeddings.metrics import BinaryMetrics
from vitalfew.embeddings.options import Progress
from vitalfew.embeddings.payoff import Payoff, predict_payoff
from vitalfew.embeddings.peak import peak_memory
from vitalfew.embeddings.preparing import Job, plain_bytes
from vitalfew.embeddings.tiering import free_memory
from vitalfew.embeddings.trial import Trial, paired_trial
from vitalfew.meter import Figure, Scope, machine

__all__ = ["Evidence", "curves", "gather", "make_receipt", "no_comparison", "training_lines"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was foretold, what the paired runs gave, and the peak memory of the plain way and of ours."""

    predicted: Payoff
    trial: Trial
    peaks: tuple[int | None, int | None]


def gather(
    job: Job,
    rule: Rule,
    *,
    pairs: int,
    max_steps: int | None = None,
    progress: Progress,
    say: Callable[[str], None] = lambda text: None,
) -> Evidence:
    """Foretell the payoff, train both ways in pairs, measure the memory of each.

    Parameters
    ----------
    max_steps
        Of each run; by default it is one epoch.
    say
        Is told what is foretold, before it is put to the test.
    """
    size = len(job.train)
    predicted = predict_payoff(job.num_rows, job.encoder.counts, job.train.num_dense, job.settings, max_rows=size)
    say(f"foretold: {predicted.ratio:.1f}x faster training; a batch touches {predicted.distinct:,} rows")
    say(f"the rule, fixed beforehand: {rule}")
    epoch = len(Batches(job.train, job.settings.batch_size))
    steps, done = 2 * pairs * min(epoch, max_steps or epoch), 0

    def stepped(count: int) -> None:
        nonlocal done
        done += count
        progress("compare", min(done / steps, 1.0))

    trial = paired_trial(
        job.train, job.test, job.num_rows, job.settings, rule, pairs=pairs, max_steps=max_steps, progress=stepped,
        way=job.way, tiers=job.tiers, store=None if job.tiers is None else job.tiers.folder(job.out),
    )  # fmt: skip
    if job.tiers is not None:  # what a few steps fill tells nothing: the account has the memory of the whole run
        return Evidence(predicted, trial, (None, None))
    plain, ours = (peak_memory(job.train.folder, job.num_rows, job.settings, plain=each) for each in (True, False))
    return Evidence(predicted, trial, (plain, ours))


def no_comparison(job: Job) -> str | None:
    """Say why plain PyTorch cannot be trained beside rows in tiers; None where it can."""
    if job.tiers is None:
        return None
    total = sum(job.num_rows.values())
    plain, free = total * plain_bytes(job.settings), free_memory()
    if plain + job.tiers.room(total, job.settings).nbytes <= free:
        return None
    return (
        f"no paired run was made: plain PyTorch needs {plain / 2**30:,.2f} GiB for these tables, and "
        f"{free / 2**30:,.2f} GiB are free"
    )


def curves(encoder: Encoder) -> tuple[Curve, ...]:
    """Return the coverage curve of each feature with a vocabulary, the most skewed first."""
    found = []
    for name, counts in encoder.counts.items():
        seen = counts[counts > 0].astype(float)
        if len(seen) > 1:
            known = dataclasses.replace(profile([]), name=name, counts=seen, total=float(seen.sum()))
            found.append((known.skew(), Curve(name, tuple(known.curve()), len(seen))))
    return tuple(curve for _, curve in sorted(found, key=lambda item: (-item[0], item[1].name)))


def training_lines(training: Scope, metrics: BinaryMetrics) -> tuple[Line, ...]:
    """Return the account of a whole training run: its time, memory and energy, and how good the model is."""
    note = f"{metrics.num_rows:,} held-back rows"
    return (
        _line(training["wall"], "whole run, time"),
        _line(training["rows"], "whole run, rows trained"),
        _line(training["peak_rss"], "whole run, peak memory"),
        *(
            _line(figure, f"whole run, {figure.name.replace('_', ' ')}")
            for figure in training.figures()
            if figure.name.startswith("energy")
        ),
        Line("whole run, AUC", "", None, metrics.auc, "measured", note=note),
        Line("whole run, log loss", "nat", None, metrics.log_loss, "measured", note=note),
        Line("whole run, calibration", "", None, metrics.calibration, "measured", note="predicted / actual clicks"),
    )


def _line(figure: Figure, what: str) -> Line:
    return Line(what, figure.unit, None, figure.value, figure.how, figure.low, figure.high, figure.source)


def make_receipt(
    job: Job,
    evidence: Evidence | None,
    lines: Sequence[Line] = (),
    *,
    predictions: Sequence[Prediction] = (),
    why: str | None = None,
    title: str | None = None,
    command: str = "",
) -> Receipt:
    """Put together what was measured, counted and foretold.

    Parameters
    ----------
    evidence
        None leaves the verdict `undecided`.
    lines
        The account of the run itself, as of `training_lines`.
    predictions
        What was foretold of it.
    why
        There is no evidence, where it was asked for.
    """
    name = Path(job.path if isinstance(job.path, str) else job.path[0]).name
    when = "the later ones" if job.encoder.schema.time else "drawn at random"
    notes = [f"{len(job.train):,} rows to train, {len(job.test):,} to test ({when})", *job.notes]
    receipt = Receipt(
        title=title or f"Training on {name}",
        method=f"fused row updates, {job.settings.optimizer}"
        + ("" if job.tiers is None else ", rows over memory and disk")
        + "".join(f", {name}" for name in job.way.methods),
        lines=(*job.lines, *lines),
        declined=job.declined,
        verdict="undecided",
        why=why or "no paired runs were made (--pairs 0)",
        predictions=tuple(predictions),
        curves=curves(job.encoder),
        notes=tuple(notes),
        environment={
            **machine(),
            "threads": torch.get_num_threads(),
            "settings": job.settings.to_dict(),
            **({} if job.tiers is None else {"tiers": job.tiers.to_dict()}),
        },
        command=command,
        made=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    )
    return receipt if evidence is None else _with_evidence(receipt, job, evidence)


def _with_evidence(receipt: Receipt, job: Job, evidence: Evidence) -> Receipt:
    comparison, (plain, ours) = evidence.trial.comparison, evidence.peaks
    lines, notes = [*evidence.trial.lines()], []
    if job.tiers is not None:
        notes.append("in the paired runs our rows have the same --memory and a store of their own on the same disk")
    elif plain is not None and ours is not None:
        note = "a process of its own, the first steps"
        lines.append(Line("peak memory", "B", float(plain), float(ours), "measured", note=note))
    else:
        notes.append("peak memory was not measured: a process that was to tell it ended early")
    if job.settings.optimizer == "rowwise_adagrad":
        notes.append("the plain way trains its rows by adagrad: PyTorch has no rowwise Adagrad for them")
    if job.settings.storage != "float32":
        notes.append(f"the plain way keeps its rows as float32, ours as {job.settings.storage}")
    basis = "a few timed steps on ids drawn from the log's counts"
    factor = Prediction("training speed, factor", "x", evidence.predicted.ratio, comparison.ratio.mean, basis)
    return dataclasses.replace(
        receipt,
        lines=(*lines, *receipt.lines),
        notes=(*receipt.notes, *notes),
        verdict=comparison.verdict,
        why=comparison.why,
        rule=str(comparison.rule),
        quality=evidence.trial.qualities(),
        pairs=comparison.pairs,
        pairs_needed=comparison.pairs_needed,
        # With rows on a disk, what counts is foretold per step.
        predictions=receipt.predictions if job.tiers else (factor,),
    )
