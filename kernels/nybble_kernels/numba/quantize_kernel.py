"""A row of activations to int8: code = round(x / scale), scale = max|x| / 127, per sub-group of 32 inputs."""

from __future__ import annotations

from typing import Any

from nybble_kernels.numba.emit import F32, I8, I32, I64, PTR, Emitter, filled, vector
from nybble_kernels.numba.layout import SUB

NAME = "quantize_row"
ARGUMENTS = (PTR, PTR, I64)
"""x (float32), target (layout.activation_bytes), sub-groups"""


def emit_quantize(module: Any) -> None:
    """The largest magnitude is found among the bits, where NaN is larger than infinity: NaN is not lost."""
    e = Emitter(module, NAME, ARGUMENTS)
    x, target, groups = e.function.args
    floats, words, codes = vector(F32, SUB), vector(I32, SUB), vector(I8, SUB)
    scales = e.at(target, e.times(groups, SUB))
    scaled_sums = e.at(scales, e.times(groups, 4))
    sums = e.at(scaled_sums, e.times(groups, 4))
    with e.loop(groups) as group:
        values = e.load(floats, x, e.times(group, 4 * SUB), align=4)
        magnitudes = e.b.and_(e.b.bitcast(values, words), filled(words, 0x7FFFFFFF))
        top = e.b.bitcast(e.call(f"llvm.vector.reduce.smax.v{SUB}i32", I32, magnitudes), F32)
        inverse = e.b.select(e.b.fcmp_ordered("==", top, F32(0.0)), F32(0.0), e.b.fdiv(F32(127.0), top))
        scale = e.b.fdiv(top, F32(127.0))
        rounded = e.call(f"llvm.rint.v{SUB}f32", floats, e.b.fmul(values, e.splat(inverse, SUB)))
        whole = e.b.fptosi(rounded, words)
        total = e.call(f"llvm.vector.reduce.add.v{SUB}i32", I32, whole)
        at = e.times(group, 4)
        e.store(e.b.trunc(whole, codes), target, e.times(group, SUB), align=4)
        e.store(scale, scales, at, align=4)
        e.store(e.b.fmul(scale, e.b.sitofp(total, F32)), scaled_sums, at, align=4)
        e.store(total, sums, at, align=4)
    e.b.ret_void()
