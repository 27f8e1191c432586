"""The verbs about text: generate, compare-cache."""

from __future__ import annotations

import dataclasses
import datetime as dt
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitalfew.cli import _flags as flag
from vitalfew.cli._output import Format, command_line, print_json, say

if TYPE_CHECKING:
    from vitalfew.core import Receipt
    from vitalfew.report.tables import Table

__all__ = ["compare_cache", "generate", "open_model", "show_table"]

_Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder of transformers, or smollm2 for the sample weights.")
]
_Recent = Annotated[
    float | None, typer.Option(help="Share of the kept tokens that are the latest; else as the policy has it.")
]
_POLICIES = "keyformer, keyformer-dynamic, keyformer-frozen, h2o, snapkv, tova, streaming, recent, random"


def generate(
    ctx: typer.Context,
    model: _Model,
    prompt_file: Annotated[str | None, typer.Option(help="A text to go on from; - reads standard input.")] = None,
    prompt: Annotated[
        str, typer.Option(help="The prompt; with --prompt-file, the question after it, which then chooses what stays.")
    ] = "",
    budget: Annotated[
        str, typer.Option(help="What may stay: a share such as 50%, tokens such as 512, or a size such as 64MiB.")
    ] = "50%",
    policy: Annotated[str, typer.Option(help=f"Who stays: {_POLICIES}; or full.")] = "keyformer",
    recent: _Recent = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 256,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token each time; above, they are drawn.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    out: Annotated[str | None, typer.Option(help="Write the receipt to this file instead of the terminal.")] = None,
    output: flag.Output = Format.text,
) -> None:
    """Write text with a fraction of the KV cache."""
    from vitalfew.core import InputError

    _check_number("--max-new-tokens", max_new_tokens, 1)
    _check_number("--temperature", temperature, 0)
    if policy == "full":
        for name in ("budget", "recent", "out"):
            source = ctx.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                raise InputError(f"--{name} says nothing with --policy full", hint="leave it out or name a policy")
    else:
        from vitalfew.generate.policies import policy_named

        policy_named(policy)
    from vitalfew.generate.comparing import budget_of

    allowed = budget_of(budget)
    if not prompt_file and not prompt:
        raise InputError("there is no prompt", hint="pass --prompt-file long.txt, --prompt TEXT, or both")
    from vitalfew.generate.texts import read_prompt

    text = read_prompt(prompt_file) if prompt_file else prompt
    host, tokenizer = open_model(model)
    from vitalfew.generate._transformers_text import tokens_of, write

    tokens, question = tokens_of(tokenizer, text, prompt if prompt_file else "", chat=chat)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}

    def emit(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    if output is Format.text:
        settings["emit"] = emit
    if policy == "full":
        written, receipt = write(host, tokenizer, tokens, **settings), None
    else:
        from vitalfew.generate.key_tokens import KeyTokens

        with KeyTokens(host, allowed, policy=policy, recent=recent, question=question or None, seed=seed) as few:
            written = write(host, tokenizer, tokens, **settings)
        receipt = _complete(few.receipt(), f"Generating with {Path(model).name or model}")
    if output is Format.json:
        print_json({"text": written, "receipt": receipt.to_dict() if receipt is not None else None})
    elif not written.endswith("\n"):
        sys.stdout.write("\n")
    if receipt is not None:
        _leave(receipt, out)


def compare_cache(
    model: _Model,
    files: Annotated[
        str, typer.Argument(metavar="TEXTS", help="A .txt or .jsonl file (also .gz), or a folder of them.")
    ],
    out: Annotated[str, typer.Option(help="Folder for the runs, the receipts and report.html.")],
    policies: Annotated[
        str, typer.Option(help=f"What to compare the full cache with: {_POLICIES}.")
    ] = "full,keyformer,h2o,snapkv,streaming",
    budgets: Annotated[str, typer.Option(help="Shares, tokens or sizes, such as 20%,50%.")] = "20%,50%",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each text that are read at once.")] = 512,
    continue_tokens: Annotated[int, typer.Option(help="Tokens after them that the model has to foretell.")] = 128,
    texts: Annotated[int, typer.Option(help="Texts to take, the first that are long enough.")] = 8,
    recent: _Recent = None,
    tolerance: Annotated[float, typer.Option(help="How much the log-likelihood of a token may fall, in nats.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    output: flag.Output = Format.text,
) -> None:
    """Compare small KV caches with the full one on texts."""
    from vitalfew.cli._progress import bars
    from vitalfew.core import Rule
    from vitalfew.core.files import write_document
    from vitalfew.generate.comparing import Course, arms_of, compare_caches, long_enough

    _check_number("--texts", texts, 1)
    course = Course(prompt_tokens, continue_tokens, recent, seed)
    arms = arms_of(flag.split(policies), flag.split(budgets))
    rule = Rule("equal work", tolerance=tolerance)
    from vitalfew.generate.comparing_page import facts, findings, frontier_table, make_receipt, write_page
    from vitalfew.generate.texts import read_texts

    read = read_texts(files)
    host, tokenizer = open_model(model)
    tokens = long_enough([tokenizer(text, verbose=False)["input_ids"] for text in read], course, texts)
    if len(tokens) < texts:
        needed = course.prompt + course.continued
        say(f"{len(tokens)} of {len(read)} texts have the {needed:,} tokens that are asked for")
    folder = Path(out)
    with bars() as show, _again():
        compared = compare_caches(host, tokens, arms, course, folder, show)
    found = findings(compared, rule)
    name = Path(files).name
    for each in found:
        receipt = make_receipt(compared, each, title=f"{name} with {each.arm.name}", command=command_line())
        receipt.save(folder / "receipts" / f"{each.arm.file}.json")
    write_document(folder / "comparison.json", "cache-frontier", 1, compared.to_dict())
    write_page(folder / "report.html", f"Caches on {name}", compared, found, rule)
    if output is Format.json:
        print_json(compared.to_dict())
    else:
        show_table(frontier_table(compared, found), facts(compared))
    say(f"receipts: {folder / 'receipts'}  report: {folder / 'report.html'}")


def open_model(model: str) -> tuple[Any, Any]:
    """Return a model and its tokenizer from a folder, or the sample weights."""
    from vitalfew.core import need

    need("transformers")
    path: str | Path = model
    if model == "smollm2":
        from vitalfew.cli._progress import bars
        from vitalfew.generate.weights import smollm2

        with bars() as show:
            path = smollm2(show, say)
    from vitalfew.generate._transformers_weights import load

    return load(path)


def show_table(table: Table, notes: list[str]) -> None:
    """Print a table of a report, and what its figures rest on."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Grid

    console = Console(highlight=False, soft_wrap=False)
    grid = Grid(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
    for column in table.columns:
        right = column in table.numeric
        name = column if column.isupper() else column.lower()
        grid.add_column(name, justify="right" if right else "left", no_wrap=not right, overflow="fold")
    for row in table.rows:
        grid.add_row(*(escape(cell.text) for cell in row))
    console.print(grid)
    console.print()
    for note in notes:
        console.print(note, markup=False)


def _check_number(name: str, value: float, least: float) -> None:
    from vitalfew.core import InputError

    if not value >= least:
        raise InputError(f"{name} must be at least {least:g}, got {value:g}", hint=f"see vitalfew --help for {name}")


def _complete(receipt: Receipt, title: str) -> Receipt:
    """Say on the receipt what was run, where and when."""
    from vitalfew.meter import machine

    return dataclasses.replace(
        receipt,
        title=title,
        environment=machine(),
        command=command_line(),
        made=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    )


def _leave(receipt: Receipt, out: str | None) -> None:
    """Write the receipt to a file, or to stderr: stdout is the text's."""
    if out is not None:
        receipt.save(out)
        say(f"receipt: {out}")
        return
    from rich.console import Console

    from vitalfew.report import show

    say("")
    # Beside the text there is room for what was saved only; the file has all.
    show(dataclasses.replace(receipt, environment={}, command=""), Console(stderr=True, highlight=False))


@contextmanager
def _again() -> Iterator[None]:
    """On Ctrl-C, say how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        say("stopped")
        say("hint: the same command goes on where this one stood")
        raise typer.Exit(130) from None
