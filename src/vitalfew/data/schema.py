"""What each column of a log is for: label, numeric, categorical, list, time, or ignored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from vitalfew.core.errors import InputError

__all__ = ["Column", "Kind", "Schema"]

Kind: TypeAlias = Literal["label", "numeric", "categorical", "list", "time", "ignored"]
KINDS: tuple[Kind, ...] = ("label", "numeric", "categorical", "list", "time", "ignored")


@dataclass(frozen=True, slots=True)
class Column:
    """A column, what it is for, and why.

    Examples
    --------
    >>> Column("user", "categorical", "text").kind
    'categorical'
    """

    name: str
    kind: Kind
    why: str = ""


@dataclass(frozen=True, slots=True)
class Schema:
    """The columns of a log, each with its use, and the crosses of categorical columns.

    Raises
    ------
    InputError
        If there is not exactly one label, there is no feature, or a cross names a column that is not categorical.

    Examples
    --------
    >>> schema = Schema((Column("click", "label"), Column("user", "categorical"), Column("item", "categorical")),
    ...                 crosses=(("user", "item"),))
    >>> schema.features
    ('user', 'item', 'user x item')
    """

    columns: tuple[Column, ...]
    crosses: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        for column in self.columns:
            if column.kind not in KINDS:
                raise InputError(
                    f"column `{column.name}` is to be {column.kind!r}", hint=f"use one of {', '.join(KINDS)}"
                )
        for kind, most in (("label", 1), ("time", 1)):
            names = self._named(kind)
            if len(names) > most:
                raise InputError(f"`{names[0]}` and `{names[1]}` are both the {kind}", hint=f"name one {kind} column")
        if not self._named("label"):
            raise InputError("no column is the label", hint="name the column to predict")
        self._check_crosses()
        names = (*(column.name for column in self.columns), *map(cross_name, self.crosses))
        name, count = Counter(names).most_common(1)[0]
        if count > 1:
            raise InputError(f"`{name}` is named twice", hint="name each column and each cross once")
        if not (self.features or self.numeric):
            raise InputError(
                f"no column of the log is a feature ({self._ignored_reasons()})",
                hint="name categorical or numeric columns",
            )

    @property
    def label(self) -> str:
        return self._named("label")[0]

    @property
    def time(self) -> str | None:
        names = self._named("time")
        return names[0] if names else None

    @property
    def numeric(self) -> tuple[str, ...]:
        return self._named("numeric")

    @property
    def categorical(self) -> tuple[str, ...]:
        return self._named("categorical")

    @property
    def lists(self) -> tuple[str, ...]:
        return self._named("list")

    @property
    def ignored(self) -> tuple[str, ...]:
        return self._named("ignored")

    @property
    def features(self) -> tuple[str, ...]:
        """The features that have a table: categorical columns, then lists, then crosses."""
        return (*self.categorical, *self.lists, *map(cross_name, self.crosses))

    def describe(self) -> str:
        """Return a line for each column and cross: its name, its use, the reason.

        Examples
        --------
        >>> print(Schema((Column("click", "label"), Column("user_id", "categorical", "text"))).describe())
        click    label
        user_id  categorical  text
        """
        rows: list[tuple[str, str, str]] = [(column.name, column.kind, column.why) for column in self.columns]
        rows += [(cross_name(cross), "cross", "asked for") for cross in self.crosses]
        width = max(len(name) for name, _, _ in rows)
        kind_width = max(len(kind) for _, kind, _ in rows)
        return "\n".join(f"{name:<{width}}  {kind:<{kind_width}}  {why}".rstrip() for name, kind, why in rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the schema as plain lists and dicts, for JSON."""
        return {
            "columns": [{"name": column.name, "kind": column.kind, "why": column.why} for column in self.columns],
            "crosses": [list(cross) for cross in self.crosses],
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Schema:
        """Return the schema that gave this dict."""
        try:
            columns = tuple(Column(str(c["name"]), c["kind"], str(c["why"])) for c in document["columns"])
            return cls(columns, tuple(tuple(map(str, cross)) for cross in document["crosses"]))
        except (KeyError, TypeError) as error:
            raise InputError(f"this is not a schema ({error!r})", hint="write it again") from None

    def _named(self, kind: str) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns if column.kind == kind)

    def _check_crosses(self) -> None:
        kinds = {column.name: column.kind for column in self.columns}
        for cross in self.crosses:
            shown = cross_name(cross)
            if len(cross) < 2 or len(set(cross)) < len(cross):
                raise InputError(f"the cross `{shown}` needs two different columns or more", hint="name them in pairs")
            for name in cross:
                if kinds.get(name) != "categorical":
                    found = kinds.get(name, "absent")
                    raise InputError(
                        f"the cross `{shown}` names `{name}`, which is {found}",
                        hint=f"cross categorical columns only: {', '.join(self.categorical) or 'there are none'}",
                    )

    def _ignored_reasons(self) -> str:
        reasons = [f"`{column.name}`: {column.why}" for column in self.columns if column.kind == "ignored"]
        return "; ".join(reasons[:5]) or "the label is alone"


def cross_name(cross: Sequence[str]) -> str:
    """Return the name of a cross as a feature.

    Examples
    --------
    >>> cross_name(("user", "item"))
    'user x item'
    """
    return " x ".join(cross)
