"""y[m, n] = sum of w[n, k] * x[m, k], one block of 16 rows of bfloat16 weights, [inputs][16 rows]."""

from __future__ import annotations

from typing import Any

from nybble_kernels.numba.emit import F32, I16, I64, PTR, Emitter, vector
from nybble_kernels.numba.gemv import PREFETCH_BYTES
from nybble_kernels.numba.isa import Isa
from nybble_kernels.numba.layout import ROWS

ARGUMENTS = (PTR, PTR, I64, PTR, I64, I64, I64)
"""block, x (float32), bytes from row to row of x, y, bytes from row to row of y, inputs, 1"""


def float_name(tile: int) -> str:
    return f"bfloat_m{tile}"


def emit_float(module: Any, isa: Isa, tile: int) -> None:
    e = Emitter(module, float_name(tile), ARGUMENTS)
    block, first, stride, y, y_stride, inputs, _ = e.function.args
    lanes, floats = isa.lanes, vector(F32, isa.lanes)
    parts = range(ROWS // lanes)
    rows = [e.at(first, e.times(stride, m)) for m in range(tile)]
    results = e.variables(floats, tile * len(parts))
    with e.loop(inputs) as k:
        column = e.at(block, e.times(k, 2 * ROWS))
        e.prefetch(column, PREFETCH_BYTES)
        inputs_k = [e.splat(e.load(F32, row, e.times(k, 4), align=4), lanes) for row in rows]
        for part in parts:
            weight = e.floats_of_bfloat(e.load(vector(I16, lanes), column, 2 * lanes * part, align=2))
            for m, x in enumerate(inputs_k):
                slot = results[m * len(parts) + part]
                e.b.store(e.fma(weight, x, e.get(slot, floats)), slot)
    for m in range(tile):
        for part in parts:
            value = e.get(results[m * len(parts) + part], floats)
            e.store(value, y, e.times(y_stride, m), 4 * lanes * part, align=4)
    e.b.ret_void()
