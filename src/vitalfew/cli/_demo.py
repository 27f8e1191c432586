"""The demonstration: real flights, both ways to train, one receipt."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from vitalfew.core import InputError, Receipt, Rule

__all__ = ["run_demo"]


def run_demo(
    out: str, *, pairs: int, command: str, progress: Callable[[str, float], None], say: Callable[[str], None]
) -> Receipt:
    """Look, train both ways in pairs over a whole epoch, account for it."""
    from vitalfew.data.sample import FLIGHTS_CROSSES, flights
    from vitalfew.embeddings.account import gather, make_receipt
    from vitalfew.embeddings.options import LogOptions
    from vitalfew.embeddings.preparing import prepare
    from vitalfew.embeddings.settings import Settings

    if pairs < 1:
        raise InputError(f"pairs must be at least 1, got {pairs}", hint="6 is the default")
    settings = Settings(bottom=(64,), top=(64,), batch_size=512)
    options = LogOptions(label="late", time="time", crosses=FLIGHTS_CROSSES)
    with tempfile.TemporaryDirectory(prefix="vitalfew-demo-") as work:
        job = prepare(str(flights()), options, settings, Path(work), progress, compared=True)
        total = sum(job.num_rows.values())
        say(f"{len(job.train):,} flights to train on, {len(job.test):,} later ones to test; {total:,} table rows")
        evidence = gather(job, Rule("equal work", tolerance=0.001), pairs=pairs, progress=progress, say=say)
        title = "Will the flight be late? A DLRM on New York's flights of 2013"
        receipt = make_receipt(job, evidence, title=title, command=command)
    receipt.save(Path(out) / "receipt.json")
    return receipt
