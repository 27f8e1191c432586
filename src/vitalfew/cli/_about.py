"""The verbs about the program and the machine."""

from __future__ import annotations

from vitalfew.cli._flags import Output
from vitalfew.cli._output import Format, print_json

__all__ = ["doctor", "methods"]


def methods(output: Output = Format.text) -> None:
    """List what vitalfew can do, with the papers behind it."""
    from vitalfew.cli._methods import METHODS

    if output is Format.json:
        print_json(METHODS)
    else:
        from vitalfew.cli._tables import show_methods

        show_methods(METHODS)


def doctor(output: Output = Format.text) -> None:
    """Say what this machine offers, and what is missing."""
    from vitalfew.cli._doctor import examine

    found = examine()
    if output is Format.json:
        print_json(found)
    else:
        from vitalfew.cli._tables import show_doctor

        show_doctor(found)
