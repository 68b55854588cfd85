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
    """Row by row, neighbours of a row side by side."""
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
    if form.offsets == "minimum":
        return _scalar(e, isa, form, base, row)
    if form.offsets == "none":
        return F32(float(form.middle))
    zero = e.b.zext(e.load(I8, base, row), I32)
    return e.b.sitofp(e.b.sub(zero, I32(128 if form.bits == 8 else 0)), F32)


def _sub_group(e: Emitter, form: Format, codes: Any, target: Any, scale: Any, offset: Any) -> None:
    """32 neighbours of one row: four times eight codes, or eight times four of a byte each."""
    count = 4 if form.bits == 8 else 8
    floats = vector(F32, count)
    scales, offsets = e.splat(scale, count), e.splat(offset, count)
    for i in range(SUB // count):
        found = _bytes(e, codes, i) if form.bits == 8 else _from_planes(e, form, codes, i)
        value = e.b.sitofp(found, floats)
        if form.offsets == "minimum":
            if form.bits == 8:  # codes are stored 128 lower
                value = e.b.fadd(value, filled(floats, 128.0))
            value = e.b.fadd(e.b.fmul(value, scales), offsets)
        else:
            value = e.b.fmul(e.b.fsub(value, offsets), scales)
        e.store(value, target, 4 * count * i, align=4)


def _bytes(e: Emitter, codes: Any, i: int) -> Any:
    """Signed codes 4i to 4i + 3."""
    words = vector(I32, 4)
    word = e.splat(e.load(I32, codes, 4 * ROWS * i, align=4), 4)
    return e.b.ashr(e.b.shl(word, ir.Constant(words, [24, 16, 8, 0])), filled(words, 24))


def _from_planes(e: Emitter, form: Format, codes: Any, i: int) -> Any:
    """Codes 8i to 8i + 7: their two words share one of every plane, so one shift puts a plane in order."""
    words, result, before = vector(I32, 8), None, 0
    for width, low in form.planes:
        number, place = divmod(2 * i * width, 8)
        word = e.splat(e.load(I32, codes, 4 * ROWS * (before + number), align=4), 8)
        shifts = [8 * byte + place + width * half for half in (0, 1) for byte in range(4)]
        part = e.b.and_(e.b.lshr(word, ir.Constant(words, shifts)), filled(words, 2**width - 1))
        part = e.b.shl(part, filled(words, low)) if low else part
        result = part if result is None else e.b.or_(result, part)
        before += width
    return result
