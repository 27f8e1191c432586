"""The command. Data goes to stdout, everything else to stderr; exit 0 is fine, 1 a requirement not met, 2 misuse."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status.

    Examples
    --------
    >>> from vitalfew.cli import main
    >>> main(["methods", "--format", "json"])  # doctest: +ELLIPSIS
    [...]
    0
    """
    # Workers that spin for long take the cores from each other, workers that sleep at once are woken too late for
    # short kernels: they spin for some microseconds. Set before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from vitalfew.cli._app import run

    return run(sys.argv[1:] if argv is None else argv)
