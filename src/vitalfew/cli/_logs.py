"""The verbs that read a log: look, train, predict; and the demonstration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from vitalfew.cli import _flags as flag
from vitalfew.cli._output import Format, command_line, print_json, save_report, say

__all__ = ["demo", "look", "predict", "train"]


def demo(
    out: Annotated[str, typer.Option(help="Folder for receipt.json and report.html.")] = "runs/demo",
    pairs: Annotated[int, typer.Option(help="Paired runs.")] = 6,
    output: flag.Output = Format.text,
) -> None:
    """Train both ways on 2013's flights, and leave a receipt."""
    from vitalfew.cli._demo import run_demo
    from vitalfew.cli._progress import bars

    with bars() as show:
        receipt = run_demo(out, pairs=pairs, command=command_line(), progress=show, say=say)
    save_report(receipt, Path(out), output)


def look(
    ctx: typer.Context,
    log: flag.Log,
    label: flag.Label,
    time: flag.Time = None,
    numeric: flag.Numeric = "",
    categorical: flag.Categorical = "",
    lists: flag.Lists = "",
    ignore: flag.Ignore = "",
    cross: flag.Cross = None,
    hash_rows: flag.HashRows = None,
    direct: flag.Direct = "",
    min_count: flag.MinCount = 1,
    dim: flag.Dim = 16,
    optimizer: flag.Optimizer = "adagrad",
    log_format: flag.LogFormat = None,
    bad_rows: flag.BadRows = "error",
    output: flag.Output = Format.text,
) -> None:
    """Show how few rows do the work; changes nothing."""
    from vitalfew.cli._progress import bars
    from vitalfew.embeddings.settings import Settings
    from vitalfew.look import look_at_log

    settings = Settings(dim=dim, optimizer=optimizer)
    with bars() as show:
        seen = look_at_log(flag.log_path(log), flag.log_options(ctx.params), settings, progress=show)
    if output is Format.json:
        print_json(seen.to_dict())
    else:
        from vitalfew.cli._tables import show_look

        show_look(seen)


def train(
    ctx: typer.Context,
    out: Annotated[str, typer.Option(help="A new folder for model and receipt; with --resume, that of the run.")],
    log: Annotated[list[str] | None, typer.Argument(help="As for `look`; not needed with --resume.")] = None,
    label: Annotated[str, typer.Option(help="The column to predict: 0 or 1; not needed with --resume.")] = "",
    time: flag.Time = None,
    numeric: flag.Numeric = "",
    categorical: flag.Categorical = "",
    lists: flag.Lists = "",
    ignore: flag.Ignore = "",
    cross: flag.Cross = None,
    hash_rows: flag.HashRows = None,
    direct: flag.Direct = "",
    min_count: flag.MinCount = 1,
    test_share: flag.TestShare = 0.2,
    dim: flag.Dim = 16,
    bottom: flag.Widths = "256,64",
    top: flag.Widths = "256,64",
    optimizer: flag.Optimizer = "adagrad",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 0.01,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 1024,
    epochs: Annotated[int, typer.Option(help="Passes over the training rows.")] = 1,
    seed: Annotated[int, typer.Option(help="Of first weights and data order.")] = 0,
    storage: Annotated[str, typer.Option(help="Of the rows: float32, bfloat16 or float16.")] = "float32",
    pairs: Annotated[int, typer.Option(help="Paired runs against plain PyTorch for the receipt; 0 for none.")] = 3,
    trial_steps: Annotated[int, typer.Option(help="Steps of each paired run.")] = 40,
    tolerance: Annotated[float, typer.Option(help="How much AUC may fall.")] = 0.001,
    checkpoint_seconds: Annotated[float, typer.Option(help="Time between checkpoints.")] = 60.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a stopped or killed run stood.")] = False,
    log_format: flag.LogFormat = None,
    bad_rows: flag.BadRows = "error",
    output: flag.Output = Format.text,
) -> None:
    """Train a DLRM on a click log, and leave model and receipt."""
    from vitalfew.cli._progress import bars
    from vitalfew.core import InputError

    if resume:
        _refuse_more(ctx)
    elif not (log and label):
        hint = "vitalfew train clicks.parquet --label click --out runs/a"
        raise InputError("train needs a log and its --label", hint=hint)
    from vitalfew.embeddings.jobs import resume_log, train_log
    from vitalfew.embeddings.settings import Settings

    with bars() as show, _resumable(Path(out)):
        if resume:
            receipt = resume_log(out, checkpoint_seconds=checkpoint_seconds, progress=show)
        else:
            settings = Settings(
                dim, flag.widths(bottom), flag.widths(top), optimizer, lr, batch_size, epochs, seed, storage
            )
            receipt = train_log(
                flag.log_path(log or []),
                flag.log_options(ctx.params),
                settings,
                out,
                pairs=pairs,
                trial_steps=trial_steps,
                tolerance=tolerance,
                checkpoint_seconds=checkpoint_seconds,
                command=command_line(),
                progress=show,
            )
    save_report(receipt, Path(out), output)


def _refuse_more(ctx: typer.Context) -> None:
    """With --resume a run goes on as it began: a flag that would change it is refused, not ignored."""
    from vitalfew.core import InputError

    for name in ctx.params:
        source = ctx.get_parameter_source(name)
        if name not in ("out", "resume", "checkpoint_seconds", "output") and source and source.name == "COMMANDLINE":
            what = "a log" if name == "log" else f"--{name.replace('_', '-')}"
            raise InputError(f"--resume goes on with the run as it began, and got {what}", hint=f"leave {what} out")


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """On Ctrl-C, say how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        say("stopped")
        if (out / "run.json").exists():
            import shlex

            say(f"hint: go on with: {shlex.join(['vitalfew', 'train', '--out', str(out), '--resume'])}")
        raise typer.Exit(130) from None


def predict(
    run_folder: Annotated[str, typer.Argument(metavar="RUN", help="The folder that `train` wrote.")],
    log: Annotated[list[str], typer.Argument(help="Rows to score; the label may be absent.")],
    out: Annotated[str, typer.Option(help="A .parquet or .csv file for the scores, one per row, in order.")],
    log_format: flag.LogFormat = None,
    bad_rows: flag.BadRows = "error",
    output: flag.Output = Format.text,
) -> None:
    """Score the rows of a log with a trained model."""
    from vitalfew.cli._progress import bars
    from vitalfew.embeddings.jobs import predict_log

    with bars() as show:
        rows = predict_log(run_folder, flag.log_path(log), out, log_format=log_format, bad_rows=bad_rows, progress=show)
    if output is Format.json:
        print_json({"rows": rows, "out": out})
    else:
        say(f"scored {rows:,} rows into {out}")
