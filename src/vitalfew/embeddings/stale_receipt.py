"""The account of what was stale, and what that saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vitalfew.core import Line, Receipt, Verdict
from vitalfew.embeddings.tiered import TieredEmbeddings

if TYPE_CHECKING:
    from vitalfew.embeddings.stale import SkipStale

__all__ = ["stale_receipt"]


def stale_receipt(few: SkipStale) -> Receipt:
    """Count what a `SkipStale` has found and saved; paired runs tell time and quality."""
    tables, watch, counts = few.tables, few.watched, few.tables.counts
    was_updated, was_frozen, was_moved = few.before
    updated, frozen = counts.rows_updated - was_updated, counts.rows_frozen - was_frozen
    memory, held = watch.nbytes + few.flag_bytes, "with flags, and samples that wait for a full batch"
    lines = [
        Line("watched rows, and stale ones of them", "rows", len(watch), few.num_stale, "counted"),
        Line("updates of rows", "rows", updated + frozen, updated, "counted", note="before: with those of frozen rows"),
        Line("rows that were stale and came back", "rows", None, few.revived, "counted"),
        Line("memory for snapshots, history and visits", "B", None, memory, "counted", note=held),
    ]
    if few.mode == "inputs":
        seen = few.samples_seen
        lines.append(
            Line("inputs trained", "samples", seen, seen - few.samples_skipped, "counted", note="before: seen")
        )
        if few.priors is not None:
            note = f"of inputs seen and kept while rows were stale; correct() adds {few.logit_shift:+.4f} to the bias"
            lines.append(Line("share of label 1", "", *few.priors, "counted", note=note))
    if isinstance(tables, TieredEmbeddings) and was_moved is not None:
        record = tables.store.record.nbytes
        left, clean = tables.moves.left - was_moved[0], tables.moves.clean - was_moved[1]
        note = "before: every row that left"
        lines.append(Line("row bytes written back", "B", left * record, (left - clean) * record, "counted", note=note))
    verdict, why = _verdict(few)
    rule = f"change below {few.threshold:.3g} in {few.rule.windows} of {few.window} windows of {few.rule.every} updates"
    return Receipt(
        "stale rows",
        f"{few.mode}, {rule}",
        tuple(lines),
        verdict,
        why,
        notes=(_changes(few),),
    )


def _verdict(few: SkipStale) -> tuple[Verdict, str]:
    history = few.watched.history
    if few.most_stale:
        return "undecided", "no paired run was made: counts alone do not show the time or the quality"
    if not (history.visits >= few.rule.warm_up).any():
        return "undecided", f"no row has had its warm-up of {few.rule.warm_up:g} updates yet"
    return "no saving", f"declined: no row became stale in {few.window} windows"


def _changes(few: SkipStale) -> str:
    """Say how far the watched rows moved when they were last looked at."""
    history = few.watched.history
    change = history.change[history.peak > 0]
    if not len(change):
        return "no row was looked at yet"
    quantiles = np.quantile(change, [0.1, 0.5, 0.9])
    warm = history.visits >= few.rule.warm_up
    began = float((history.peak >= few.threshold)[warm].mean()) if warm.any() else 0.0
    return (
        f"relative change of {len(change):,} watched rows in their last window: 10 % below {quantiles[0]:.3g}, half "
        f"below {quantiles[1]:.3g}, 90 % below {quantiles[2]:.3g}; of the warm ones {100 * began:.0f} % ever moved by "
        f"{few.threshold:.3g}"
    )
