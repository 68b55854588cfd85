"""w[n, k] = scale * (code - zero), or scale * code + minimum: one packed block back to float32 rows.

Bit for bit what `QuantizedTensor.dequantize` gives. Inputs must be whole sub-groups in their own order; other
weights take the way through `packing.unpack`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from nybble_kernels.numba.emit import F32, I8, I16, I32, I64, PTR, Emitter, filled, vector
from nybble_kernels.numba.isa import PLAIN, Isa
from nybble_kernels.numba.layout import ROWS, SUB, Format

ARGUMENTS = (PTR, PTR, I64, I64, I64, I64, I64)
"""block, out (float32), bytes from row to row of out, first row, rows, groups, subs"""


def dequantize_name(form: Format) -> str:
    return f"{form.name}_dequantize"


def emit_dequantize(module: Any, isa: Isa, form: Format) -> None:
    """Row by row; a 4-bit word holds eight neighbours of a row, so one shift each puts them in order."""
    e = Emitter(module, dequantize_name(form), ARGUMENTS)
    block, out, stride, first, rows, groups, subs = e.function.args
    group_bytes = e.times(subs, form.sub_bytes)
    scales = e.at(block, e.times(groups, group_bytes))
    offsets = e.at(scales, e.times(groups, form.scale_bytes))
    with e.loop(rows) as index:
        target = e.at(out, e.times(index, stride))
        row = e.plus(first, index)
        with e.loop(groups) as group:
            scale = _scalar(e, isa, form, e.at(scales, e.times(group, form.scale_bytes)), row)
            offset = _offset(e, isa, form, e.at(offsets, e.times(group, form.offset_bytes)), row)
            codes = e.at(block, e.times(group, group_bytes), e.times(row, 4))
            with e.loop(subs) as sub:
                start = e.at(target, e.times(e.plus(e.times(group, subs), sub), 4 * SUB))
                _sub_group(e, form, e.at(codes, e.times(sub, form.sub_bytes)), start, scale, offset)
    e.b.ret_void()


def _scalar(e: Emitter, isa: Isa, form: Format, base: Any, row: Any) -> Any:
    if not form.half:
        return e.load(F32, base, e.times(row, 4), align=4)
    bits = e.load(vector(I16, 1), base, e.times(row, 2), align=2)
    return e.b.extract_element(e.floats_of_half(bits, isa is not PLAIN), I32(0))


def _offset(e: Emitter, isa: Isa, form: Format, base: Any, row: Any) -> Any:
    if form.minimum:
        return _scalar(e, isa, form, base, row)
    zero = e.b.zext(e.load(I8, base, row), I32)
    return e.b.sitofp(e.b.sub(zero, I32(128 if form.bits == 8 else 0)), F32)


def _sub_group(e: Emitter, form: Format, codes: Any, target: Any, scale: Any, offset: Any) -> None:
    """32 neighbours of one row: 4 words of eight codes, or 8 words of four."""
    count = 32 // form.bits
    words, floats = vector(I32, count), vector(F32, count)
    scales, offsets = e.splat(scale, count), e.splat(offset, count)
    for i in range(SUB // count):
        word = e.splat(e.load(I32, codes, 4 * ROWS * i, align=4), count)
        value = e.b.sitofp(_codes(e, form, word, words), floats)
        if form.minimum:
            if form.bits == 8:  # codes are stored 128 lower
                value = e.b.fadd(value, filled(floats, 128.0))
            value = e.b.fadd(e.b.fmul(value, scales), offsets)
        else:
            value = e.b.fmul(e.b.fsub(value, offsets), scales)
        e.store(value, target, 4 * count * i, align=4)


def _codes(e: Emitter, form: Format, word: Any, words: Any) -> Any:
    if form.bits == 4:
        shifts = ir.Constant(words, [0, 8, 16, 24, 4, 12, 20, 28])
        return e.b.and_(e.b.lshr(word, shifts), filled(words, 15))
    return e.b.ashr(e.b.shl(word, ir.Constant(words, [24, 16, 8, 0])), filled(words, 24))
