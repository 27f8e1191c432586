"""The verbs and their flags. Each verb's work is imported when it is called: `--help` stays quick."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitalfew import __version__
from vitalfew.core.errors import InputError, VitalfewError

if TYPE_CHECKING:
    from vitalfew.embeddings.jobs import LogOptions

app = typer.Typer(
    name="vitalfew",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find the few rows that do most of the work, spend only on them, and get a receipt.",
)
receipts = typer.Typer(no_args_is_help=True, help="Show, compare or check receipts.")
app.add_typer(receipts, name="receipt")

_debug = False


class Format(StrEnum):
    """How data is printed on stdout."""

    text = "text"
    json = "json"


_Format = Annotated[Format, typer.Option("--format", help="How to print the result on stdout.")]
_Log = Annotated[list[str], typer.Argument(help="Parquet, CSV or TSV (also .gz), a folder of them, or several files.")]
_Label = Annotated[str, typer.Option(help="The column to predict: 0 or 1.")]
_Time = Annotated[str | None, typer.Option(help="The time column: later rows are for testing.")]
_Names = Annotated[str, typer.Option(help="Columns, separated by commas.")]
_Cross = Annotated[list[str] | None, typer.Option("--cross", help="A feature cross, such as user,hour. Repeatable.")]


def _split(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _options(
    label: str,
    time: str | None,
    numeric: str,
    categorical: str,
    lists: str,
    ignore: str,
    cross: list[str] | None,
    hash_rows: int | None,
    direct: str,
    min_count: int,
    test_share: float,
    file_format: str | None,
    bad_rows: str,
) -> LogOptions:
    from vitalfew.embeddings.jobs import LogOptions

    return LogOptions(
        label=label,
        time=time,
        numeric=_split(numeric),
        categorical=_split(categorical),
        lists=_split(lists),
        ignore=_split(ignore),
        crosses=tuple(_split(text) for text in cross or ()),
        hash_rows=hash_rows,
        direct=_split(direct),
        min_count=min_count,
        test_share=test_share,
        format=file_format,
        bad_rows=bad_rows,
    )


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _split(text))
    except ValueError:
        raise InputError(f"widths must be whole numbers, got {text!r}", hint="such as 256,64") from None


def _path(log: list[str]) -> str | list[str]:
    return log[0] if len(log) == 1 else log


def _command() -> str:
    import shlex

    return shlex.join(["vitalfew", *sys.argv[1:]])


@contextmanager
def _bars() -> Any:
    from vitalfew.cli._progress import bars

    with bars() as show:
        yield show


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


_FileFormat = Annotated[str | None, typer.Option("--log-format", help="parquet, csv, tsv or criteo; else by suffix.")]
_BadRows = Annotated[str, typer.Option(help="What to do with malformed rows: error or skip.")]
_HashRows = Annotated[int | None, typer.Option(help="Hash every feature to this many rows instead of a vocabulary.")]
_MinCount = Annotated[int, typer.Option(help="Values seen less often share one row.")]
_TestShare = Annotated[float, typer.Option(help="Share of the rows to test on.")]
_Dim = Annotated[int, typer.Option(help="Width of the embedding rows.")]
_Optimizer = Annotated[str, typer.Option(help="sgd, adagrad, rowwise_adagrad or adam.")]
_Widths = Annotated[str, typer.Option(help="Widths of the hidden layers.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    global _debug
    _debug = debug
    if version:
        sys.stdout.write(f"vitalfew {__version__}\n")
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Folder for receipt.json and report.html.")] = "runs/demo",
    pairs: Annotated[int, typer.Option(help="Paired runs.")] = 4,
    output: _Format = Format.text,
) -> None:
    """Train on 2013's flights the plain PyTorch way and ours, in pairs, and leave a receipt."""
    from vitalfew.cli._demo import run_demo

    with _bars() as show:
        receipt = run_demo(out, pairs=pairs, command=_command(), progress=show, say=_say)
    _finish(receipt, Path(out), output)


@app.command()
def look(
    log: _Log,
    label: _Label,
    time: _Time = None,
    numeric: _Names = "",
    categorical: _Names = "",
    lists: _Names = "",
    ignore: _Names = "",
    cross: _Cross = None,
    hash_rows: _HashRows = None,
    direct: _Names = "",
    min_count: _MinCount = 1,
    dim: _Dim = 16,
    optimizer: _Optimizer = "adagrad",
    log_format: _FileFormat = None,
    bad_rows: _BadRows = "error",
    output: _Format = Format.text,
) -> None:
    """Show how few rows do the work in a click log, and what would pay. Changes nothing."""
    from vitalfew.embeddings.settings import Settings
    from vitalfew.look import look_at_log

    options = _options(
        label, time, numeric, categorical, lists, ignore, cross,
        hash_rows, direct, min_count, 0.2, log_format, bad_rows,
    )  # fmt: skip
    with _bars() as show:
        seen = look_at_log(_path(log), options, Settings(dim=dim, optimizer=optimizer), progress=show)
    if output is Format.json:
        _print_json(seen.to_dict())
    else:
        from vitalfew.cli._tables import show_look

        show_look(seen)


@app.command()
def train(
    out: Annotated[str, typer.Option(help="A new folder for model and receipt; with --resume, that of the run.")],
    log: Annotated[list[str] | None, typer.Argument(help="As for `look`; not needed with --resume.")] = None,
    label: Annotated[str | None, typer.Option(help="The column to predict: 0 or 1.")] = None,
    time: _Time = None,
    numeric: _Names = "",
    categorical: _Names = "",
    lists: _Names = "",
    ignore: _Names = "",
    cross: _Cross = None,
    hash_rows: _HashRows = None,
    direct: _Names = "",
    min_count: _MinCount = 1,
    test_share: _TestShare = 0.2,
    dim: _Dim = 16,
    bottom: _Widths = "256,64",
    top: _Widths = "256,64",
    optimizer: _Optimizer = "adagrad",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 0.02,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 1024,
    epochs: Annotated[int, typer.Option(help="Passes over the training rows.")] = 1,
    seed: Annotated[int, typer.Option(help="Of first weights and data order.")] = 0,
    storage: Annotated[str, typer.Option(help="Of the rows: float32, bfloat16 or float16.")] = "float32",
    pairs: Annotated[int, typer.Option(help="Paired runs against plain PyTorch for the receipt; 0 for none.")] = 3,
    trial_steps: Annotated[int, typer.Option(help="Steps of each paired run.")] = 40,
    tolerance: Annotated[float, typer.Option(help="How much AUC may fall.")] = 0.001,
    checkpoint_seconds: Annotated[float, typer.Option(help="Time between checkpoints.")] = 60.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed run stopped.")] = False,
    log_format: _FileFormat = None,
    bad_rows: _BadRows = "error",
    output: _Format = Format.text,
) -> None:
    """Train a DLRM on a click log, test it on the later rows, save model and receipt."""
    if not resume and (not log or label is None):
        raise InputError(
            "train needs a log and its --label", hint="vitalfew train clicks.parquet --label click --out a"
        )
    if resume and log:
        raise InputError(f"--resume takes the log of the run, and got {log[0]!r}", hint="leave the log out")
    from vitalfew.embeddings.jobs import train_log
    from vitalfew.embeddings.settings import Settings

    options = _options(
        label or "", time, numeric, categorical, lists, ignore, cross,
        hash_rows, direct, min_count, test_share, log_format, bad_rows,
    )  # fmt: skip
    settings = Settings(dim, _widths(bottom), _widths(top), optimizer, lr, batch_size, epochs, seed, storage)
    with _bars() as show:
        receipt = train_log(
            _path(log or [""]), options, settings, out, resume=resume, pairs=pairs, trial_steps=trial_steps,
            tolerance=tolerance, checkpoint_seconds=checkpoint_seconds, command=_command(), progress=show,
        )  # fmt: skip
    _finish(receipt, Path(out), output)


@app.command()
def predict(
    run_folder: Annotated[str, typer.Argument(metavar="RUN", help="The folder that `train` wrote.")],
    log: Annotated[list[str], typer.Argument(help="Rows to score; the label may be absent.")],
    out: Annotated[str, typer.Option(help="A .parquet or .csv file for the scores, one per row, in order.")],
    log_format: _FileFormat = None,
    bad_rows: _BadRows = "error",
) -> None:
    """Score the rows of a log with a trained model."""
    from vitalfew.embeddings.jobs import predict_log

    with _bars() as show:
        rows = predict_log(run_folder, _path(log), out, log_format=log_format, bad_rows=bad_rows, progress=show)
    _say(f"scored {rows:,} rows into {out}")


def _finish(receipt: Any, out: Path, output: Format) -> None:
    from vitalfew.report import show, write_html

    write_html(receipt, out / "report.html")
    if output is Format.json:
        _print_json(receipt.to_dict())
    else:
        show(receipt)
    _say(f"receipt: {out / 'receipt.json'}  report: {out / 'report.html'}")


@receipts.command("show")
def receipt_show(
    path: Annotated[str, typer.Argument(help="A receipt.json.")],
    html: Annotated[str | None, typer.Option(help="Write the report to this file instead.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    output: _Format = Format.text,
) -> None:
    """Print a receipt, or write it as an HTML page."""
    from vitalfew.core import Receipt
    from vitalfew.report import markdown as to_markdown
    from vitalfew.report import show, write_html

    receipt = Receipt.load(path)
    if html:
        write_html(receipt, html)
        _say(f"wrote {html}")
    elif output is Format.json:
        _print_json(receipt.to_dict())
    elif markdown:
        sys.stdout.write(to_markdown(receipt))
    else:
        show(receipt)


@receipts.command("diff")
def receipt_diff(
    before: Annotated[str, typer.Argument(help="A receipt.json.")],
    after: Annotated[str, typer.Argument(help="Another.")],
    output: _Format = Format.text,
) -> None:
    """Say what changed between two receipts; exit 1 if anything did."""
    import dataclasses

    from vitalfew.core import Receipt
    from vitalfew.report import diff

    changes = diff(Receipt.load(before), Receipt.load(after))
    if output is Format.json:
        _print_json([dataclasses.asdict(change) for change in changes])
    else:
        for change in changes:
            sys.stdout.write(f"{change}\n")
    raise typer.Exit(1 if changes else 0)


@receipts.command("check")
def receipt_check(path: Annotated[str, typer.Argument(help="A receipt.json.")]) -> None:
    """Exit 0 if the receipt is as it was written, 1 if it was changed."""
    from vitalfew.core import Receipt

    receipt = Receipt.load(path, verify=False)
    try:
        Receipt.load(path)
    except InputError as error:
        _fail(error)
        raise typer.Exit(1) from None
    sys.stdout.write(f"unchanged: {receipt.verdict}, {receipt.digest()}\n")


@app.command()
def methods(output: _Format = Format.text) -> None:
    """List what vitalfew can do, with the papers behind it."""
    from vitalfew.cli._methods import METHODS

    if output is Format.json:
        _print_json(METHODS)
    else:
        from vitalfew.cli._tables import show_methods

        show_methods(METHODS)


@app.command()
def doctor(output: _Format = Format.text) -> None:
    """Say what this machine and installation offer, and what is missing."""
    from vitalfew.cli._doctor import examine

    found = examine()
    if output is Format.json:
        _print_json(found)
    else:
        from vitalfew.cli._tables import show_doctor

        show_doctor(found)


def _fail(error: VitalfewError) -> None:
    _say(f"error: {error.message}")
    if error.hint:
        _say(f"hint: {error.hint}")


def run(argv: list[str]) -> int:
    """Run the command line; errors become one line and a hint."""
    import click

    global _debug
    _debug = False
    command: Callable[..., Any] = typer.main.get_command(app)
    try:
        status = command(argv, prog_name="vitalfew", standalone_mode=False)
    except VitalfewError as error:
        if _debug:
            raise
        _fail(error)
        return 2
    except click.ClickException as error:
        error.show(file=sys.stderr)
        return 2
    except (KeyboardInterrupt, click.Abort):
        _say("stopped")
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except MemoryError as error:
        _say(f"error: out of memory ({error})")
        _say("hint: use --hash-rows, --min-count or a smaller --dim")
        return 2
    except OSError as error:
        if _debug:
            raise
        _say(f"error: {error}")
        _say("hint: check the path, its permissions and the free space")
        return 2
    return status if isinstance(status, int) else 0
