"""The nonlinearity of the feed-forward half: act(gate) * up, or act(up)."""

from __future__ import annotations

import math

from nybble_kernels.numba.floats import silu_f32, tanh_f32
from nybble_kernels.numba.frame import FIRST
from nybble_kernels.numba.jit import f32, inline
from nybble_kernels.numba.memory import get_f32, get_i64, set_f32

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
_ZERO, _HALF, _ONE = f32(0), f32(0.5), f32(1)
_ROOT_HALF = f32(math.sqrt(0.5))
_TANH_SCALE, _CUBE = f32(math.sqrt(2 / math.pi)), f32(0.044715)


@inline
def activate_row(x: int, y: int, width: int, kind: int) -> None:
    if kind == 0:
        for i in range(width):
            set_f32(y, i, silu_f32(get_f32(x, i)))
    elif kind == 1:
        for i in range(width):
            value = get_f32(x, i)
            set_f32(y, i, value * _HALF * (_ONE + f32(math.erf(value * _ROOT_HALF))))
    elif kind == 2:
        for i in range(width):
            value = get_f32(x, i)
            inner = _TANH_SCALE * (value + _CUBE * value * value * value)
            set_f32(y, i, value * _HALF * (_ONE + tanh_f32(inner)))
    else:
        for i in range(width):
            set_f32(y, i, max(get_f32(x, i), _ZERO))


@inline
def activate(op: int, low: int, high: int) -> None:
    """Rows [low, high). Arguments: x, bytes between rows, y, width, kind, 1 when x is [gate, up]."""
    width = get_i64(op, FIRST + 3)
    for row in range(low, high):
        x = get_i64(op, FIRST) + get_i64(op, FIRST + 1) * row
        y = get_i64(op, FIRST + 2) + 4 * width * row
        activate_row(x, y, width, get_i64(op, FIRST + 4))
        if get_i64(op, FIRST + 5) == 1:
            for i in range(width):
                set_f32(y, i, get_f32(y, i) * get_f32(x, width + i))
