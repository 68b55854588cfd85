"""Activations to int8, gathered first where a weight reads its inputs in an order of its own."""

from __future__ import annotations

from nybble_kernels.numba.frame import FIRST
from nybble_kernels.numba.jit import f32, inline
from nybble_kernels.numba.layout import SUB
from nybble_kernels.numba.memory import call_quantize, get_f32, get_i32, get_i64, set_f32

_ZERO = f32(0)


@inline
def gather_row(x: int, target: int, width: int, columns: int) -> None:
    """target[c] = x[columns[c]], 0 where the column is -1."""
    for c in range(width):
        column = get_i32(columns, c)
        set_f32(target, c, get_f32(x, column) if column >= 0 else _ZERO)


@inline
def quantize(op: int, scratch: int, low: int, high: int) -> None:
    """Rows [low, high). Arguments: x, bytes between rows, target, bytes between rows, width, columns or 0,
    the kernel.
    """
    width, columns, kernel = get_i64(op, FIRST + 4), get_i64(op, FIRST + 5), get_i64(op, FIRST + 6)
    for row in range(low, high):
        x = get_i64(op, FIRST) + get_i64(op, FIRST + 1) * row
        target = get_i64(op, FIRST + 2) + get_i64(op, FIRST + 3) * row
        if columns != 0:
            gather_row(x, scratch, width, columns)
            x = scratch
        call_quantize(kernel, x, target, width // SUB)
