"""Numbers and texts as people read them, the same in every form of the receipt."""

from __future__ import annotations

import math
import re

from vitalfew.core import Quality, Receipt
from vitalfew.meter import human

__all__ = ["amount", "change", "clean", "factor", "headline", "interval", "log_ratio", "signed", "span"]

# XML has no place for these at all, and a terminal would obey them.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_THOUSANDS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def clean(value: object) -> str:
    """Return a text without control characters; each becomes the replacement character.

    Examples
    --------
    >>> clean("a" + chr(27) + "[31m") == "a" + chr(0xFFFD) + "[31m"
    True
    """
    return _CONTROL.sub("\ufffd", str(value))


def amount(value: float | None, unit: str) -> str:
    """Return a number with its unit; a rate also takes a prefix, and what is not known is a dash.

    Examples
    --------
    >>> amount(0.0412, "s"), amount(2**31, "B/s"), amount(1_234_567, "rows/s"), amount(None, "s")
    ('41.2 ms', '2 GiB/s', '1.23M rows/s', '-')
    """
    if value is None:
        return "-"
    name, slash, per = unit.partition("/")
    if slash and name in ("B", "J", "FLOP"):
        return f"{human(value, name)}/{per}"
    if slash:
        scale, letter = next((step for step in _THOUSANDS if abs(value) * 1.0005 >= step[0]), (1.0, ""))
        return f"{value / scale:.3g}{letter} {unit}"
    return human(value, unit)


def log_ratio(first: float | None, second: float | None) -> float | None:
    """Return log(second / first), or None unless both are known and positive.

    Examples
    --------
    >>> log_ratio(2.0, 2.0), log_ratio(0.0, 2.0)
    (0.0, None)
    """
    if first is None or second is None or first <= 0 or second <= 0:
        return None
    # The quotient itself may overflow, the difference of the logarithms cannot.
    return math.log(second) - math.log(first)


def factor(log: float) -> str:
    """Return exp(log) as a factor, with as many digits as a reader needs.

    Examples
    --------
    >>> factor(0.0), factor(math.log(6.54)), factor(math.log(12_345)), factor(math.log(1e9))
    ('1x', '6.5x', '12,345x', '1e9x')
    """
    if log > 690:
        return "over 1e299x"
    value = math.exp(log)
    if 0.01 <= value < 1.95:
        return f"{value:.2f}".rstrip("0").rstrip(".") + "x"
    if 0.01 <= value < 99.95:
        return f"{value:.1f}".removesuffix(".0") + "x"
    if 1 < value < 999_999.5:
        return f"{value:,.0f}x"
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(power)}x"


def change(before: float | None, after: float | None) -> str:
    """Return how many times less or more it became.

    Examples
    --------
    >>> change(41.2, 6.3), change(1.0, 1.5), change(5.0, 0.0), change(None, 3.0)
    ('6.5x less', '1.5x more', 'to zero', '-')
    """
    if before is None or after is None:
        return "-"
    if before == after:
        return "the same"
    log = log_ratio(before, after)
    if log is not None:
        text = factor(abs(log))
        return "about the same" if text == "1x" else f"{text} {'less' if log < 0 else 'more'}"
    if after == 0:
        return "to zero"
    return "from zero" if before == 0 else "less" if after < before else "more"


def signed(value: float | None, step: float, *, sign: bool = True) -> str:
    """Return a number with the digits that a `step`, such as a tolerance, calls for.

    Examples
    --------
    >>> signed(-0.000123, 0.001), signed(0.75, 0.001, sign=False), signed(None, 0.001)
    ('-0.00012', '0.75000', '-')
    """
    if value is None:
        return "-"
    flag = "+" if sign else ""
    if not 1e-9 < step < 1e9 or abs(value) >= 1e9:
        return f"{value:{flag}.4g}"
    digits = max(0, 2 - math.floor(math.log10(step)))
    return f"{value:{flag}.{digits}f}" if round(value, digits) else "0"


def span(low: float, high: float, unit: str) -> str:
    """Return an interval; a unit that both ends share is written once.

    Examples
    --------
    >>> span(6.24, 6.37, "s"), span(0.5, 2.0, "s")
    ('6.24 to 6.37 s', '500 ms to 2 s')
    """
    first, last = amount(low, unit), amount(high, unit)
    number, _, ending = first.partition(" ")
    return f"{number if last.endswith(f' {ending}') else first} to {last}"


def interval(quality: Quality) -> str:
    """Return the interval of a quality difference, with the digits that its tolerance calls for.

    Examples
    --------
    >>> interval(Quality("AUC", 0.7, 0.7, 0.0, -0.0001, 0.0001, 0.001, "equivalent"))
    '-0.00010 to +0.00010'
    """
    if quality.low is None or quality.high is None:
        return "-"
    return f"{signed(quality.low, quality.tolerance)} to {signed(quality.high, quality.tolerance)}"


def headline(receipt: Receipt) -> str:
    """Return the receipt in half a sentence: the first line's change, toned down by the verdict.

    Where the first line has no change to tell, it is the verdict's reason.

    Examples
    --------
    >>> from vitalfew.core import Line
    >>> headline(Receipt("t", "m", (Line("time", "s", 10.0, 2.0, "measured"),), "undecided", "one pair only"))
    '5x less time, not yet proven'
    """
    first = receipt.lines[0] if receipt.lines else None
    if first is None or log_ratio(first.before, first.after) is None:
        return receipt.why
    moved = change(first.before, first.after)
    claim = f"{moved} {first.what}" if moved.endswith((" less", " more")) else f"{first.what}: {moved}"
    ending = {
        "saved": "",
        "no saving": ", which is no saving",
        "quality lost": ", but quality is lost",
        "undecided": ", not yet proven",
    }
    return claim + ending[receipt.verdict]
