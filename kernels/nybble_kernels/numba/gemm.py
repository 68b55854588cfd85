"""The products of `gemv` for more rows, where computing is the bound and not memory: the same numbers.

Of a block, as many outputs as a vector has lanes are made at a time, so that their unpacked weights stay in
registers while all rows of the tile use them. Words of 8 bits need no unpacking, and come one after another.
"""

from __future__ import annotations

from typing import Any

from nybble_kernels.numba.gemv import Gemv, gemv_name
from nybble_kernels.numba.isa import Isa
from nybble_kernels.numba.layout import ROWS, Format

HALF = 4  # rows that 16 registers hold with words of 8 bits: AVX2 takes 203 instructions for 1024 products


def emit_gemm(module: Any, isa: Isa, form: Format, tile: int) -> None:
    """The function `gemv_name(form, tile)` for a tile of rows that share what is unpacked."""
    kernel = _Gemm(module, isa, form, tile)
    if form.bits == 8 and tile > HALF:
        kernel.by_parts(module.globals[gemv_name(form, HALF)])
    else:
        kernel.emit()


class _Gemm(Gemv):
    def emit(self) -> None:
        e, lanes = self.e, self.isa.lanes
        self.streams, self.parts = 1, range(1)
        with e.loop(self.count) as number, e.loop(ROWS // lanes) as part:
            self.lane = e.times(part, lanes)
            block = e.at(self.block, e.times(number, self.stream))
            self._blocks(block, e.at(self.y, e.times(number, 4 * ROWS), e.times(self.lane, 4)))
        e.b.ret_void()

    def by_parts(self, part: Any) -> None:
        """Calls `part`, a kernel of the module, for HALF rows and a block at a time."""
        e = self.e
        block, stream, x, x_stride, y, y_stride, *sizes, count = e.function.args
        with e.loop(count) as number:
            own, column = e.at(block, e.times(number, stream)), e.times(number, 4 * ROWS)
            for m in range(0, self.tile, HALF):
                x_of, y_of = e.at(x, e.times(x_stride, m)), e.at(y, e.times(y_stride, m), column)
                e.b.call(part, [own, stream, x_of, x_stride, y_of, y_stride, *sizes, e.i64(1)])
        e.b.ret_void()

    def _place(self, base: Any, part: int, lane_bytes: int) -> Any:
        return self.e.at(base, self.e.times(self.lane, lane_bytes))
