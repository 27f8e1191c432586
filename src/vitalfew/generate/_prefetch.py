"""Asking a CPU for rows of a table before they are needed, from within a kernel."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["ask_for_rows"]

_LINE = 64
"""Bytes that come at once."""


@intrinsic
def _prefetch(context: Any, table: Any, row: Any, column: Any) -> Any:
    """Ask for the line that holds a number of a table; nothing is read, so nothing can fail."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        array = context.make_array(kind)(context, builder, arguments[0])
        place = cgutils.get_item_pointer(context, builder, kind, array, list(arguments[1:]), wraparound=False)
        byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        name, form = "llvm.prefetch.p0i8", ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, form, name)
        # To be read, soon, of data.
        builder.call(function, [builder.bitcast(place, byte), i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(table, row, column), code


@njit(inline="always")
def ask_for_rows(table: Any, first: Any, step: Any, count: Any, last: Any) -> None:
    """Ask for `count` rows of a table from `first` on, `step` apart, none of them after `last`."""
    each = _LINE // table.itemsize
    for k in range(count):
        row = min(first + k * step, last)
        for j in range(0, table.shape[1], each):
            _prefetch(table, row, j)
