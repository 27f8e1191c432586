"""The demonstrations: real flights trained both ways, and real text with less of the KV cache."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from vitalfew.cli._output import Format, print_json, print_receipt, say
from vitalfew.core import InputError, Receipt, Rule

__all__ = ["run_demo", "run_generate_demo"]

# Chapters of Python's own manual, which every Python brings: English that nobody wrote for this.
_CHAPTERS = ("compound", "types", "formatstrings", "debugger")


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


def run_generate_demo(out: Path, *, command: str, output: Format) -> None:
    """Follow chapters of Python's manual with the full cache and with two policies at 50 % and 20 % of it."""
    from pydoc_data.topics import topics

    from vitalfew.cli._generate import open_model, show_table
    from vitalfew.cli._progress import bars
    from vitalfew.generate.comparing import Course, arms_of, compare_caches, long_enough
    from vitalfew.generate.comparing_page import findings, frontier_table, make_receipt, write_page

    course, rule = Course(prompt=1024, continued=48), Rule("equal work", tolerance=0.05)
    model, tokenizer = open_model("smollm2")
    say(f"SmolLM2-135M reads {course.prompt:,} tokens of {len(_CHAPTERS)} chapters of Python's manual and goes on")
    tokens = long_enough([tokenizer(topics[name], verbose=False)["input_ids"] for name in _CHAPTERS], course)
    with bars() as show, tempfile.TemporaryDirectory(prefix="vitalfew-demo-") as work:
        compared = compare_caches(model, tokens, arms_of(["keyformer", "snapkv"], ["50%", "20%"]), course, work, show)
    found = findings(compared, rule)
    title = "Python's manual with SmolLM2-135M"
    receipt = make_receipt(compared, found[0], title=title, command=command)
    receipt.save(out / "receipt.json")
    write_page(out / "report.html", title, compared, found, rule)
    if output is Format.json:
        print_json(receipt.to_dict())
    else:
        print_receipt(receipt, output)
        show_table(frontier_table(compared, found), [])  # the receipt has its notes
    say(f"receipt: {out / 'receipt.json'}  report: {out / 'report.html'}")
