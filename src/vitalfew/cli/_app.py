"""The command: its verbs, and one line for whatever goes wrong. A verb's work is imported when it is called."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from vitalfew import __version__
from vitalfew.cli import _about, _export, _generate, _logs, _serve
from vitalfew.cli._output import fail, say
from vitalfew.cli._receipts import receipts

__all__ = ["run"]

# Plain help: the markup would load a library for it.
app = typer.Typer(
    name="vitalfew",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Find the few rows that do most of the work, spend only on them, and get a receipt.",
)
_VERBS: tuple[Callable[..., None], ...] = (
    _logs.demo,
    _logs.look,
    _logs.train,
    _logs.predict,
    _export.export,
    _generate.generate,
    _generate.compare_cache,
    _serve.serve,
    _about.methods,
    _about.doctor,
)
for _verb in _VERBS:
    app.command()(_verb)
app.add_typer(receipts, name="receipt")

# The base of typer's own errors: click's, or that of the copy that newer versions bring.
_CommandError = typer.BadParameter.__mro__[2]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    del debug  # `run` takes it out, wherever it stands
    if version:
        sys.stdout.write(f"vitalfew {__version__}\n")
        raise typer.Exit


def run(argv: list[str]) -> int:
    """Run the command line and return the exit status; an error becomes one line and a hint."""
    rest = [word for word in argv if word != "--debug"]
    try:
        status = typer.main.get_command(app)(rest, prog_name="vitalfew", standalone_mode=False)
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:  # rich ends the program when a pipe breaks
        if not isinstance(error if isinstance(error, BrokenPipeError) else error.__context__, BrokenPipeError):
            raise
        # Whoever read has left; what is still to be flushed must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell calls the end by SIGPIPE
    except (KeyboardInterrupt, typer.Abort):
        say("stopped")
        return 130
    except Exception as error:  # noqa: BLE001 - the border to the user
        if len(rest) < len(argv):
            traceback.print_exc()
        return _explain(error)
    return status if isinstance(status, int) else 0


def _explain(error: Exception) -> int:
    from vitalfew.core.errors import VitalfewError

    if isinstance(error, VitalfewError):
        fail(error.message, error.hint or "see vitalfew --help")
    elif isinstance(error, _CommandError):
        return _explain_usage(error)
    elif isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        fail("out of memory", "use --hash-rows, --min-count, a smaller --dim or a smaller --batch-size")
    elif isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        fail(what, "check the path, its permissions and the free space")
    else:
        fail(f"unexpected {type(error).__name__}: {error}", "this is a fault of vitalfew: see it with --debug")
        return 70
    return 2


def _explain_usage(error: Exception) -> int:
    """Say what is wrong with the command line; without any words, show the help."""
    context = getattr(error, "ctx", None)
    message = error.format_message()  # type: ignore[attr-defined]
    if not message.strip() or type(error).__name__ == "NoArgsIsHelpError":
        error.show(file=sys.stderr)  # type: ignore[attr-defined]
        return 2
    path = context.command_path if context is not None else "vitalfew"
    fail(message[0].lower() + message[1:].rstrip("."), f"see {path} --help")
    return 2
