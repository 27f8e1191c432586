"""How to read a log, and what its columns are for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitalfew.core import InputError
from vitalfew.data import Schema, infer_schema
from vitalfew.data.readers import LogReader, open_log

__all__ = ["LogOptions", "Progress", "Say", "hush", "open_with", "silent"]

Progress = Callable[[str, float], None]
"""Called with the stage and its share done."""
Say = Callable[[str], None]
"""Called with a line for the user."""


def silent(stage: str, share: float) -> None:
    """Show no progress."""
    del stage, share


def hush(text: str) -> None:
    """Say nothing."""
    del text


@dataclass(frozen=True, slots=True)
class LogOptions:
    """How to read a log, and what its columns are for.

    Attributes
    ----------
    label, time
        Columns; without `time` the test slice is drawn at random.
    numeric, categorical, lists, ignore
        Columns whose kind is not left to inference.
    crosses
        Tuples of categorical columns whose combinations are features too.
    hash_rows, direct, min_count
        As for `Encoder.fit`.
    by
        For a model that reads histories: the column that names the user.
    test_share
        Of the rows, the later ones where there is a time.
    format, bad_rows
        As for `open_log`.

    Examples
    --------
    >>> LogOptions("click", test_share=20)
    Traceback (most recent call last):
    vitalfew.core.errors.InputError: test_share must lie between 0 and 1, got 20; 0.2 holds back a fifth of the rows
    """

    label: str
    time: str | None = None
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    crosses: tuple[tuple[str, ...], ...] = ()
    hash_rows: int | None = None
    direct: tuple[str, ...] = ()
    min_count: int = 1
    by: str | None = None
    test_share: float = 0.2
    format: str | None = None
    bad_rows: str = "error"

    def __post_init__(self) -> None:
        if not 0 < self.test_share < 1:
            raise InputError(
                f"test_share must lie between 0 and 1, got {self.test_share}", hint="0.2 holds back a fifth of the rows"
            )
        if self.hash_rows is not None and self.hash_rows < 1:
            raise InputError(f"hash_rows must be at least 1, got {self.hash_rows}", hint="1000000 is a usual size")
        if self.min_count < 1:
            raise InputError(f"min_count must be at least 1, got {self.min_count}", hint="1 keeps every value")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LogOptions:
        """Build from plain lists and values; an unknown key is an error."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(values) - known:
            raise InputError(f"there is no option {min(unknown)!r}", hint=f"there are {', '.join(sorted(known))}")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        plain["crosses"] = tuple(tuple(cross) for cross in values.get("crosses", ()))
        return cls(**plain)


def open_with(path: str | Sequence[str], options: LogOptions) -> tuple[LogReader, Schema]:
    """Open a log and settle what its columns are for; a model needs two fields at least, one of them with a table."""
    reader = open_log(path, format=options.format, bad_rows=options.bad_rows)  # type: ignore[arg-type]
    schema = infer_schema(
        reader,
        label=options.label,
        time=options.time,
        numeric=options.numeric or None,
        categorical=options.categorical or None,
        lists=options.lists or None,
        ignore=options.ignore or None,
        crosses=options.crosses,
    )
    if not schema.features:
        raise InputError(
            f"`{reader.name}` has no categorical column, and without one there are no rows to look up",
            hint="name one with --categorical",
        )
    if len(schema.features) == 1 and not schema.numeric:
        raise InputError(
            f"`{reader.name}` has one feature, `{schema.features[0]}`, and a DLRM multiplies pairs of them",
            hint="name more columns with --categorical or --numeric",
        )
    return reader, schema
