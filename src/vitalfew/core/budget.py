"""One limit on how many items may be chosen."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import Literal

from vitalfew.core.errors import InputError

__all__ = ["Budget", "parse_size"]

_UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Return the bytes in a text such as ``"256 MiB"`` or ``"2GB"``.

    Examples
    --------
    >>> parse_size("256 MiB")
    268435456
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", text, re.IGNORECASE | re.ASCII)
    if not match:
        raise InputError(f"cannot read the size {text!r}", hint='write it like "256 MiB" or "2 GB"')
    return int(Fraction(match[1]) * _UNITS[match[2].upper()])


@dataclass(frozen=True, slots=True)
class Budget:
    """One limit: a share of the items, a count, a size in bytes, or a coverage to reach.

    Make one with `of` (an ``int`` is a count, a ``float`` a share, a text a size or a percentage) or with `cover`.

    Examples
    --------
    >>> Budget.of(512), Budget.of(0.1).kind, Budget.of("256 MiB").value
    (Budget(kind='count', value=512), 'share', 268435456)
    >>> str(Budget.cover(0.9))
    'the fewest items that do 90% of the work'
    """

    kind: Literal["share", "count", "bytes", "coverage"]
    value: float

    def __post_init__(self) -> None:
        if self.kind not in ("share", "count", "bytes", "coverage"):
            raise InputError(f"there is no budget of kind {self.kind!r}", hint="choose share, count, bytes or coverage")
        if not 0 <= self.value < math.inf:
            raise InputError(f"a budget must be finite and not negative, got {self.value}", hint="use 0 for nothing")
        if self.kind == "count" and self.value != int(self.value):
            raise InputError(f"a count must be whole, got {self.value}", hint="for a share pass a float to Budget.of")
        if self.kind in ("share", "coverage") and self.value > 1:
            raise InputError(
                f"a {self.kind} must lie in [0, 1], got {self.value}", hint="for a number of items pass an int"
            )

    @classmethod
    def of(cls, value: Budget | float | int | str) -> Budget:
        """Turn what people type into a budget; a share and a count are never confused."""
        if isinstance(value, Budget):
            return value
        if isinstance(value, bool):
            raise InputError(f"a budget cannot be {value}", hint="pass a share (0.1), a count (512) or a size")
        if isinstance(value, Integral):  # NumPy's numbers too
            return cls("count", int(value))
        if isinstance(value, Real):
            return cls("share", float(value))
        if isinstance(value, str):
            percent = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value)
            return cls("share", float(percent[1]) / 100) if percent else cls("bytes", parse_size(value))
        raise InputError(f"a budget cannot be {value!r}", hint='pass a share (0.1), a count (512) or "256 MiB"')

    @classmethod
    def cover(cls, share: float) -> Budget:
        """Ask for the fewest items that do at least this share of the work."""
        return cls("coverage", float(share))

    def __str__(self) -> str:
        if self.kind == "share":
            return f"{self.value:.4g} of the items"
        if self.kind == "coverage":
            return f"the fewest items that do {100 * self.value:.6g}% of the work"
        return f"{int(self.value)} {'items' if self.kind == 'count' else 'bytes'}"
