"""The verbs that read a log: look, train, predict; and the demonstrations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitalfew.cli import _flags as flag
from vitalfew.cli._output import Format, command_line, print_json, save_report, say

if TYPE_CHECKING:
    from vitalfew.embeddings.tiering import Tiering

__all__ = ["demo", "look", "predict", "train"]


def demo(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="flights (training) or generate (a small KV cache).")] = "flights",
    out: Annotated[
        str | None, typer.Option(help="Folder for receipt.json and report.html; else runs/demo or runs/demo-generate.")
    ] = None,
    pairs: Annotated[int, typer.Option(help="Paired runs of flights.")] = 6,
    output: flag.Output = Format.text,
) -> None:
    """Show what is saved on real data, and leave a receipt."""
    from vitalfew.cli._demo import run_demo, run_generate_demo
    from vitalfew.cli._progress import bars
    from vitalfew.core import InputError

    if name == "generate":
        _refuse_alone(ctx, ("pairs",), "flights")
        run_generate_demo(Path(out or "runs/demo-generate"), command=command_line(), output=output)
        return
    if name != "flights":
        raise InputError(f"there is no demonstration {name!r}", hint="choose flights or generate")
    folder = out or "runs/demo"
    with bars() as show:
        receipt = run_demo(folder, pairs=pairs, command=command_line(), progress=show, say=say)
    save_report(receipt, Path(folder), output)


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
    model: flag.Model = "dlrm",
    dim: flag.Dim = 16,
    bottom: flag.Widths = "256,64",
    top: flag.Widths = "256,64",
    optimizer: flag.Optimizer = "adagrad",
    batch_size: flag.BatchSize = 1024,
    storage: flag.RowStorage = "float32",
    budget: Annotated[
        str | None, typer.Option(help="Memory for the rows to try, such as 1%,5%,10% or 512MiB,2GiB.")
    ] = None,
    policies: Annotated[str, typer.Option(help="With --budget: which to try.")] = "static,lru,lfu,lookahead,belady",
    ahead: flag.Ahead = 2,
    depth: flag.Depth = 200,
    batches: Annotated[int | None, typer.Option(help="With --budget: read so many batches only.")] = None,
    store: Annotated[
        str | None, typer.Option(help="With --budget: where rows would be kept; that disk is measured.")
    ] = None,
    drift: Annotated[bool, typer.Option("--drift", help="Show how columns change over time; needs --time.")] = False,
    slices: Annotated[int, typer.Option(help="With --drift: stretches of time; the first is the base.")] = 8,
    reference: Annotated[
        float | None, typer.Option(help="With --drift: the share of the rows that makes the base instead.")
    ] = None,
    models: Annotated[
        str, typer.Option(help="With --drift: train these on the base and follow their AUC, such as dlrm,dcn,adrec.")
    ] = "",
    report: Annotated[
        str | None, typer.Option(help="With --budget or --drift: write a page with the charts here.")
    ] = None,
    log_format: flag.LogFormat = None,
    bad_rows: flag.BadRows = "error",
    output: flag.Output = Format.text,
) -> None:
    """Show how few rows do the work; changes nothing."""
    from vitalfew.cli._progress import bars

    if budget is None:
        _refuse_alone(ctx, ("policies", "ahead", "depth", "batches", "store"), "--budget 1%,5%,10%,20%")
    if not drift:
        _refuse_alone(ctx, ("slices", "reference", "models"), "--drift")
    if budget is None and not drift:
        _refuse_alone(ctx, ("report",), "--budget 1%,5%,10%,20% or --drift")
    from vitalfew.core import InputError
    from vitalfew.embeddings.settings import Settings
    from vitalfew.look import look_at_budgets, look_at_log
    from vitalfew.look.drift import look_at_drift

    if model == "tbsm":
        raise InputError("look foretells models of one row at a time, and tbsm reads histories", hint="use dlrm")
    settings = Settings(
        dim, flag.widths(bottom), flag.widths(top), optimizer, batch_size=batch_size, storage=storage, model=model
    )
    options, path, memory = flag.log_options(ctx.params), flag.log_path(log), None
    drifted, followed = None, {}
    if models:
        from vitalfew.embeddings.slices import check_models, models_by_slice

        check_models(flag.split(models))
    with bars() as show:
        if drift:
            drifted = look_at_drift(path, options, slices, reference=reference, progress=show)
        if models:
            followed = models_by_slice(
                path, options, flag.split(models), slices, reference=reference, settings=settings, progress=show
            )
        if budget is not None:
            memory = look_at_budgets(
                path, options, settings, flag.split(budget), flag.split(policies), ahead=ahead, depth=depth,
                most_batches=batches, store=store, progress=show,
            )  # fmt: skip
        seen = look_at_log(path, options, settings, progress=show)
    if report is not None:
        from vitalfew.look.page import write_page

        asked = "How does {} drift?" if memory is None else "How much memory for {}?"
        write_page(report, asked.format(Path(log[0]).name), memory=memory, drift=drifted, models=followed)
        say(f"report: {report}")
    if output is Format.json:
        found = seen.to_dict() | ({} if memory is None else {"memory": memory.to_dict()})
        if drifted is not None:
            found |= {"drift": drifted.to_dict()}
        if followed:
            found |= {"models": {name: [dataclasses.asdict(each) for each in followed[name]] for name in followed}}
        print_json(found)
    else:
        from vitalfew.cli._tables import show_budgets, show_drift, show_look

        show_look(seen)
        if drifted is not None:
            show_drift(drifted, followed)
        if memory is not None:
            show_budgets(memory)


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
    model: Annotated[str, typer.Option(help="dlrm, dcn, deepfm, wide-deep, adrec or tbsm.")] = "dlrm",
    by: Annotated[
        str | None, typer.Option(help="With --model tbsm: the column of the user, whose earlier clicks it reads.")
    ] = None,
    history: Annotated[int, typer.Option(help="With --model tbsm: how many of them.")] = 20,
    dim: flag.Dim = 16,
    bottom: flag.Widths = "256,64",
    top: flag.Widths = "256,64",
    optimizer: flag.Optimizer = "adagrad",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 0.01,
    batch_size: flag.BatchSize = 1024,
    epochs: Annotated[int, typer.Option(help="Passes over the training rows.")] = 1,
    seed: flag.Seed = 0,
    storage: flag.RowStorage = "float32",
    memory: Annotated[
        str | None,
        typer.Option(help="Memory for the rows, such as 2GiB, or a share such as 10%; the others are kept on disk."),
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="With --memory: the folder for those rows, on a fast disk; else OUT/rows.")
    ] = None,
    policy: Annotated[
        str, typer.Option(help="With --memory: which rows stay, by lookahead, lru or lfu.")
    ] = "lookahead",
    ahead: flag.Ahead = 2,
    depth: flag.Depth = 200,
    method: Annotated[
        str,
        typer.Option(
            help="What acts on the batches: fused (nothing more), hot-rows, split-batches, skip-rows, skip-inputs, "
            "several joined by +, or auto, which tries them and keeps what pays."
        ),
    ] = "fused",
    pairs: Annotated[int, typer.Option(help="Paired runs against plain PyTorch for the receipt; 0 for none.")] = 3,
    trial_steps: Annotated[int, typer.Option(help="Steps of each paired run.")] = 40,
    tolerance: Annotated[float, typer.Option(help="How much AUC may fall.")] = 0.001,
    checkpoint_seconds: Annotated[float, typer.Option(help="Time between checkpoints.")] = 60.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a stopped or killed run stood.")] = False,
    log_format: flag.LogFormat = None,
    bad_rows: flag.BadRows = "error",
    output: flag.Output = Format.text,
) -> None:
    """Train a model on a click log, and leave model and receipt."""
    from vitalfew.cli._progress import bars
    from vitalfew.core import InputError

    if resume:
        _refuse_more(ctx)
    elif not (log and label):
        hint = "vitalfew train clicks.parquet --label click --out runs/a"
        raise InputError("train needs a log and its --label", hint=hint)
    if model != "tbsm":
        _refuse_alone(ctx, ("by", "history"), "--model tbsm")
    from vitalfew.embeddings.jobs import resume_log, train_log
    from vitalfew.embeddings.settings import Settings

    with bars() as show, _resumable(Path(out)):
        if resume:
            receipt = resume_log(out, checkpoint_seconds=checkpoint_seconds, progress=show, say=say)
        else:
            settings = Settings(
                dim, flag.widths(bottom), flag.widths(top), optimizer, lr, batch_size, epochs, seed, storage, model,
                history if model == "tbsm" else 0,
            )  # fmt: skip
            receipt = train_log(
                flag.log_path(log or []),
                flag.log_options(ctx.params),
                settings,
                out,
                pairs=pairs,
                trial_steps=trial_steps,
                tolerance=tolerance,
                checkpoint_seconds=checkpoint_seconds,
                tiers=_tiering(ctx),
                method=method,
                command=command_line(),
                progress=show,
                say=say,
            )
    save_report(receipt, Path(out), output)


def _tiering(ctx: typer.Context) -> Tiering | None:
    """Return what the flags say about memory; those that need --memory are refused without it, not ignored."""
    names = ("store", "policy", "ahead", "depth")
    if ctx.params["memory"] is None:
        _refuse_alone(ctx, names, "--memory 2GiB")
        return None
    from vitalfew.embeddings.tiering import Tiering

    return Tiering(ctx.params["memory"], **{name: ctx.params[name] for name in names})


def _refuse_alone(ctx: typer.Context, names: tuple[str, ...], needed: str) -> None:
    from vitalfew.core import InputError

    if given := [name for name in names if _is_given(ctx, name)]:
        raise InputError(f"--{given[0]} says nothing without {needed.split()[0]}", hint=f"add it, such as {needed}")


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse_more(ctx: typer.Context) -> None:
    """With --resume a run goes on as it began: a flag that would change it is refused, not ignored."""
    from vitalfew.core import InputError

    for name in ctx.params:
        if name not in ("out", "resume", "checkpoint_seconds", "output") and _is_given(ctx, name):
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
