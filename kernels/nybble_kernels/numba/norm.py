"""RMSNorm and LayerNorm of one row."""

from __future__ import annotations

from nybble_kernels.numba.frame import FIRST
from nybble_kernels.numba.jit import f32, fast, inline
from nybble_kernels.numba.memory import f32_of_bits, get_f32, get_i64, set_f32, sqrt_f32

_ONE, _ZERO = f32(1), f32(0)


@fast
def rms_row(x: int, y: int, width: int, weight: int, eps: float) -> None:
    """y = x / sqrt(mean(x²) + eps) * weight; y may be x."""
    total = _ZERO
    for i in range(width):
        value = get_f32(x, i)
        total += value * value
    scale = _ONE / sqrt_f32(total / f32(width) + eps)
    for i in range(width):
        set_f32(y, i, get_f32(x, i) * scale * get_f32(weight, i))


@fast
def layer_row(x: int, y: int, width: int, weight: int, bias: int, eps: float) -> None:
    """y = (x - mean) / sqrt(var + eps) * weight + bias; bias may be absent (0)."""
    total = _ZERO
    for i in range(width):
        total += get_f32(x, i)
    mean = total / f32(width)
    squares = _ZERO
    for i in range(width):
        value = get_f32(x, i) - mean
        squares += value * value
    scale = _ONE / sqrt_f32(squares / f32(width) + eps)
    for i in range(width):
        set_f32(y, i, (get_f32(x, i) - mean) * scale * get_f32(weight, i))
    if bias != 0:
        for i in range(width):
            set_f32(y, i, get_f32(y, i) + get_f32(bias, i))


@inline
def norm(op: int, low: int, high: int) -> None:
    """Rows [low, high). Arguments: x, y, width, weight, bias, bits of eps, 1 for LayerNorm."""
    width = get_i64(op, FIRST + 2)
    weight, bias = get_i64(op, FIRST + 3), get_i64(op, FIRST + 4)
    eps = f32_of_bits(get_i64(op, FIRST + 5))
    for row in range(low, high):
        x = get_i64(op, FIRST) + 4 * width * row
        y = get_i64(op, FIRST + 1) + 4 * width * row
        if get_i64(op, FIRST + 6) == 1:
            layer_row(x, y, width, weight, bias, eps)
        else:
            rms_row(x, y, width, weight, eps)
