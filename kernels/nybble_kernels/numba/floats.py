"""Scalar pieces that LLVM turns into vector code: exponential, sigmoid, GELU, bfloat16 conversions."""

from __future__ import annotations

from nybble_kernels.numba.jit import f32, inline
from nybble_kernels.numba.memory import bits_of_f32, f32_of_bits, int_of_f32, rint_f32

_LOG2_E = f32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = f32(0.693145751953125), f32(1.428606765330187e-06)
_C2, _C3, _C4 = f32(1 / 2), f32(1 / 6), f32(1 / 24)
_C5, _C6, _C7 = f32(1 / 120), f32(1 / 720), f32(1 / 5040)
_LOWEST, _HIGHEST = f32(-87.0), f32(88.0)
_ONE, _TWO = f32(1), f32(2)


@inline
def exp_f32(x: float) -> float:
    """e^x within 2 units in the last place; arguments are held inside [-87, 88]."""
    x = min(max(x, _LOWEST), _HIGHEST)
    n = rint_f32(x * _LOG2_E)
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = _C7  # Taylor: |r| is at most ln(2) / 2, where the next term is below 1e-8
    p = p * r + _C6
    p = p * r + _C5
    p = p * r + _C4
    p = p * r + _C3
    p = p * r + _C2
    p = (p * r + _ONE) * r + _ONE
    return p * f32_of_bits((int_of_f32(n) + 127) << 23)


@inline
def silu_f32(x: float) -> float:
    return x / (_ONE + exp_f32(-x))


@inline
def tanh_f32(x: float) -> float:
    return _ONE - _TWO / (exp_f32(_TWO * x) + _ONE)


@inline
def bfloat_of(x: float) -> int:
    """The upper 16 bits, rounded to nearest even."""
    bits = bits_of_f32(x)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@inline
def f32_of_bfloat(bits: int) -> float:
    return f32_of_bits(bits << 16)
