"""Public names that are imported from their modules when they are first used, so that a room loads nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["lazily"]


def lazily(package: str, home: Mapping[str, str], *needed: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package whose public names lie in the modules that `home` says.

    Parameters
    ----------
    package
        Its name.
    home
        The module of each public name.
    needed
        Libraries without which none of them can be used.

    Examples
    --------
    >>> lazily("vitalfew.core", {"Budget": "budget"})("Budget").__name__
    'Budget'
    """

    def found(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        from vitalfew.core.errors import need  # the core loads NumPy

        for library in needed:
            need(library)
        module = import_module(package)
        value = getattr(import_module(f"{package}.{home[name]}"), name)
        setattr(module, name, value)
        return value

    return found
