"""y[m, n] = sum of w[n, k] * x[m, k], four blocks of 16 rows of bfloat16 weights, [inputs][16 rows] each."""

from __future__ import annotations

from typing import Any

from nybble_kernels.numba.emit import F32, I16, Emitter, filled, vector
from nybble_kernels.numba.gemv import ARGUMENTS, PREFETCH_BYTES
from nybble_kernels.numba.isa import Isa
from nybble_kernels.numba.layout import ROWS


def float_name(tile: int) -> str:
    return f"bfloat_m{tile}"


def emit_float(module: Any, isa: Isa, tile: int) -> None:
    """Arguments as for quantized blocks; x is float32, "groups" are the inputs, "subs" is not used."""
    e = Emitter(module, float_name(tile), ARGUMENTS)
    first, stream, x, x_stride, y, y_stride, inputs, _, blocks = e.function.args
    lanes, floats = isa.lanes, vector(F32, isa.lanes)
    parts = range(ROWS // lanes)
    rows = [e.at(x, e.times(x_stride, m)) for m in range(tile)]
    results = e.variables(floats, tile * len(parts))
    with e.loop(blocks) as number:
        block, target = e.at(first, e.times(number, stream)), e.at(y, e.times(number, 4 * ROWS))
        for slot in results:
            e.b.store(filled(floats, 0.0), slot)
        with e.loop(inputs) as k:
            column = e.at(block, e.times(k, 2 * ROWS))
            e.prefetch(column, PREFETCH_BYTES)
            values = [e.splat(e.load(F32, row, e.times(k, 4), align=4), lanes) for row in rows]
            for part in parts:
                bits = e.load(vector(I16, lanes), column, 2 * lanes * part, align=2)
                weight = e.floats_of_bfloat(bits)
                for m, value in enumerate(values):
                    slot = results[m * len(parts) + part]
                    e.b.store(e.fma(weight, value, e.get(slot, floats)), slot)
        for m in range(tile):
            for part in parts:
                result = e.get(results[m * len(parts) + part], floats)
                e.store(result, target, e.times(y_stride, m), 4 * lanes * part, align=4)
    e.b.ret_void()
