"""Activations to int8: per 32 inputs a scale of max|x| / 127, round to nearest, and the sums the zeros need."""

from __future__ import annotations

import numpy as np

from nybble_kernels.numba.frame import FIRST
from nybble_kernels.numba.jit import fast, inline
from nybble_kernels.numba.layout import SUB
from nybble_kernels.numba.memory import get_f32, get_i32, get_i64, int_of_f32, rint_f32, set_f32, set_i8, set_i32

f32 = np.float32
_ZERO, _ONE, _TOP = f32(0), f32(1), f32(127)


@fast
def quantize_row(x: int, target: int, width: int) -> None:
    """float32 [width] at x -> int8 [width], scales, scaled sums, sums at target (layout.activation_bytes)."""
    groups = width // SUB
    scales = target + width
    for g in range(groups):
        source = x + 4 * SUB * g
        top = _ZERO
        for i in range(SUB):
            top = max(top, abs(get_f32(source, i)))
        scale = top / _TOP
        inverse = _TOP / top if top > _ZERO else _ZERO
        total = 0
        for i in range(SUB):
            code = int_of_f32(rint_f32(get_f32(source, i) * inverse))
            set_i8(target + SUB * g, i, code)
            total += code
        set_f32(scales, g, scale)
        set_f32(scales, groups + g, scale * f32(total))
        set_i32(scales, 2 * groups + g, total)


@inline
def gather_row(x: int, target: int, width: int, columns: int) -> None:
    """target[c] = x[columns[c]], 0 where the column is -1."""
    for c in range(width):
        column = get_i32(columns, c)
        set_f32(target, c, get_f32(x, column) if column >= 0 else _ZERO)


@inline
def quantize(op: int, scratch: int, low: int, high: int) -> None:
    """Rows [low, high). Arguments: x, bytes between rows, target, bytes between rows, width, columns or 0."""
    width, columns = get_i64(op, FIRST + 4), get_i64(op, FIRST + 5)
    for row in range(low, high):
        x = get_i64(op, FIRST) + get_i64(op, FIRST + 1) * row
        target = get_i64(op, FIRST + 2) + get_i64(op, FIRST + 3) * row
        if columns != 0:
            gather_row(x, scratch, width, columns)
            x = scratch
        quantize_row(x, target, width)
