"""The demonstration: real flights, both ways to train, one receipt."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from vitalfew.core import Receipt

__all__ = ["run_demo"]


def run_demo(
    out: str, *, pairs: int, command: str, progress: Callable[[str, float], None], say: Callable[[str], None]
) -> Receipt:
    """Look, train both ways in pairs over a whole epoch, account for it."""
    from vitalfew.core import InputError, Rule
    from vitalfew.data.batches import Batches
    from vitalfew.data.sample import FLIGHTS_CROSSES, flights
    from vitalfew.embeddings.jobs import LogOptions, make_receipt, prepare
    from vitalfew.embeddings.payoff import predict_payoff
    from vitalfew.embeddings.peak import peak_memory
    from vitalfew.embeddings.settings import Settings
    from vitalfew.embeddings.trial import paired_trial

    if pairs < 1:
        raise InputError(f"pairs must be at least 1, got {pairs}", hint="4 is the default")
    folder = Path(out)
    settings = Settings(bottom=(64,), top=(64,), batch_size=512)
    options = LogOptions(label="late", time="time", crosses=FLIGHTS_CROSSES)
    shutil.rmtree(folder / "work", ignore_errors=True)
    try:
        run = prepare(str(flights()), options, settings, folder / "work", progress)
        total = sum(run.num_rows.values())
        say(f"{len(run.train):,} flights to train on, {len(run.test):,} later ones to test; {total:,} table rows")
        predicted = predict_payoff(run.num_rows, run.encoder.counts, run.train.num_dense, settings)
        say(f"foretold: {predicted.ratio:.1f}x faster training; a batch touches {predicted.distinct:,} rows")
        rule = Rule("equal work", tolerance=0.001)
        say(f"the rule, fixed beforehand: {rule}")
        steps = len(Batches(run.train, settings.batch_size)) * 2 * pairs
        done = 0

        def stepped(count: int) -> None:
            nonlocal done
            done += count
            progress("train both", done / steps)

        trial = paired_trial(run.train, run.test, run.num_rows, settings, rule, pairs=pairs, progress=stepped)
        peaks = tuple(peak_memory(run.train.folder, run.num_rows, settings, plain=plain) for plain in (True, False))
        title = "Will the flight be late? A DLRM on New York's flights of 2013"
        receipt = make_receipt(run, None, None, trial, predicted, peaks, command, title=title)
    finally:
        shutil.rmtree(folder / "work", ignore_errors=True)
    receipt.save(folder / "receipt.json")
    return receipt
