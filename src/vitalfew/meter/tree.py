"""A tree of scopes as a table: one line per name, one column per figure, and the source of each column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vitalfew.meter.account import NOT_ADDITIVE
from vitalfew.meter.figure import Figure, human, total

if TYPE_CHECKING:
    from vitalfew.meter.scope import Scope

__all__ = ["table"]


class _Row:
    """Scopes of one name at one place of the tree, as one line."""

    def __init__(self, scopes: Sequence[Scope], depth: int) -> None:
        marks = dict.fromkeys(mark for scope in scopes for mark in scope.marks)
        times = f" x{len(scopes)}" if len(scopes) > 1 else ""
        self.label = "  " * depth + scopes[0].name + times + (f" [{', '.join(marks)}]" if marks else "")
        groups: dict[str, list[Figure]] = {}
        for scope in scopes:
            for figure in scope.figures():
                groups.setdefault(figure.name, []).append(figure)
        # A figure that some of the scopes lack has no sum over them.
        self.figures = {
            name: max(group, key=lambda figure: figure.value) if name in NOT_ADDITIVE else total(group, name)
            for name, group in groups.items()
            if len(group) == len(scopes) or group[0].how == "counted" or name == "cpu_children"
        }


def _rows(scopes: Sequence[Scope], depth: int) -> Iterator[_Row]:
    yield _Row(scopes, depth)
    inside: dict[str, list[Scope]] = {}
    for scope in scopes:
        for child in scope.children:
            inside.setdefault(child.name, []).append(child)
    for group in inside.values():
        yield from _rows(group, depth + 1)


def _cell(figure: Figure | None, how: str) -> str:
    if figure is None:
        return "-"
    return human(figure.value, figure.unit) + ("" if figure.how == how else f" {figure.how}")


def table(scope: Scope) -> str:
    """Return the table of a scope that has ended.

    Examples
    --------
    >>> from vitalfew.meter.scope import scope
    >>> with scope("train") as train:
    ...     for _ in range(3):
    ...         with scope("step"):
    ...             pass
    >>> [line.split()[0] for line in table(train).splitlines()[2:4]]
    ['train', 'step']
    """
    rows = list(_rows([scope], 0))
    columns = {name: figure for row in reversed(rows) for name, figure in row.figures.items() if name != "rss_start"}
    names = [name for name in rows[0].figures if name in columns]
    names += [name for name in columns if name not in names]
    lines = [["scope", *names], ["", *(columns[name].how for name in names)]]
    lines += [[row.label, *(_cell(row.figures.get(name), columns[name].how) for name in names)] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    notes = [f"{name}: {columns[name]}" for name in names if columns[name].source]
    return "\n".join([*text, "", *notes])
