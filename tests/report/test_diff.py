"""What changed between two receipts."""

from __future__ import annotations

import dataclasses

from vitalfew.core import Line, Receipt
from vitalfew.report import Change, diff


def test_a_line_is_compared_field_by_field(receipt: Receipt) -> None:
    first = dataclasses.replace(receipt.lines[0], after=7.0)
    other = dataclasses.replace(receipt, lines=(first, *receipt.lines[1:]))
    assert diff(receipt, other) == (Change("lines > time per epoch > after", 6.3, 7.0),)
    assert str(diff(receipt, other)[0]) == "lines > time per epoch > after: 6.3 -> 7"


def test_a_line_that_came_is_one_change(receipt: Receipt) -> None:
    other = dataclasses.replace(receipt, lines=(*receipt.lines, Line("gone", "B", 1.0, 2.0, "counted")))
    (change,) = diff(receipt, other)
    assert str(change) == "lines > gone: nothing -> {what gone, unit B, before 1, after 2, how counted}"


def test_order_counts(receipt: Receipt) -> None:
    other = dataclasses.replace(receipt, lines=receipt.lines[::-1])
    assert [change.where for change in diff(receipt, other)] == ["lines > order"]


def test_numbers_that_print_alike_are_told_apart(receipt: Receipt) -> None:
    first = dataclasses.replace(receipt.lines[0], after=6.3 + 1e-9)
    other = dataclasses.replace(receipt, lines=(first, *receipt.lines[1:]))
    assert str(diff(receipt, other)[0]).endswith("6.3 -> 6.300000001")


def test_environment_is_compared_key_by_key(receipt: Receipt) -> None:
    other = dataclasses.replace(receipt, environment={**receipt.environment, "torch": "2.7"})
    assert list(map(str, diff(receipt, other))) == ["environment > torch: 2.6 -> 2.7"]
