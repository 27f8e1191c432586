"""What changed between two receipts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vitalfew.core import Receipt

__all__ = ["Change", "diff"]

# What an entry of each list is called by.
_NAMES = {
    "lines": "what",
    "overhead": "what",
    "predictions": "what",
    "quality": "metric",
    "pairs": "seed",
    "declined": "method",
    "curves": "name",
}


@dataclass(frozen=True, slots=True)
class Change:
    """One place of a receipt with its two values; None where one receipt has nothing there."""

    where: str
    before: Any
    after: Any

    def __str__(self) -> str:
        before, after = _short(self.before), _short(self.after)
        if before == after and isinstance(self.before, list):
            return f"{self.where}: {before}, with other values"
        if before == after:
            before, after = repr(self.before), repr(self.after)
        return f"{self.where}: {before} -> {after}"


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} {_short(v)}" for k, v in value.items() if v not in (None, "")) + "}"
    if isinstance(value, list):
        return f"{len(value)} entries"
    return str(value) or "nothing"


def _named(where: str, entries: list[Any]) -> dict[str, Any]:
    """Key a list's entries by their names; a name that returns gets a number."""
    name = _NAMES.get(where)
    seen: Counter[str] = Counter()
    named = {}
    for index, entry in enumerate(entries):
        key = str(entry[name]) if name else str(index + 1)
        seen[key] += 1
        named[key if seen[key] == 1 else f"{key} ({seen[key]})"] = entry
    return named


def _walk(where: str, a: Any, b: Any) -> Iterator[Change]:
    if a == b:
        return
    if where in _NAMES or where == "notes":
        a, b = _named(where, a), _named(where, b)
        order = [key for key in a if key in b], [key for key in b if key in a]
        if order[0] != order[1]:
            yield Change(f"{where} > order", *map(", ".join, order))
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            yield from _walk(f"{where} > {key}" if where else key, a.get(key), b.get(key))
    else:
        yield Change(where, a, b)


def diff(a: Receipt, b: Receipt) -> tuple[Change, ...]:
    r"""Return what changed from receipt `a` to receipt `b`, place by place; nothing if they say the same.

    Entries of a list are matched by their names, not by their places.

    Examples
    --------
    >>> a = Receipt("demo", "fused rows", (), "undecided", "one pair")
    >>> b = Receipt("demo", "fused rows", (), "saved", "5x", notes=("faster disk",))
    >>> print(*diff(a, b), sep="\n")
    verdict: undecided -> saved
    why: one pair -> 5x
    notes > 1: nothing -> faster disk
    """
    return tuple(_walk("", a.to_dict(), b.to_dict()))
