"""The flags that several verbs share, and what they mean together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitalfew.cli._output import Format

if TYPE_CHECKING:
    from vitalfew.embeddings.options import LogOptions

__all__ = ["log_options", "log_path", "split", "widths"]

Output = Annotated[Format, typer.Option("--format", help="How to print the result on stdout.")]

Label = Annotated[str, typer.Option(help="The column to predict: 0 or 1.")]
Log = Annotated[list[str], typer.Argument(help="Parquet, CSV or TSV (also .gz), a folder of them, or several files.")]
Time = Annotated[str | None, typer.Option(help="The time column: later rows are for testing.")]
Numeric = Annotated[str, typer.Option(help="Columns that measure something, separated by commas.")]
Categorical = Annotated[str, typer.Option(help="Columns that name something.")]
Lists = Annotated[str, typer.Option(help="Columns that hold a list of names in each row.")]
Ignore = Annotated[str, typer.Option(help="Columns to leave out.")]
Cross = Annotated[list[str] | None, typer.Option("--cross", help="A feature cross, such as user,hour. Repeatable.")]
HashRows = Annotated[int | None, typer.Option(help="Hash every feature to this many rows instead of a vocabulary.")]
Direct = Annotated[str, typer.Option(help="Columns whose values are row numbers already.")]
MinCount = Annotated[int, typer.Option(help="Values seen less often share one row.")]
TestShare = Annotated[float, typer.Option(help="Share of the rows to test on.")]
LogFormat = Annotated[str | None, typer.Option("--log-format", help="parquet, csv, tsv or criteo; else by suffix.")]
BadRows = Annotated[str, typer.Option(help="What to do with malformed rows: error or skip.")]

Model = Annotated[str, typer.Option(help="dlrm, dcn, deepfm, wide-deep or adrec.")]
Dim = Annotated[int, typer.Option(help="Width of the embedding rows.")]
Optimizer = Annotated[str, typer.Option(help="sgd, adagrad, rowwise_adagrad or adam.")]
Widths = Annotated[str, typer.Option(help="Widths of the hidden layers.")]
BatchSize = Annotated[int, typer.Option(help="Rows per step.")]
Seed = Annotated[int, typer.Option(help="Of first weights and data order.")]
RowStorage = Annotated[str, typer.Option(help="Of the rows: float32, bfloat16 or float16.")]

Ahead = Annotated[int, typer.Option(help="Batches whose rows are brought into memory before their turn.")]
Depth = Annotated[int, typer.Option(help="Batches that the look-ahead policy sees.")]


def split(text: str) -> tuple[str, ...]:
    """Return the names in a text, which commas separate."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def widths(text: str) -> tuple[int, ...]:
    """Return the whole numbers in a text."""
    from vitalfew.core import InputError

    try:
        return tuple(int(part) for part in split(text))
    except ValueError:
        raise InputError(f"widths must be whole numbers, got {text!r}", hint="such as 256,64") from None


def log_path(log: list[str]) -> str | list[str]:
    """Return one path as it is, several as a list."""
    return log[0] if len(log) == 1 else log


def log_options(flags: Mapping[str, Any]) -> LogOptions:
    """Return what the flags of `look` or `train` say about the log."""
    from vitalfew.embeddings.options import LogOptions

    named: dict[str, Any] = {key: flags[key] for key in ("label", "time", "hash_rows", "min_count", "bad_rows")}
    named |= {key: split(flags[key]) for key in ("numeric", "categorical", "lists", "ignore", "direct")}
    crosses = tuple(split(text) for text in flags["cross"] or ())
    return LogOptions(
        **named,
        crosses=crosses,
        test_share=flags.get("test_share", 0.2),
        by=flags.get("by"),
        format=flags["log_format"],
    )
